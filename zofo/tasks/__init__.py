"""Tasks: rows become prompt, candidates and gold; or text to be written.

A built-in task brings its rows, prompt and sizes. `classification`, `completion` and `chat` take
the user's own rows.
"""

from __future__ import annotations

import difflib
from typing import Any, Final

from zofo.errors import UserError
from zofo.tasks.answers import Answers
from zofo.tasks.spec import Completion, Example, Splits, TaskSpec

__all__ = [
    "OWN_TASKS",
    "Answers",
    "Completion",
    "Example",
    "Splits",
    "TaskSpec",
    "check_spec",
    "load_splits",
    "task_names",
    "writes_answers",
    "writes_text",
]

OWN_TASKS: Final = {
    "classification": "your rows of text and label",
    "completion": "your rows of prompt and completion",
    "chat": "your rows of chat messages",
}
_SHARED: Final = {"name", "num_train", "num_dev", "num_test", "max_length"}
_FILES: Final = {"train", "dev", "test", "subset"}
_PROMPTS: Final = {"template", "verbalizers", "objective"}
_QUESTIONS: Final = {"template", "data_dir", "max_new_tokens"}
_USED: Final = {
    "rotten-tomatoes": _PROMPTS,
    "boolq": _PROMPTS,
    "sst2": _PROMPTS | {"data_dir"},
    "piqa": {"template", "objective"},
    "squad": _QUESTIONS,
    "drop": _QUESTIONS,
    "classification": _FILES | _PROMPTS | {"text", "label"},
    "completion": _FILES | {"prompt", "completion", "metric", "max_new_tokens"},
    "chat": _FILES | {"messages"},
}


def task_names() -> tuple[str, ...]:
    """All tasks, built-in ones first."""
    from zofo.tasks.builtin import BUILTIN

    return (*BUILTIN, *OWN_TASKS)


def writes_answers(spec: TaskSpec) -> bool:
    """Whether answers are written and scored by F1."""
    return spec.name in ("squad", "drop") or spec.metric == "f1"


def writes_text(spec: TaskSpec) -> bool:
    """Whether a prediction is a text, not one of several candidates."""
    return spec.name in ("squad", "drop", "completion", "chat")


def check_spec(spec: TaskSpec) -> list[str]:
    """What is wrong with a task's options, before anything is read."""
    if spec.name not in _USED:
        near = difflib.get_close_matches(spec.name, _USED, n=1)
        hint = f"did you mean {near[0]!r}? " if near else ""
        return [f"task {spec.name!r} does not exist; {hint}choose one of {', '.join(_USED)}"]
    unused = sorted(
        key
        for key in spec.model_fields_set - _SHARED - _USED[spec.name]
        if getattr(spec, key) != TaskSpec.model_fields[key].default
    )
    problems = []
    if unused:
        problems.append(
            f"task {spec.name} does not use {', '.join(unused)}; remove, or choose another task"
        )
    if spec.name in OWN_TASKS and spec.train is None:
        problems.append(
            f"task {spec.name} needs train: a file (jsonl, json, csv, tsv, parquet) or a hub "
            "dataset id"
        )
    if writes_answers(spec) and spec.max_new_tokens >= spec.max_length:
        problems.append(
            f"task.max_new_tokens is {spec.max_new_tokens} and task.max_length "
            f"{spec.max_length}, which leaves no room for a prompt; lower the one or raise the "
            "other"
        )
    return problems


def load_splits(spec: TaskSpec, *, seed: int = 0, tokenizer: Any = None) -> Splits:
    """Read a task's rows and split them.

    Args:
        spec: the options.
        seed: of the shuffle and of carved splits.
        tokenizer: for chat's template.

    Raises:
        UserError: for wrong options, missing data, bad rows.
    """
    problems = check_spec(spec)
    if problems:
        raise UserError("; ".join(problems))
    if spec.name in OWN_TASKS:
        return _load_own(spec, seed, tokenizer)
    return _load_builtin(spec, seed)


def _load_builtin(spec: TaskSpec, seed: int) -> Splits:
    from zofo.tasks import builtin, classify, questions, splits

    task = builtin.get_builtin(spec.name)
    train, test = builtin.builtin_tables(spec)
    template = spec.template or task.template
    classes = tuple(task.verbalizers)

    def convert(table: Any) -> list[Any]:
        if writes_answers(spec):
            return questions.questions(table, spec.name, template)  # type: ignore[arg-type]
        if not classes:
            return builtin.piqa_examples(table, template)
        return classify.examples(
            table,
            text_column="text",
            label_column="label",
            labels=classes,
            template=template,
            verbalizers=spec.verbalizers or task.verbalizers,
        )

    given = (spec.num_train, spec.num_dev, spec.num_test)
    sizes = tuple(own or default for own, default in zip(given, task.sizes, strict=True))
    parts = splits.separate(
        convert(train),
        None,
        None if test is None else convert(test),
        sizes=sizes,  # type: ignore[arg-type]
        seed=seed,
    )
    labels = tuple(task.label_names[c] for c in classes)
    kind = "generation" if writes_answers(spec) else "classification" if classes else "choice"
    return Splits(kind, *parts[:3], labels=labels, notes=parts[3])  # type: ignore[arg-type]


def _load_own(spec: TaskSpec, seed: int, tokenizer: Any) -> Splits:
    from zofo.tasks import classify, generate, splits
    from zofo.tasks.rows import SUFFIXES, read_table

    assert spec.train is not None

    def is_file(source: str) -> bool:
        return source.lower().endswith(SUFFIXES)

    def read(part: str | None) -> Any:
        if part is None:
            return None
        if is_file(part) or part == spec.train:
            return read_table(part, subset=spec.subset)
        if is_file(spec.train or ""):
            raise UserError(f"{part!r} must be a file that ends in one of {', '.join(SUFFIXES)}")
        return read_table(spec.train or "", subset=spec.subset, split=part)

    tables = [read(spec.train), read(spec.dev), read(spec.test)]
    labels: tuple[str, ...] = ()
    if spec.name == "classification":
        from zofo.tasks.rows import require_columns

        present = [table for table in tables if table is not None]
        for table in present:
            require_columns(table, [spec.label], "Name yours with task.label")
        labels = classify.class_names(present, spec.label)

    def convert(table: Any) -> Any:
        if table is None:
            return None
        if spec.name == "classification":
            return classify.examples(
                table,
                text_column=spec.text,
                label_column=spec.label,
                labels=labels,
                template=spec.template,
                verbalizers=spec.verbalizers,
            )
        if spec.name == "completion":
            return generate.completions(
                table,
                prompt_column=spec.prompt,
                completion_column=spec.completion,
                is_answer=writes_answers(spec),
            )
        return generate.chats(table, messages_column=spec.messages, tokenizer=tokenizer)

    train, dev, test, notes = splits.separate(
        convert(tables[0]),
        convert(tables[1]),
        convert(tables[2]),
        sizes=(spec.num_train, spec.num_dev, spec.num_test),
        seed=seed,
    )
    text_kind = "generation" if writes_answers(spec) else "completion"
    kind = "classification" if spec.name == "classification" else text_kind
    return Splits(kind, train, dev, test, labels=labels, notes=notes)  # type: ignore[arg-type]
