"""`zofo advise`: measure the learning rates and the smoothing radius before a run."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table

from zofo.cli.exits import Overrides, app, reports_errors, split_arguments
from zofo.cli.output import stdout_console, warn_of_idle_options
from zofo.console import plain_console
from zofo.errors import UserError

if TYPE_CHECKING:
    from zofo.advice.setting import Advice
    from zofo.config.schema import RunConfig


@app.command()
@reports_errors
def advise(
    arguments: Overrides = None,
    caps: Annotated[
        str | None,
        typer.Option(
            help="Whether the theorem's upper limits lower the rates: ignore or apply. Default: "
            "apply with --target, else ignore. The output always shows the limits."
        ),
    ] = None,
    target: Annotated[
        float | None,
        typer.Option(help="Gradient norm to reach. The theorem gives the epochs that it takes."),
    ] = None,
    split: Annotated[
        bool,
        typer.Option("--split/--no-split", help="Measure one rate per group of base modules."),
    ] = True,
    json_file: Annotated[
        Path | None, typer.Option("--json", help="JSON file for the values and the measurements.")
    ] = None,
) -> None:
    """Measure the learning rates and the smoothing radius (eps) that suit a run.

    zofo advise configs/demo.yaml

    zofo advise task=boolq adapter=prompt steps=500 --json advice.json
    """
    import torch

    from zofo.advice.present import as_json
    from zofo.config.load import load_config
    from zofo.console import new_progress
    from zofo.disk.files import problem_of_target, write_json
    from zofo.run.auto import advise_on
    from zofo.run.prepare import prepare

    path, overrides = split_arguments(arguments)
    if caps not in (None, "ignore", "apply"):
        raise UserError(f"--caps is {caps!r}; choose ignore or apply")
    # A wrong option or target file is reported now, because the measurements take minutes.
    if target is not None and not 0 < target < float("inf"):
        raise UserError(f"--target is {target:g}; it must be a positive norm of the gradient")
    problem = None if json_file is None else problem_of_target(json_file)
    if problem is not None:
        raise UserError(f"the JSON file {problem}")
    chosen: Any = caps or ("ignore" if target is None else "apply")
    config = _everything_auto(load_config(path, overrides))
    warn_of_idle_options(config)
    if config.num_threads is not None:
        torch.set_num_threads(config.num_threads)
    began = time.monotonic()
    prepared = prepare(config)
    with new_progress(plain_console(stderr=True), "") as progress:
        task = progress.add_task("advice", total=None, text="")
        advice = advise_on(
            config,
            prepared,
            caps=chosen,
            target=target,
            split=split,
            report=lambda what, cost: progress.update(task, text=what),
        )
    seconds = time.monotonic() - began
    _show(advice, seconds)
    if json_file is not None:
        write_json(json_file, {**as_json(advice), "seconds": round(seconds, 3)})


def _everything_auto(config: RunConfig) -> RunConfig:
    """The configuration with `auto` for every rate and radius that its method uses.

    A map of rates stays, because it decides which weights are frozen.

    Raises:
        UserError: if the zeroth-order block follows accuracy or F1.
    """
    from zofo.config.load import load_config
    from zofo.config.schema import AUTO, AUTO_KEYS
    from zofo.optim.methods import METHODS

    orders = METHODS[config.method]
    if config.zo_objective != "loss" and orders.zeroth:
        raise UserError(
            f"zo_objective is {config.zo_objective}, and the advice measures the training "
            "loss; set zo_objective=loss to be advised for that, or choose rates by hand"
        )
    values = config.model_dump()
    values |= {key: AUTO for key in AUTO_KEYS if not isinstance(values[key], dict)}
    if not orders.needs_adapter:
        del values["adapter"]
    if values["steps"] is None:
        del values["steps"]
    return load_config(values=values, trust_remote_code=config.model.trust_remote_code)


def _show(advice: Advice, seconds: float) -> None:
    """Print the advice as tables and sentences."""
    from zofo.advice.present import cap_lines, reason_of
    from zofo.config.schema import AUTO, AUTO_KEYS

    console = stdout_console(100)
    setting = advice.setting
    table = Table("key", "value", "because", title=f"advice for {setting.num_steps} steps")
    for key in AUTO_KEYS:
        value = getattr(advice, key)
        if getattr(setting, key) != AUTO or value is None:
            continue
        text = f"{value:g}"
        if isinstance(value, dict):  # one rate for each pattern of weight names
            text = "\n".join(f"{pattern}: {rate:g}" for pattern, rate in value.items())
        table.add_row(key, text, reason_of(advice, key))
    console.print(table)
    if advice.at_start is not None:
        titles = ("zeroth-order block", "‖∇f‖²", "row noise S", "tr H", "κ")
        measured = Table(*titles, title="measured")
        for name, found in (("at the start", advice.at_start), ("later", advice.at_later)):
            if found is not None:
                cells = found.intervals().values()
                measured.add_row(name, *(f"{cell:.2g}" for cell in cells))
        console.print(measured)
    if advice.first is not None:
        runs = Table("rate", "loss, held aside", "score", title="short trainings")
        still = advice.first.runs[0].start  # Every short training starts from the same weights.
        runs.add_row("0", f"{still.held.mean():.4f}", f"{still.score:.4f}")
        for run in advice.first.runs:
            if run.blew_up:
                runs.add_row(f"{run.rate:.2g}", "not finite", "")
            else:
                change = f"{run.start.held.mean():.4f} → {run.held.mean():.4f}"
                score = f"{run.score:.4f}, harm" if run.is_harmful else f"{run.score:.4f}"
                runs.add_row(f"{run.rate:.2g}", change, score)
        console.print(runs)
    for line in (*advice.remarks, *cap_lines(advice)):
        console.print(line, markup=False, soft_wrap=True)
    share = advice.cost / setting.forwards_of_run
    console.print(
        f"{advice.cost:.0f} forward-equivalents, {share:.0%} of the run's "
        f"{setting.forwards_of_run:.0f}; {seconds:.0f} s",
        soft_wrap=True,
    )
