"""`zofo bench`: measure what a step costs, print the tables and write the JSON."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from zofo.cli.exits import app, exit_code_of, reports_errors
from zofo.console import plain_console, say
from zofo.errors import UserError

if TYPE_CHECKING:
    from zofo.bench.settings import Settings

_PLAIN_WIDTH = 160  # Without a terminal, as many columns show every cell in full.


@app.command()
@reports_errors
def bench(
    overrides: Annotated[
        list[str] | None,
        typer.Argument(metavar="[KEY=VALUE]...", help="Values that override CONFIG."),
    ] = None,
    model: Annotated[
        str, typer.Option(help="Hub id, folder, alias, random:llama-135m or random:llama-1b.")
    ] = "smollm2-135m",
    adapter: Annotated[str, typer.Option(help="Kind of adapter, such as lora or prompt.")] = "lora",
    batch: Annotated[int, typer.Option(help="Number of rows in the batch.")] = 8,
    length: Annotated[int, typer.Option(help="Number of tokens per row.")] = 32,
    dtype: Annotated[str, typer.Option(help="float32, bfloat16 or float16.")] = "float32",
    quantization: Annotated[
        str | None, typer.Option(help="Hold the base in nf4, fp4 or int8.")
    ] = None,
    device: Annotated[str, typer.Option(help="Device: auto, cpu, cuda or mps.")] = "auto",
    threads: Annotated[
        str | None,
        typer.Option(help="CPU threads. 1,2 measures with 1 and with 2. Default: torch's number."),
    ] = None,
    distribution: Annotated[str, typer.Option(help="As of zofo train.")] = "rademacher",
    rounds: Annotated[int, typer.Option(help="Number of samples of each contender.")] = 7,
    only: Annotated[str | None, typer.Option(help="Contenders, with commas. Default: all.")] = None,
    elements: Annotated[int, typer.Option(help="Size of the noise kernels' weight.")] = 1 << 25,
    noise_only: Annotated[
        bool, typer.Option("--noise-only", help="Measure only the noise kernels.")
    ] = False,
    no_noise: Annotated[bool, typer.Option("--no-noise", help="Skip the noise kernels.")] = False,
    no_memory: Annotated[bool, typer.Option("--no-memory", help="Skip the peak memory.")] = False,
    json_file: Annotated[
        Path | None, typer.Option("--json", help="JSON file for samples, ratios and environment.")
    ] = None,
    whole_run: Annotated[
        str | None,
        typer.Option(
            "--whole-run",
            metavar="CONFIG",
            help="Measure only the peak memory of a whole run of this configuration, by phase.",
        ),
    ] = None,
    wire: Annotated[
        bool,
        typer.Option("--wire", help="Count only the bytes that a step of several processes sends."),
    ] = False,
    processes: Annotated[
        int, typer.Option(help="With --wire: number of processes, each with its own batch.")
    ] = 2,
    memory_of: Annotated[str | None, typer.Option(hidden=True)] = None,
) -> None:
    """Measure time and memory of a step of every method, and the speed of the noise kernels.

    zofo bench --threads 1,2 --json bench.json

    zofo bench --device cuda --model random:llama-1b --dtype bfloat16 --json gpu.json

    zofo bench --whole-run configs/demo.yaml steps=8 task.num_train=64

    zofo bench --wire --processes 2 --json wire.json
    """
    if wire:
        others: dict[str, object] = {
            "--whole-run": whole_run,
            "--only": only,
            "--noise-only": noise_only,
        }
        others |= {"--no-noise": no_noise, "--no-memory": no_memory, "KEY=VALUE": overrides}
        for name, value in others.items():
            if value:
                raise UserError(f"{name} has no effect with --wire; drop one of them")
    elif processes != 2:
        raise UserError(f"--processes {processes} has an effect only with --wire")
    if whole_run is not None:
        _measure_whole_run(whole_run, overrides or [], memory_of, json_file)
        return
    if overrides:
        raise UserError(f"{overrides[0]!r} has an effect only with --whole-run CONFIG")
    from zofo.bench.settings import settings_from

    if noise_only and no_noise:
        raise UserError("--noise-only and --no-noise leave nothing to measure; drop one of them")
    settings = settings_from(
        model=model,
        adapter=adapter,
        batch=batch,
        length=length,
        dtype=dtype,
        quantization=quantization,
        device=device,
        threads=threads,
        distribution=distribution,
        rounds=rounds,
        only=only,
        elements=elements,
        steps=not noise_only,
        memory=not (no_memory or noise_only),
        noise=not no_noise,
        json_file=json_file,
    )
    if wire:
        _count_bytes(settings, processes, json_file)
        return
    if memory_of is None:
        _measure(settings, json_file)
    else:  # This process was started by `zofo.bench.memory.measure`.
        from zofo.bench.memory import measure_here

        say(json.dumps(measure_here(settings, memory_of)))


def _measure(settings: Settings, json_file: Path | None) -> None:
    """Measure what the settings ask for; Ctrl-C shows and writes what was measured until then."""
    from zofo.bench.report import show
    from zofo.bench.results import Results
    from zofo.bench.run import bench as measure
    from zofo.disk.files import write_json

    results = Results(settings)
    code = 0
    try:
        measure(settings, results, plain_console(stderr=True))
    except KeyboardInterrupt as error:
        code = exit_code_of(error)
    width = None if sys.stdout.isatty() else _PLAIN_WIDTH
    show(results, plain_console(width=width))
    if json_file is not None:
        write_json(json_file, results.as_dict())
        say(f"samples, ratios and environment in {json_file}", stderr=True)
    if code:
        raise typer.Exit(code)


def _measure_whole_run(
    config: str, overrides: list[str], part: str | None, json_file: Path | None
) -> None:
    from zofo.bench import whole_run
    from zofo.config.load import load_config
    from zofo.disk.files import write_json

    if part is not None:  # This process was started by `whole_run.measure`.
        say(json.dumps(whole_run.measure_here(config, part, overrides)))
        return
    found = whole_run.measure(load_config(config, overrides=overrides), plain_console(stderr=True))
    whole_run.show(found, plain_console())
    if json_file is not None:
        write_json(json_file, found)


def _count_bytes(settings: Settings, num_processes: int, json_file: Path | None) -> None:
    from zofo.bench import wire
    from zofo.disk.files import write_json

    found = wire.measure(settings, num_processes, plain_console(stderr=True))
    wire.show(found, plain_console(width=None if sys.stdout.isatty() else _PLAIN_WIDTH))
    if json_file is not None:
        write_json(json_file, found)
