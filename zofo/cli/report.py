"""`zofo report`: print the main table and the verdict, and write the page."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console

from zofo.cli.exits import app, reports_errors
from zofo.cli.output import one_line, rich_table, stdout_console
from zofo.console import say
from zofo.errors import UserError

if TYPE_CHECKING:
    from zofo.report.data import Report

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
    json: Annotated[
        Path | None, typer.Option("--json", help="JSON file for the comparison and every run.")
    ] = None,
) -> None:
    """Compare runs in a table, and write one self-contained page with figures and statistics.

    zofo report runs/rte-hybrid-lora runs/rte-fo-peft-lora --to report.html
    """
    from zofo.report.data import check_json_target, write_report_json
    from zofo.report.markdown import check_markdown_target, write_markdown
    from zofo.report.page import write_report

    _must_differ({"--to": to, "--markdown": markdown, "--json": json})
    # Checked now, so that a wrong name costs no report.
    if markdown is not None:
        check_markdown_target(markdown)
    if json is not None:
        check_json_target(json)
    found = write_report(runs, to)
    if markdown is not None:
        write_markdown(found, markdown)
    if json is not None:
        write_report_json(found, json)
    show(found, stdout_console())
    for title, path in (("page", to), ("Markdown", markdown), ("JSON", json)):
        if path is not None:
            say(f"{title}: {path}")


def _must_differ(targets: Mapping[str, Path | None]) -> None:
    """Refuse two options that name one file."""
    first: dict[Path, str] = {}
    for option, path in targets.items():
        if path is not None:
            other = first.setdefault(path.expanduser().resolve(), option)
            if other != option:
                raise UserError(f"{option} and {other} are both {path}; give one another name")


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
