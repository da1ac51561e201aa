"""`zofo convergence`: run, print the table of claims, write JSON and page."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.table import Table

from zofo.cli.exits import EXIT_INTERRUPTED, app, reports_errors
from zofo.cli.report import printable

if TYPE_CHECKING:
    from zofo.convergence.claims import Finding

_PLAIN_WIDTH = 200
"""Columns where no terminal says how wide it is, so that no cell is cut."""


@app.command()
@reports_errors
def convergence(
    experiments: Annotated[
        list[str] | None,
        typer.Argument(metavar="[EXPERIMENT]...", help="Which; --list names them. Default: all."),
    ] = None,
    to: Annotated[Path, typer.Option("--to", help="Folder of the study; continued if there.")] = (
        Path("runs/convergence")
    ),
    quick: Annotated[
        bool, typer.Option("--quick", help="Few seeds, epochs and rates: to try it out.")
    ] = False,
    engine: Annotated[
        str, typer.Option(help="compiled, or optimizer: zofo.HybridOptimizer itself, slow.")
    ] = "compiled",
    seeds: Annotated[
        int | None, typer.Option(help="Seeds of every cell; default: 24, 6 with --quick.")
    ] = None,
    show_list: Annotated[bool, typer.Option("--list", help="Show the experiments.")] = False,
) -> None:
    """Test what the theory claims on problems with known constants: exponents, caps, readings.

    zofo convergence --to runs/convergence

    zofo convergence order zeroth --quick --to runs/quick
    """
    from zofo.convergence.plan import JSON_NAME, PAGE_NAME, make_plan
    from zofo.convergence.run import run

    console = Console(highlight=False, width=None if sys.stdout.isatty() else _PLAIN_WIDTH)
    plan = make_plan(to, experiments or [], quick=quick, engine=engine, num_seeds=seeds)
    if show_list:
        console.print(_experiments(plan.scale))
        return
    try:
        found = run(plan, Console(stderr=True))
    except KeyboardInterrupt:
        print("interrupted; finished cells are kept, the same command goes on", file=sys.stderr)
        raise typer.Exit(EXIT_INTERRUPTED) from None
    _show(found, console)
    print(f"values: {to / JSON_NAME}")
    print(f"page: {to / PAGE_NAME}")


def _show(found: Sequence[Finding], console: Console) -> None:
    """Print the table of claims."""
    from zofo.convergence.claims import CONFIRMED, REFUTED
    from zofo.convergence.page import claimed_text, measured_text

    styles = {CONFIRMED: "green", REFUTED: "red"}
    table = Table(box=None, pad_edge=False)
    for title in ("claim", "claimed", "measured [95%]", "verdict", "why"):
        table.add_column(title, justify="right" if title.startswith("measured") else "left")
    for finding in found:
        table.add_row(
            printable(finding.claim.statement),
            printable(claimed_text(finding)),
            printable(measured_text(finding)),
            f"[{styles.get(finding.outcome, 'yellow')}]{finding.outcome}[/]",
            printable(finding.reason),
        )
    console.print(table)
    counts = Counter(finding.outcome for finding in found)
    console.print(", ".join(f"{num} {outcome}" for outcome, num in counts.items()))


def _experiments(scale: object) -> Table:
    from zofo.convergence.experiments.table import EXPERIMENTS

    table = Table("experiment", "question", "cells", box=None, pad_edge=False)
    for experiment in EXPERIMENTS:
        cells = experiment.build(scale)  # type: ignore[arg-type]
        table.add_row(experiment.name, experiment.question, str(len(cells)))
    return table
