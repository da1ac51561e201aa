"""`zofo convergence`: test the claims of the theory and print a table of verdicts."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from zofo.cli.exits import app, exit_code_of, reports_errors
from zofo.cli.output import one_line, stdout_console
from zofo.console import plain_console, say

if TYPE_CHECKING:
    from zofo.convergence.claims import Finding


@app.command()
@reports_errors
def convergence(
    experiments: Annotated[
        list[str] | None,
        typer.Argument(metavar="[EXPERIMENT]...", help="Names from --list. Default: all."),
    ] = None,
    to: Annotated[Path, typer.Option("--to", help="Folder of a new study or an earlier one.")] = (
        Path("runs/convergence")
    ),
    quick: Annotated[
        bool, typer.Option("--quick", help="Run a short trial with few seeds, epochs and rates.")
    ] = False,
    engine: Annotated[
        str, typer.Option(help="compiled (fast), or optimizer (slow: zofo.HybridOptimizer itself).")
    ] = "compiled",
    seeds: Annotated[
        int | None, typer.Option(help="Number of seeds per cell. Default: 24, or 6 with --quick.")
    ] = None,
    show_list: Annotated[bool, typer.Option("--list", help="List the experiments.")] = False,
) -> None:
    """Test the claims of the theory on problems whose constants are known.

    zofo convergence --to runs/convergence

    zofo convergence order zeroth --quick --to runs/quick
    """
    from zofo.convergence.plan import JSON_NAME, PAGE_NAME, make_plan
    from zofo.convergence.run import run

    console = stdout_console(200)
    plan = make_plan(to, experiments or [], quick=quick, engine=engine, num_seeds=seeds)
    if show_list:
        console.print(_experiments(plan.scale))
        return
    try:
        found = run(plan, plain_console(stderr=True))
    except KeyboardInterrupt as error:
        say("interrupted; finished cells are kept, and the same command goes on", stderr=True)
        raise typer.Exit(exit_code_of(error)) from None
    _show(found, console)
    say(f"values: {to / JSON_NAME}")
    say(f"page: {to / PAGE_NAME}")


def _show(found: Sequence[Finding], console: Console) -> None:
    from zofo.convergence.claims import CONFIRMED, REFUTED
    from zofo.convergence.page import claimed_text, measured_text

    styles = {CONFIRMED: "green", REFUTED: "red"}
    table = Table(box=None, pad_edge=False)
    for title in ("claim", "claimed", "measured [95%]", "verdict", "why"):
        table.add_column(title, justify="right" if title.startswith("measured") else "left")
    for finding in found:
        table.add_row(
            one_line(finding.claim.statement),
            one_line(claimed_text(finding)),
            one_line(measured_text(finding)),
            Text(finding.outcome, styles.get(finding.outcome, "yellow")),
            one_line(finding.reason),
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
