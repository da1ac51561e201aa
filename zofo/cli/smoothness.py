"""`zofo smoothness`: measure the curvature of a loss along a run or at its start."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table as RichTable

from zofo.cli.exits import Overrides, app, exit_code_of, reports_errors, split_arguments
from zofo.cli.output import rich_table, stdout_console, warn_of_idle_options
from zofo.console import plain_console, say
from zofo.errors import UserError

if TYPE_CHECKING:
    from zofo.config.schema import RunConfig
    from zofo.smoothness.options import SmoothnessOptions

_PAGE_ONLY = ("stable_rank", "rounding", "num_parameters")  # A terminal has no room for them.


@app.command()
@reports_errors
def smoothness(
    arguments: Overrides = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Show the plan of the measurements with its cost.")
    ] = False,
    resume: Annotated[
        Path | None, typer.Option("--resume", help="Folder to continue.", metavar="FOLDER")
    ] = None,
) -> None:
    """Measure the curvature of the loss in base and adapter, and test the theory's assumptions.

    zofo smoothness configs/smoothness.yaml

    zofo smoothness model=minilm task=rotten-tomatoes steps=60 smoothness.split=layer

    zofo smoothness smoothness.train=false
    """
    from zofo.smoothness.measure import saved_options
    from zofo.smoothness.options import load_smoothness

    path, overrides = split_arguments(arguments)
    if resume is not None:
        others = [o for o in overrides if not o.startswith("model.trust_remote_code=")]
        if path is not None or others:
            raise UserError(
                "--resume uses the options of the folder; remove all other arguments but "
                "model.trust_remote_code=true"
            )
        _measure(*saved_options(resume, overrides), resume)
        return
    config, options = load_smoothness(path, overrides)
    if dry_run:
        _show_plan(config, options)
        return
    warn_of_idle_options(config)
    _measure(config, options, None)


def _show_plan(config: RunConfig, options: SmoothnessOptions) -> None:
    from zofo.optim.methods import METHODS
    from zofo.run.plan import make_plan
    from zofo.run.prepare import check_folder
    from zofo.saved.source import base_of
    from zofo.smoothness.blocks import blocks_of
    from zofo.smoothness.options import path_steps, planned_forwards, point_steps
    from zofo.tasks.load import load_splits

    check_folder(config)
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
    in_batches = options.rows / config.batch_size  # A forward-equivalent is a pass of one batch.
    console = stdout_console()
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
    gib = 4 * numbers / 2**30  # one vector over all weights, in float32
    kept = min(options.memory_bytes / 2**30, gib * options.lanczos_steps)
    console.print(
        f"memory in addition to training: about {4 * gib + kept:.2f} GiB (copy, point and two "
        f"gradients, Lanczos {kept:.2f}) and the graph of the gradient on "
        f"{options.row_batch or options.rows} rows"
    )


def _measure(config: RunConfig, options: SmoothnessOptions, folder: Path | None) -> None:
    from zofo.smoothness.measure import measure_run
    from zofo.trainer.interrupt import StopOnSignal

    started: list[Path] = []
    try:
        found = measure_run(
            config,
            options,
            resume=folder,
            console=plain_console(stderr=True),
            on_start=started.append,
            stop=StopOnSignal(),
        )
    except KeyboardInterrupt as error:
        where = started[0] if started else folder
        say(
            "interrupted before anything was written"
            if where is None
            else "interrupted; what was measured is kept. Continue with: zofo smoothness --resume "
            + shlex.quote(str(where)),
            stderr=True,
        )
        raise typer.Exit(exit_code_of(error)) from None
    _show(found)


def _show(folder: Path) -> None:
    """Print the measurements of a folder as tables."""
    from zofo.disk.files import read_json
    from zofo.smoothness.measure import PAGE_FILE
    from zofo.smoothness.summary import FILE
    from zofo.smoothness.tables import claims_table, constants_table, fits_table

    summary = read_json(folder / FILE)
    console = stdout_console()
    for title, table in (
        ("spectra", constants_table(summary)),
        ("along the path", fits_table(summary)),
        ("what the theory assumes, on this path", claims_table(summary["claims"])),
    ):
        if table.rows:
            console.print(rich_table(table, _PAGE_ONLY, title))
    console.print(f"measurements {folder / FILE}", soft_wrap=True)
    console.print(f"page         {folder / PAGE_FILE}", soft_wrap=True)
