"""`zofo report`: the main table and the verdict here, everything on a page."""

from __future__ import annotations

import sys
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.table import Table as RichTable
from rich.text import Text

from zofo.cli.exits import app, reports_errors
from zofo.errors import UserError

if TYPE_CHECKING:
    from zofo.pages.tables import Table
    from zofo.report.page import Report

_PLAIN_WIDTH = 160
"""Columns where no terminal says how wide it is, so that no cell is cut."""
_LEFT_OUT = ("setting", "accuracy_before", "best_dev_loss", "artifact_bytes")
"""Columns that only the page has room for."""


@app.command()
@reports_errors
def report(
    runs: Annotated[
        list[Path], typer.Argument(metavar="RUNS...", help="Run folders, or a study's folder.")
    ],
    to: Annotated[Path, typer.Option("--to", help="Page to write, in place of an earlier one.")] = (
        Path("report.html")
    ),
    markdown: Annotated[
        Path | None, typer.Option(help="Also write verdict and tables as Markdown.")
    ] = None,
) -> None:
    """Compare runs: a table here, and one self-contained page with figures and statistics.

    zofo report runs/rte-hybrid-lora runs/rte-fo-peft-lora --to report.html
    """
    from zofo.report.markdown import check_markdown_target, write_markdown
    from zofo.report.page import write_report

    if markdown is not None:
        if markdown.expanduser().resolve() == to.expanduser().resolve():
            raise UserError(f"--markdown and --to are both {to}; give the page another name")
        check_markdown_target(markdown)
    found = write_report(runs, to)
    if markdown is not None:
        write_markdown(found, markdown)
    width = None if sys.stdout.isatty() else _PLAIN_WIDTH
    show(found, Console(highlight=False, width=width))
    print(f"page: {to}")
    if markdown is not None:
        print(f"Markdown: {markdown}")


def show(report: Report, console: Console) -> None:
    """Print groups of runs, what they say of hybrid, and how many runs are not among them."""
    from zofo.report.tables import group_table

    table = group_table(report.comparison)
    if table.rows:
        if table.common:
            common = ", ".join(f"{title} {text}" for title, text in table.common.items())
            console.print(printable(f"all of {common}"))
        console.print(_rich(table))
    console.print(printable(report.verdict.sentence), style="bold")
    for note in report.verdict.notes:
        console.print(printable(note))
    statuses = Counter(str(status) for status in report.runs.table["status"])
    num = sum(statuses.values())
    parts = ", ".join(f"{count} {status}" for status, count in statuses.items())
    console.print(printable(f"{num} run{'s' if num != 1 else ''}: {parts}"))


def printable(text: str) -> Text:
    """Text as it stands: no markup, and no control characters, which move a terminal's cursor."""
    return Text("".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in text))


def _rich(table: Table) -> RichTable:
    shown = RichTable(box=None, pad_edge=False)
    kept = [i for i, column in enumerate(table.columns) if column.key not in _LEFT_OUT]
    for column in (table.columns[i] for i in kept):
        shown.add_column(printable(column.title), justify="right" if column.is_number else "left")
    for row in table.rows:
        shown.add_row(*(printable(f"{row[i].text} {row[i].aside}".strip()) for i in kept))
    return shown
