"""`zofo study`: run a grid of runs, or show its progress or its plan."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table

from zofo.cli.exits import TrustRemoteCode, app, reports_errors
from zofo.cli.output import one_line, stdout_console
from zofo.console import plain_console, say
from zofo.errors import UserError

if TYPE_CHECKING:
    from zofo.study.grid import Grid
    from zofo.study.progress import Summary
    from zofo.study.records import StudyFolder

_NUM_SHOWN = 5  # number of runs that a plan lists
_PLAIN_WIDTH = 100


@app.command()
@reports_errors
def study(
    name: Annotated[
        str, typer.Argument(metavar="STUDY", help="YAML file, preset (laptop or paper) or folder.")
    ],
    overrides: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[KEY=VALUE]...", help="Options such as seeds=[0,1] output=studies/mine."
        ),
    ] = None,
    workers: Annotated[
        int, typer.Option(min=1, help="Number of parallel runs on this machine.")
    ] = 1,
    join: Annotated[
        bool, typer.Option("--join", help="Work on a study that another process has started.")
    ] = False,
    retry_failed: Annotated[
        bool, typer.Option("--retry-failed", help="Repeat the runs that failed.")
    ] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Show counts, cost and the first configurations.")
    ] = False,
    status: Annotated[
        bool, typer.Option("--status", help="Show the progress of the study.")
    ] = False,
    trust_remote_code: TrustRemoteCode = False,
) -> None:
    """Run a grid of methods, learning rates and seeds.

    The study chooses the rates on the dev rows and then measures once on the test rows.

    zofo study laptop --workers 2

    zofo study studies/laptop --status
    """
    given = list(overrides or [])
    if dry_run:
        _show_plan(name, given)
    elif status:
        _show_status(name, given)
    else:
        _start(name, given, workers, join, retry_failed, trust_remote_code)


def _start(
    name: str,
    overrides: Sequence[str],
    num_workers: int,
    join: bool,
    retry_failed: bool,
    trust_remote_code: bool,
) -> None:
    """Run a study to its end. The exit code is 1 if a run failed."""
    from zofo.study.grid import expand
    from zofo.study.progress import StudyDisplay
    from zofo.study.spec import SPEC_FILE, load_spec
    from zofo.study.worker import Worker

    spec = load_spec(name, overrides)
    folder = Path(spec.output)
    if join and not (folder / SPEC_FILE).is_file():
        raise UserError(f"there is no study in {folder} to join; start it without --join")
    grid = expand(spec)
    console = plain_console(stderr=True)
    for reason, num in grid.dropped.items():
        console.print(f"left out: {num} cells, {reason}", highlight=False, soft_wrap=True)
    display = StudyDisplay(grid, console)
    worker = Worker(grid, num_workers, display, trust_remote_code=trust_remote_code)
    try:
        worker.run(retry_failed=retry_failed)
    finally:
        display.close()
    if worker.signum is not None:
        say(f"interrupted; continue with: zofo study {folder}", stderr=True)
        raise typer.Exit(128 + worker.signum)
    summary = _summary(grid)
    _print(summary)
    say(f"results in {folder / 'results.json'}, choices in {folder / 'selection.json'}")
    say(f"figures and statistics: zofo report {folder}")
    if summary.failed:
        say(f"repeat the failed runs with: zofo study --retry-failed {folder}", stderr=True)
        raise typer.Exit(1)


def _show_status(name: str, overrides: Sequence[str]) -> None:
    from zofo.study.grid import expand
    from zofo.study.spec import SPEC_FILE, load_spec

    spec = load_spec(name, overrides)
    folder = Path(spec.output)
    if not (folder / SPEC_FILE).is_file():
        raise UserError(f"there is no study in {folder} yet; start it with: zofo study {name}")
    grid = expand(load_spec(folder))  # with the options that the study was started with
    _print(_summary(grid))


def _show_plan(name: str, overrides: Sequence[str]) -> None:
    from zofo.study.grid import expand
    from zofo.study.progress import Costs, seconds_per_forward
    from zofo.study.records import StudyFolder
    from zofo.study.spec import load_spec

    spec = load_spec(name, overrides)
    grid = expand(spec)
    console = stdout_console(_PLAIN_WIDTH)
    costs = Costs(grid)
    table = Table("method", "cells", "searches", "other seeds", "steps", title=spec.name)
    first = {run.cell: run for run in reversed(grid.search)}
    for method in dict.fromkeys(cell.method for cell in grid.rates):
        cells = [cell for cell in grid.rates if cell.method == method]
        if cells:
            steps = dict.fromkeys(str(grid.config(first[cell]).steps) for cell in cells)
            pairs = sum(len(grid.rates[cell]) for cell in cells)
            searches = pairs * len(spec.choosing_seeds)
            others = len(cells) * len(grid.other_seeds)
            table.add_row(method, *map(str, (len(cells), searches, others)), ", ".join(steps))
    console.print(table)
    for reason, num in grid.dropped.items():
        console.print(f"left out: {num} cells, {reason}")
    total = costs.total()
    console.print(
        f"{grid.num_runs} runs in {len(grid.rates)} cells, {len(grid.starts)} untrained models, "
        f"about {total:,.0f} forward-equivalents of training, without evaluations"
    )
    folder = StudyFolder(grid)
    found = [r for r in map(folder.record, grid.search) if r is not None]
    pace = seconds_per_forward(found).get(())
    console.print(
        "no run has been timed yet, so the hours are not known"
        if pace is None
        else f"about {pace * total / 3600:.1f} hours of one worker ({pace:.3g} s per forward)"
    )
    for run in grid.search[:_NUM_SHOWN]:
        console.print(run.id, markup=False)
    more = len(grid.search) - _NUM_SHOWN
    console.print(f"... and {more} more; the first in full:" if more > 0 else "the first in full:")
    console.print(grid.config(grid.search[0]).to_yaml(), markup=False)


def _summary(grid: Grid) -> Summary:
    """The state of a study, from its files and from its queue if there is one."""
    from zofo.study.jobs import all_tasks
    from zofo.study.progress import Costs, summarize
    from zofo.study.records import StudyFolder

    folder = StudyFolder(grid)
    folder.choices()  # Chooses the rates of every cell whose search has ended by now.
    return summarize(folder, Costs(grid), all_tasks(grid), _running(folder))


def _running(folder: StudyFolder) -> list[str]:
    from zofo.study.queue import DATABASE_FILE, queue_of

    spec = folder.grid.spec
    # Opening the queue would create its database.
    if spec.storage is None and not (folder.path / DATABASE_FILE).exists():
        return []
    queue = queue_of(spec)
    try:
        return list(queue.workers())
    finally:
        queue.close()


def _print(summary: Summary) -> None:
    from zofo.study.progress import table_of

    console = stdout_console(_PLAIN_WIDTH)
    console.print(table_of(summary, len(summary.running)))
    for name in summary.running:
        console.print(f"running: {name}", markup=False, soft_wrap=True)
    for name, error in summary.failed.items():
        console.print(one_line(f"failed: {name}: {error}"), soft_wrap=True)
    if summary.num_unchosen:
        console.print(
            f"{summary.num_unchosen} cells have no rates: each pair has a failed or stopped run"
        )
