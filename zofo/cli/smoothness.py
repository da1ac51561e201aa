"""`zofo smoothness`: measure along a run or at its start, show what was found."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

import typer
from rich.console import Console
from rich.table import Table as RichTable

from zofo.cli.app import EXIT_INTERRUPTED
from zofo.cli.report import printable
from zofo.config.checks import idle_options
from zofo.config.schema import RunConfig
from zofo.disk.files import read_json
from zofo.pages.tables import Table
from zofo.smoothness.measure import PAGE_FILE, measure_run, new_folder, saved_options
from zofo.smoothness.options import (
    SmoothnessOptions,
    load_smoothness,
    path_steps,
    planned_forwards,
    point_steps,
)
from zofo.smoothness.summary import FILE
from zofo.smoothness.tables import claims_table, constants_table, fits_table
from zofo.trainer.interrupt import StopOnSignal, TrainingInterrupt

_PLAIN_WIDTH = 160
"""Columns where no terminal says how wide it is, so that no cell is cut."""
_LEFT_OUT = ("stable_rank", "rounding", "num_parameters")
"""Columns that only the page has room for."""


def start(path: Path | None, overrides: Sequence[str]) -> None:
    """Measure a configuration."""
    config, options = load_smoothness(path, overrides)
    for message in idle_options(config):
        print(f"warning: {message}", file=sys.stderr)
    _measure(config, options, None)


def resume(folder: Path) -> None:
    """Continue a folder."""
    config, options = saved_options(folder)
    _measure(config, options, folder)


def show_plan(path: Path | None, overrides: Sequence[str]) -> None:
    """Print what would be measured and what it costs."""
    from zofo.optim.methods import METHODS
    from zofo.run.plan import make_plan
    from zofo.saved.source import base_of
    from zofo.smoothness.blocks import blocks_of
    from zofo.tasks.load import load_splits

    config, options = load_smoothness(path, overrides)
    new_folder(config)  # says now what would keep the run from being written
    plan = make_plan(config)
    options = options.model_copy(update={"rows": min(options.rows, plan.num_rows["train"])})
    base = base_of(config, load_splits(config.task, seed=config.seed))
    model = base.empty()
    num_parts = sum(block.is_part for block in blocks_of(model, options.split).values())
    orders = METHODS[config.method]
    costs = planned_forwards(
        options,
        plan.steps,
        num_moving=sum(order != "frozen" for order in (orders.base, orders.adapter)),
        num_blocks=1 + orders.needs_adapter,
        num_parts=num_parts,
    )
    in_batches = options.rows / config.batch_size
    console = _console()
    table = RichTable("what", "when", "forwards of the rows", title=f"{options.rows} rows measured")
    steps = point_steps(options, plan.steps)
    when = {"path": f"every {path_steps(options, plan.steps)} steps of {plan.steps}"}
    for what, cost in costs.items():
        if cost:
            table.add_row(what, when.get(what, f"after steps {steps}"), f"{cost:,.0f}")
    console.print(table)
    total = sum(costs.values()) * in_batches
    console.print(
        f"about {total:,.0f} forward-equivalents of {config.batch_size} rows to measure"
        + (f", {plan.forward_equivalents:,} to train" if options.train else ", no training")
    )
    numbers = sum(total for _, _, total in plan.num_parameters.values())
    gib = 4 * numbers / 2**30
    kept = min(options.memory_bytes / 2**30, gib * options.lanczos_steps)
    console.print(
        f"memory beside training: about {4 * gib + kept:.2f} GiB (copy, point and two gradients, "
        f"Lanczos {kept:.2f}) and the graph of the gradient on {options.row_batch or options.rows} "
        "rows"
    )


def _measure(config: RunConfig, options: SmoothnessOptions, folder: Path | None) -> None:
    started: list[Path] = []
    try:
        found = measure_run(
            config,
            options,
            resume=folder,
            console=Console(stderr=True),
            on_start=started.append,
            stop=StopOnSignal(),
        )
    except KeyboardInterrupt as error:
        where = started[0] if started else folder
        print(
            "interrupted before anything was written"
            if where is None
            else "interrupted; what was measured is kept. Continue with: zofo smoothness --resume "
            + shlex.quote(str(where)),
            file=sys.stderr,
        )
        code = error.exit_code if isinstance(error, TrainingInterrupt) else EXIT_INTERRUPTED
        raise typer.Exit(code) from None
    show(found)


def show(folder: Path) -> None:
    """Print what a folder's measurements say."""
    summary = read_json(folder / FILE)
    console = _console()
    for title, table in (
        ("spectra", constants_table(summary)),
        ("along the path", fits_table(summary)),
        ("what the theory assumes, on this path", claims_table(summary["claims"])),
    ):
        if table.rows:
            console.print(_rich(table, title))
    console.print(f"measurements {folder / FILE}", soft_wrap=True)
    console.print(f"page         {folder / PAGE_FILE}", soft_wrap=True)


def _rich(table: Table, title: str) -> RichTable:
    shown = RichTable(box=None, pad_edge=False, title=title, title_justify="left")
    kept = [i for i, column in enumerate(table.columns) if column.key not in _LEFT_OUT]
    for i in kept:
        column = table.columns[i]
        shown.add_column(printable(column.title), justify="right" if column.is_number else "left")
    for row in table.rows:
        shown.add_row(*(printable(f"{row[i].text} {row[i].aside}".strip()) for i in kept))
    return shown


def _console() -> Console:
    return Console(highlight=False, width=None if sys.stdout.isatty() else _PLAIN_WIDTH)
