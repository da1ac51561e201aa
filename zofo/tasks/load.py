"""Finds a task by name, checks its options, and loads its rows."""

from __future__ import annotations

import difflib
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Final

from zofo.errors import UserError
from zofo.tasks import classify, generate
from zofo.tasks.digests import RowDigests
from zofo.tasks.families import family, passages
from zofo.tasks.families.table import BUILTIN, builtin_tables
from zofo.tasks.files import SUFFIXES
from zofo.tasks.labels import Classes, class_names, label_of, require_known
from zofo.tasks.reasoning import is_generated
from zofo.tasks.rows import Table, read_table, require_columns
from zofo.tasks.spec import Kind, Sizes, Splits, TaskSpec
from zofo.tasks.split_notes import split_notes
from zofo.tasks.splits import cut, separate, shuffled

OWN_TASKS: Final = {
    "classification": "your rows of text and label",
    "completion": "your rows of prompt and completion",
    "chat": "your rows of chat messages",
}
_SHARED: Final = {"name", "num_train", "num_dev", "num_test", "max_length"}
_FILES: Final = {"train", "dev", "test", "subset"}
_USED_BY_KIND: Final = {
    "classification": {"data_dir", "template", "verbalizers", "objective"},
    "choice": {"data_dir", "template", "objective"},
    "generation": {"data_dir", "template", "max_new_tokens"},
}
_USED_BY_OWN: Final = {
    "classification": _FILES | {"template", "verbalizers", "objective", "text", "label"},
    "completion": _FILES | {"prompt", "completion", "metric", "max_new_tokens"},
    "chat": _FILES | {"messages"},
}


def task_names() -> tuple[str, ...]:
    """The names of all tasks, built-in tasks first."""
    return (*BUILTIN, *OWN_TASKS)


def used_options(name: str) -> set[str]:
    """The options that a task uses besides those that every task uses."""
    return _USED_BY_OWN[name] if name in OWN_TASKS else _USED_BY_KIND[BUILTIN[name].kind]


def writes_answers(spec: TaskSpec) -> bool:
    """Whether the model generates answers that are scored by F1."""
    is_built_in = spec.name in BUILTIN and BUILTIN[spec.name].kind == "generation"
    return is_built_in or spec.metric == "f1"


def writes_text(spec: TaskSpec) -> bool:
    """Whether a prediction is a generated text instead of one of several candidates."""
    return spec.name in ("completion", "chat") or writes_answers(spec)


def check_spec(spec: TaskSpec, *, only_dev: bool = False) -> list[str]:
    """Problems of a task's options, found before any file is read.

    Args:
        spec: the options.
        only_dev: whether the rows are for `load_dev`.
    """
    names = task_names()
    if spec.name not in names:
        near = difflib.get_close_matches(spec.name, names, n=1)
        hint = f"did you mean {near[0]!r}? " if near else ""
        return [f"task {spec.name!r} does not exist; {hint}choose one of {', '.join(names)}"]
    # An option that is set to its default changes nothing, so it is not refused.
    unused = sorted(
        key
        for key in spec.model_fields_set - _SHARED - used_options(spec.name)
        if getattr(spec, key) != TaskSpec.model_fields[key].default
    )
    problems = []
    if unused:
        problems.append(
            f"task {spec.name} does not use {', '.join(unused)}; remove, or choose another task"
        )
    if spec.name in OWN_TASKS and spec.train is None and not (only_dev and spec.dev):
        problems.append(
            f"task {spec.name} needs {'dev or ' if only_dev else ''}train: a file (jsonl, json, "
            "csv, tsv, parquet) or a hub dataset id"
        )
    if writes_answers(spec) and spec.max_new_tokens >= spec.max_length:
        problems.append(
            f"task.max_new_tokens is {spec.max_new_tokens} and task.max_length "
            f"{spec.max_length}, which leaves no room for a prompt; lower the first or raise "
            "the second"
        )
    return problems


def in_watch_task(problem: str) -> str:
    """A problem of the options or the rows of `task`, as one of `watch_task`."""
    return "watch_task: " + re.sub(r"\btask\.(?=\w)", "watch_task.", problem)


@dataclass(frozen=True)
class _Rows:
    """The converted rows of a task before they are split."""

    kind: Kind
    labels: tuple[str, ...]
    train: Sequence[Any]
    dev: Sequence[Any] | None  # None: carved from the training rows
    test: Sequence[Any] | None  # None: carved from the training rows
    limits: Sizes = (None, None, None)


def load_splits(
    spec: TaskSpec,
    *,
    seed: int = 0,
    tokenizer: Any = None,
    labels: Sequence[str] = (),
    known: RowDigests | None = None,
) -> Splits:
    """Read a task's rows and split them.

    Args:
        spec: the options.
        seed: seed of the shuffle and of carved splits.
        tokenizer: holds the chat template.
        labels: the classes of a trained model; rows are matched with them by name. Empty: those of
            the rows.
        known: the rows of a run. If the data has changed since, the run's rows are found in it.

    Raises:
        UserError: for wrong options, missing data, or bad rows.
    """
    problems = check_spec(spec)
    if problems:
        raise UserError("; ".join(problems))
    if spec.name in OWN_TASKS:
        rows = _own_rows(spec, tokenizer, labels)
    else:
        rows = _builtin_rows(spec, labels)
    sizes = (spec.num_train, spec.num_dev, spec.num_test)
    tables = (rows.train, rows.dev, rows.test)
    try:
        train, dev, test, notes = separate(*tables, sizes=sizes, limits=rows.limits, seed=seed)
    except UserError:
        if known is None:
            raise
        train, dev, test, notes = (), (), (), ()  # A file that shrank may be too small to be split.
    found = Splits(rows.kind, train, dev, test, labels=rows.labels, notes=notes)
    if known is not None and known != RowDigests.of(found):
        found = known.find([row for table in tables for row in table or ()], found)
    return replace(found, notes=found.notes + split_notes(found))


def load_dev(
    spec: TaskSpec, *, seed: int = 0, tokenizer: Any = None, labels: Sequence[str] = ()
) -> Splits:
    """The dev rows of a task that nothing is trained on, without other rows.

    They are those of `load_splits`. If rows of the user's own have a dev file and no training file,
    they are all rows of that file, or `num_dev` of them.

    Args:
        spec: the options.
        seed: as for `load_splits`, like the others.
        tokenizer: holds the chat template.
        labels: the classes of the model; empty: those of the rows.

    Raises:
        UserError: as `load_splits`.
    """
    if spec.name not in OWN_TASKS or spec.train is not None or spec.dev is None:
        found = load_splits(spec, seed=seed, tokenizer=tokenizer, labels=labels)
        return replace(found, train=(), test=(), notes=())
    if problems := check_spec(spec, only_dev=True):
        raise UserError("; ".join(problems))
    source = spec.model_copy(update={"train": spec.dev, "dev": None, "test": None})
    rows = _own_rows(source, tokenizer, labels)
    dev = cut(shuffled(rows.train, seed), spec.num_dev, None, "dev")
    return Splits(rows.kind, (), tuple(dev), (), labels=rows.labels)


def _builtin_rows(spec: TaskSpec, known: Sequence[str]) -> _Rows:
    task = BUILTIN[spec.name]
    labels = task.classes if task.kind == "classification" else ()
    places: Sequence[int] = range(len(task.classes))  # index of each class among the labels
    if labels and known:
        require_known(dict.fromkeys(labels, f"task {spec.name}"), known)
        classes, labels = Classes(known), tuple(known)
        places = [classes.index(label_of(label)) for label in task.classes]

    def convert(table: Table) -> list[Any]:
        if task.measure is not None:
            return passages.passages(task, table, spec.template or task.template)
        rows = family.examples(task, table, template=spec.template, verbalizers=spec.verbalizers)
        return [replace(row, gold=places[row.gold]) for row in rows]

    train, test = builtin_tables(spec)
    held_out = None if test is None else convert(test)
    return _Rows(task.kind, labels, convert(train), None, held_out, task.sizes)


def _own_rows(spec: TaskSpec, tokenizer: Any, known: Sequence[str]) -> _Rows:
    source = spec.train or ""

    def read(part: str | None) -> Any:
        if part is None:
            return None
        if part.lower().endswith(SUFFIXES) or part == source or is_generated(part):
            return read_table(part, subset=spec.subset)
        # Other names are splits, which only a hub dataset has.
        if source.lower().endswith(SUFFIXES):
            raise UserError(f"{part!r} must be a file that ends in one of {', '.join(SUFFIXES)}")
        return read_table(source, subset=spec.subset, split=part)

    tables = [read(spec.train), read(spec.dev), read(spec.test)]
    labels: tuple[str, ...] = ()
    if spec.name == "classification":
        present = [table for table in tables if table is not None]
        for table in present:
            require_columns(table, [spec.label], "Name yours with task.label")
        labels = class_names(present, spec.label, known)

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

    text_kind: Kind = "generation" if writes_answers(spec) else "completion"
    kind: Kind = "classification" if spec.name == "classification" else text_kind
    return _Rows(kind, labels, *map(convert, tables))
