"""A table on a page: columns, cells, and how they are shown."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Cell:
    """One entry.

    Attributes:
        text: what is shown.
        value: what it is sorted by; None, which comes last, where nothing is known.
        aside: shown beside the text, fainter.
        href: where the text leads.
        mark: class of its look.
    """

    text: str
    value: float | str | None
    aside: str = ""
    href: str = ""
    mark: str = ""


@dataclass(frozen=True)
class Column:
    """A heading.

    Attributes:
        key: name for machines.
        title: name for readers.
        is_number: whether it is set flush right.
    """

    key: str
    title: str
    is_number: bool = True


@dataclass(frozen=True)
class Table:
    """Headings and rows; the first column names the row.

    Attributes:
        columns: headings.
        rows: cells.
        common: heading -> text, of columns that all rows share and that therefore are not there.
    """

    columns: tuple[Column, ...]
    rows: tuple[tuple[Cell, ...], ...]
    common: dict[str, str]


_MAY_BE_COMMON = ("task", "model", "adapter", "optimizer", "method", "stage", "setting")


def make_table(columns: Sequence[Column], rows: Sequence[Sequence[Cell]]) -> Table:
    """Without the columns in which every cell is blank, or says the same of where it belongs."""
    kept, common = [0], {}
    for i, column in enumerate(columns[1:], 1):
        texts = {row[i].text for row in rows}
        if len(texts) == 1 and column.key in _MAY_BE_COMMON:
            common[column.title] = texts.pop()
        elif any(texts):
            kept.append(i)
    common = {title: text for title, text in common.items() if text and title != "options"}
    return Table(
        tuple(columns[i] for i in kept),
        tuple(tuple(row[i] for i in kept) for row in rows),
        common,
    )
