"""`zofo convergence`: run, print the table of claims, write JSON and page."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import typer
from rich.console import Console
from rich.table import Table

from zofo.cli.app import EXIT_INTERRUPTED
from zofo.cli.report import printable
from zofo.convergence.claims import CONFIRMED, REFUTED, Finding
from zofo.convergence.experiments.table import EXPERIMENTS
from zofo.convergence.page import claimed_text, measured_text
from zofo.convergence.plan import JSON_NAME, PAGE_NAME, make_plan
from zofo.convergence.run import run

_PLAIN_WIDTH = 200
"""Columns where no terminal says how wide it is, so that no cell is cut."""
_STYLES = {CONFIRMED: "green", REFUTED: "red"}


def convergence(
    names: Sequence[str],
    to: Path,
    quick: bool,
    engine: str,
    num_seeds: int | None,
    show_list: bool,
) -> None:
    """Run what is missing and say what it means."""
    console = Console(highlight=False, width=None if sys.stdout.isatty() else _PLAIN_WIDTH)
    plan = make_plan(to, names, quick=quick, engine=engine, num_seeds=num_seeds)
    if show_list:
        console.print(_experiments(plan.scale))
        return
    try:
        found = run(plan, Console(stderr=True))
    except KeyboardInterrupt:
        print("interrupted; finished cells are kept, the same command goes on", file=sys.stderr)
        raise typer.Exit(EXIT_INTERRUPTED) from None
    show(found, console)
    print(f"values: {to / JSON_NAME}")
    print(f"page: {to / PAGE_NAME}")


def show(found: Sequence[Finding], console: Console) -> None:
    """Print the table of claims."""
    table = Table(box=None, pad_edge=False)
    for title in ("claim", "claimed", "measured [95%]", "verdict", "why"):
        table.add_column(title, justify="right" if title.startswith("measured") else "left")
    for finding in found:
        table.add_row(
            printable(finding.claim.statement),
            printable(claimed_text(finding)),
            printable(measured_text(finding)),
            f"[{_STYLES.get(finding.outcome, 'yellow')}]{finding.outcome}[/]",
            printable(finding.reason),
        )
    console.print(table)
    counts = Counter(finding.outcome for finding in found)
    console.print(", ".join(f"{num} {outcome}" for outcome, num in counts.items()))


def _experiments(scale: object) -> Table:
    table = Table("experiment", "question", "cells", box=None, pad_edge=False)
    for experiment in EXPERIMENTS:
        cells = experiment.build(scale)  # type: ignore[arg-type]
        table.add_row(experiment.name, experiment.question, str(len(cells)))
    return table
