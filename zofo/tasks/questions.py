"""Questions on a passage, answered in a few words: SQuAD and DROP, in the hub's columns.

Prompts are MeZO's. The first gold answer is learnt, all of them count.

DROP on the hub runs the answers of all annotators together: a number or date there is an answer by
itself, spans side by side are one answer, and a span that comes again begins the next annotator's.

References:
    Malladi et al., "Fine-Tuning Language Models with Just Forward Passes", 2023, appendix.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from zofo.errors import UserError
from zofo.tasks.answers import Answers, Measure
from zofo.tasks.classify import fill, template_columns
from zofo.tasks.rows import Table, convert_rows, read_table, require_columns, text_in
from zofo.tasks.spec import Completion


@dataclass(frozen=True)
class _Columns:
    """Where a task's rows have what.

    Attributes:
        hub: the dataset's id.
        column: of the gold answers.
        texts: the entry of that column with their texts.
    """

    hub: str
    column: str
    texts: str


QUESTIONS: Final[Mapping[Measure, _Columns]] = {
    "squad": _Columns("rajpurkar/squad", "answers", "text"),
    "drop": _Columns("ucinlp/drop", "answers_spans", "spans"),
}
_SUFFIXES: Final = (".jsonl", ".json", ".parquet")


def question_tables(name: Measure, data_dir: str | None) -> tuple[Table, Table]:
    """Rows of train (dev is carved from them) and of validation (to test on).

    Raises:
        UserError: if they cannot be read.
    """
    if data_dir is None:
        hub = QUESTIONS[name].hub
        return read_table(hub, split="train"), read_table(hub, split="validation")
    folder = Path(data_dir).expanduser()
    return _table(folder, "train"), _table(folder, "validation")


def _table(folder: Path, part: str) -> Table:
    for suffix in _SUFFIXES:
        path = folder / f"{part}{suffix}"
        if path.is_file():
            return read_table(str(path))
    names = ", ".join(f"{part}{suffix}" for suffix in _SUFFIXES)
    raise UserError(f"task.data_dir {folder} has none of {names}; put the rows there")


def questions(table: Table, name: Measure, template: str) -> list[Completion]:
    """One question a row, its first gold answer to be learnt.

    Raises:
        UserError: for missing columns or bad rows.
    """
    require_question_columns(table, template)
    require_columns(table, [QUESTIONS[name].column], f"The gold answers of {name} stand there")

    def convert(number: int, row: dict[str, Any]) -> Completion:
        answers = answers_in(row, name)
        texts = [text_in(row, column) for column in template_columns(template)]
        prompt = fill(template, row)
        segments = ((prompt, False), (f" {answers.text}", True))
        return Completion(segments, "\n".join(texts), number, answers=answers)

    return convert_rows(table, convert)


def require_question_columns(table: Table, template: str) -> None:
    """Raises UserError if the first row lacks a column of the template."""
    require_columns(table, template_columns(template), "Name yours in task.template")


def answers_in(row: Mapping[str, Any], name: Measure) -> Answers:
    """The gold answers of a row; raises ValueError for what is wrong with them."""
    place = QUESTIONS[name]
    value = row.get(place.column)
    if not isinstance(value, Mapping) or place.texts not in value:
        raise ValueError(
            f"{place.column!r} is {value!r}; it must be an object with {place.texts}, as in the "
            f"hub's {place.hub}"
        )
    texts = _listed(value[place.texts])
    if not texts:
        raise ValueError(f"{place.column!r} holds no answer; remove the row")
    for text in texts:
        if not isinstance(text, str) or not text.strip() or "\n" in text.strip():
            raise ValueError(
                f"{place.column!r} holds {text!r}; an answer is a text on one line: remove it"
            )
    if name == "squad":
        return Answers(tuple((text,) for text in dict.fromkeys(texts)))
    types = _listed(value.get("types", ["span"] * len(texts)))
    if len(types) != len(texts):
        raise ValueError(f"{place.column!r} has {len(texts)} spans and {len(types)} types")
    return Answers(_separated(texts, types), "drop")


def _listed(value: Any) -> list[Any]:
    """Parquet gives arrays."""
    return value.tolist() if hasattr(value, "tolist") else list(value)


def _separated(texts: Sequence[str], types: Sequence[str]) -> tuple[tuple[str, ...], ...]:
    """The answers that run together in a row of DROP, each once."""
    answers: list[tuple[str, ...]] = []
    is_open = False
    for text, kind in zip(texts, types, strict=True):
        if is_open and kind == "span" and text not in answers[-1]:
            answers[-1] += (text,)
        else:
            answers.append((text,))
        is_open = kind == "span"
    return tuple(dict.fromkeys(answers))
