"""Tables on a page: columns, cells, and how they are shown."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Cell:
    """One entry.

    Attributes:
        text: the text that is shown.
        value: the sort key; None comes last.
        aside: fainter text beside `text`.
        href: target of a link.
        mark: CSS class.
    """

    text: str
    value: float | str | None
    aside: str = ""
    href: str = ""
    mark: str = ""


@dataclass(frozen=True)
class Column:
    """A heading: a name for machines, a title for readers, and whether to align right."""

    key: str
    title: str
    is_number: bool = True


Columns = Mapping[Column, Callable[[Any], Cell]]
"""Column -> function that makes its cell from the item of a row."""


@dataclass(frozen=True)
class Table:
    """Headings and rows. The first column names the row.

    Attributes:
        columns: headings.
        rows: one cell for each column.
        common: title -> text of columns that are omitted, because all rows have the same text.
    """

    columns: tuple[Column, ...]
    rows: tuple[tuple[Cell, ...], ...]
    common: dict[str, str]


_MAY_BE_COMMON = ("task", "model", "adapter", "optimizer", "method", "stage", "setting")


def text_cell(text: str, mark: str = "") -> Cell:
    """A cell that is sorted by its text."""
    return Cell(text, text, mark=mark)


def make_table(columns: Columns, items: Iterable[Any]) -> Table:
    """A table with one row for each item."""
    rows = tuple(tuple(cell(item) for cell in columns.values()) for item in items)
    return Table(tuple(columns), rows, {})


def make_short_table(columns: Columns, items: Iterable[Any]) -> Table:
    """A table without its blank columns; columns of a setting that all rows share are `common`."""
    table = make_table(columns, items)
    kept, common = [0], {}
    for i, column in enumerate(table.columns[1:], 1):
        texts = {row[i].text for row in table.rows}
        if len(texts) == 1 and column.key in _MAY_BE_COMMON:
            common[column.title] = texts.pop()
        elif any(texts):
            kept.append(i)
    return Table(
        tuple(table.columns[i] for i in kept),
        tuple(tuple(row[i] for i in kept) for row in table.rows),
        {title: text for title, text in common.items() if text and title != "options"},
    )
