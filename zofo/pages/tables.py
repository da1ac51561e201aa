"""Tables on a page: columns, cells, and how they are shown."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Cell:
    """One entry of a table."""

    text: str  # the text that is shown
    value: float | str | None  # the sort key; None comes last
    aside: str = ""  # fainter text beside `text`
    href: str = ""  # target of a link
    mark: str = ""  # CSS class
    more: str = ""  # long form of `text`, which a reader can open


@dataclass(frozen=True)
class Column:
    """The heading of a column."""

    key: str  # a name for code
    title: str  # a name for readers
    is_number: bool = True  # Numbers are aligned right.


Columns = Mapping[Column, Callable[[Any], Cell]]
"""Column -> function that makes its cell from the item of a row."""


@dataclass(frozen=True)
class Table:
    """Headings and rows. The first column names the row."""

    columns: tuple[Column, ...]
    rows: tuple[tuple[Cell, ...], ...]  # one cell for each column
    common: dict[str, str]  # title -> text of omitted columns, which is the same in all rows


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
