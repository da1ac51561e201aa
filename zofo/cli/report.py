"""`zofo report`: print the main table and the verdict, and write the page."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console

from zofo.cli.exits import app, reports_errors
from zofo.cli.output import one_line, rich_table, stdout_console
from zofo.console import say
from zofo.errors import UserError

if TYPE_CHECKING:
    from zofo.report.page import Report

# A terminal has no room for these columns.
_PAGE_ONLY = ("setting", "accuracy_before", "drift", "best_dev_loss", "artifact_bytes")


@app.command()
@reports_errors
def report(
    runs: Annotated[
        list[Path], typer.Argument(metavar="RUNS...", help="Run folders, or the folder of a study.")
    ],
    to: Annotated[Path, typer.Option("--to", help="HTML file to write or replace.")] = (
        Path("report.html")
    ),
    markdown: Annotated[
        Path | None, typer.Option(help="Markdown file for the verdict and the tables.")
    ] = None,
) -> None:
    """Compare runs in a table, and write one self-contained page with figures and statistics.

    zofo report runs/rte-hybrid-lora runs/rte-fo-peft-lora --to report.html
    """
    from zofo.report.markdown import check_markdown_target, write_markdown
    from zofo.report.page import write_report

    if markdown is not None:
        if markdown.expanduser().resolve() == to.expanduser().resolve():
            raise UserError(f"--markdown and --to are both {to}; give the page another name")
        check_markdown_target(markdown)  # Checked now, so that a wrong name costs no report.
    found = write_report(runs, to)
    if markdown is not None:
        write_markdown(found, markdown)
    show(found, stdout_console())
    say(f"page: {to}")
    if markdown is not None:
        say(f"Markdown: {markdown}")


def show(report: Report, console: Console) -> None:
    """Print the groups of runs, the verdict on hybrid, and the number of runs by status."""
    from zofo.report.tables import group_table

    table = group_table(report.comparison)
    if table.rows:
        if table.common:
            common = ", ".join(f"{title} {text}" for title, text in table.common.items())
            console.print(one_line(f"all of {common}"))
        console.print(rich_table(table, _PAGE_ONLY))
    console.print(one_line(report.verdict.sentence), style="bold")
    for note in report.verdict.notes:
        console.print(one_line(note))
    statuses = Counter(str(status) for status in report.runs.table["status"])
    num = sum(statuses.values())
    parts = ", ".join(f"{count} {status}" for status, count in statuses.items())
    console.print(one_line(f"{num} run{'s' if num != 1 else ''}: {parts}"))
    damaged = report.runs.table[report.runs.table["status"] == "damaged"]
    for name, error in zip(damaged["run"], damaged["error"], strict=True):
        console.print(one_line(f"damaged: {name}: {error}"), soft_wrap=True)
