"""Consoles, tables and warnings with which the commands print."""

from __future__ import annotations

import sys
from collections.abc import Collection
from typing import TYPE_CHECKING

from rich.console import Console
from rich.table import Table as RichTable
from rich.text import Text

from zofo.console import plain_console, printable, say

if TYPE_CHECKING:
    from zofo.config.schema import RunConfig
    from zofo.pages.tables import Table


def stdout_console(plain_width: int = 160) -> Console:
    """A console on standard output, `plain_width` columns wide if it is not a terminal."""
    return plain_console(width=None if sys.stdout.isatty() else plain_width)


def one_line(text: str) -> Text:
    """Text without markup, and without line breaks, with which a name could forge a line."""
    return Text(printable(text).replace("\n", "\N{REPLACEMENT CHARACTER}"))


def rich_table(table: Table, hidden: Collection[str] = (), title: str | None = None) -> RichTable:
    """A table for the terminal, without the columns whose keys are `hidden`."""
    shown = RichTable(box=None, pad_edge=False, title=title, title_justify="left")
    kept = [i for i, column in enumerate(table.columns) if column.key not in hidden]
    for column in (table.columns[i] for i in kept):
        shown.add_column(one_line(column.title), justify="right" if column.is_number else "left")
    for row in table.rows:
        shown.add_row(*(one_line(f"{row[i].text} {row[i].aside}".strip()) for i in kept))
    return shown


def warn_of_idle_options(config: RunConfig) -> None:
    """Warn of every option that has no effect with the chosen method and adapter."""
    from zofo.config.checks import idle_options

    for message in idle_options(config):
        say(f"warning: {message}", stderr=True)
