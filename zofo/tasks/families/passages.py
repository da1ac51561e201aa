"""Questions on a passage, answered in a few words: SQuAD and DROP, in the hub's columns.

Prompts are MeZO's. The model learns the first gold answer, and scores use all gold answers.

DROP on the hub joins the answers of all annotators into one list. A number or a date in it is an
answer of its own. Adjacent spans form one answer, and a repeated span begins the answer of the next
annotator.

References:
    Malladi et al., "Fine-Tuning Language Models with Just Forward Passes", 2023, appendix.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Final

from zofo.errors import shown
from zofo.tasks.answers import Answers, Measure
from zofo.tasks.classify import fill, template_columns
from zofo.tasks.families.family import BuiltinTask, Hub
from zofo.tasks.rows import Table, convert_rows, require_columns, text_in
from zofo.tasks.spec import Completion

TASKS: Final = {
    "squad": BuiltinTask(
        description="questions on a passage, answered by words of it; F1",
        hub=Hub("rajpurkar/squad"),
        columns=("title", "context", "question"),
        labels=("answers",),
        template="Title: {title}\nContext: {context}\nQuestion: {question}\nAnswer:",
        texts=("{context}", "{question}"),
        group="{context}",
        measure="squad",
    ),
    "drop": BuiltinTask(
        description="questions on a passage that ask to count, compare or add; F1",
        hub=Hub("ucinlp/drop"),
        columns=("passage", "question"),
        labels=("answers_spans",),
        template="Passage: {passage}\nQuestion: {question}\nAnswer:",
        texts=("{passage}", "{question}"),
        group="{passage}",
        measure="drop",
    ),
}
_TEXTS: Final[Mapping[Measure, str]] = {"squad": "text", "drop": "spans"}
"""The entry of the answer column that holds the texts."""


def passages(task: BuiltinTask, table: Table, template: str) -> list[Completion]:
    """One completion per row: the model learns the first gold answer to its question.

    Raises:
        UserError: for missing columns or bad rows.
    """
    require_passage_columns(table, template)
    require_columns(table, task.labels, "That column holds the gold answers")
    assert task.measure is not None
    measure = task.measure

    def convert(number: int, row: dict[str, Any]) -> Completion:
        answers = answers_in(row, measure)
        text = "\n".join(text_in(row, column) for column in template_columns(template))
        segments = ((fill(template, row), False), (f" {answers.text}", True))
        return Completion(segments, text, number, answers=answers, group=fill(task.group, row))

    return convert_rows(table, convert)


def require_passage_columns(table: Table, template: str) -> None:
    """Raises UserError if the first row lacks a column of the template."""
    require_columns(table, template_columns(template), "Name yours in task.template")


def answers_in(row: Mapping[str, Any], name: Measure) -> Answers:
    """The gold answers of a row; raises ValueError if they are missing or malformed."""
    (column,), entry = TASKS[name].labels, _TEXTS[name]
    value = row.get(column)
    if not isinstance(value, Mapping) or entry not in value:
        raise ValueError(
            f"{column!r} is {value!r}; it must be an object with {entry}, as in the hub's "
            f"{TASKS[name].hub.dataset}"
        )
    texts = _listed(value[entry])
    if not texts:
        raise ValueError(f"{column!r} holds no answer; remove the row")
    for text in texts:
        if not isinstance(text, str) or not text.strip() or "\n" in text.strip():
            raise ValueError(
                f"{column!r} holds {text!r}; an answer is a text on one line: remove it"
            )
    if name == "squad":
        return Answers(tuple((text,) for text in dict.fromkeys(texts)))
    types = _listed(value.get("types", ["span"] * len(texts)))
    if len(types) != len(texts):
        raise ValueError(f"{column!r} has {len(texts)} spans and {len(types)} types")
    return Answers(_separated(texts, types), "drop")


def _listed(value: Any) -> list[Any]:
    # JSON gives lists, parquet gives numpy arrays.
    found = value.tolist() if hasattr(value, "tolist") else value
    if not isinstance(found, list):
        raise ValueError(f"the answers are {shown(value)}; they must be a list of texts")
    return found


def _separated(texts: Sequence[str], types: Sequence[str]) -> tuple[tuple[str, ...], ...]:
    """The different answers in the joined list of a row of DROP."""
    answers: list[tuple[str, ...]] = []
    is_open = False  # whether the next span continues the last answer
    for text, kind in zip(texts, types, strict=True):
        if is_open and kind == "span" and text not in answers[-1]:
            answers[-1] += (text,)
        else:
            answers.append((text,))
        is_open = kind == "span"
    return tuple(dict.fromkeys(answers))
