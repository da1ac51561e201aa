"""Prints the tables of a benchmark."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.table import Table

from zofo.bench.results import (
    NOISE_RATIOS,
    STEP_RATIOS,
    Memory,
    NoiseTimes,
    Results,
    StepTimes,
    ratios_of,
)

_MIB = 2**20
_WIDE = 150  # A terminal with as many columns also has room for the descriptions.


def show(results: Results, console: Console) -> None:
    """Print the tables of all measurements so far."""
    settings, facts = results.settings, results.model
    if facts:
        console.print(
            f"{settings.model}: {facts['num_parameters'] / 1e6:,.1f} M weights, "
            f"{settings.adapter} {facts['num_adapter_parameters'] / 1e6:,.2f} M; "
            f"batch {settings.batch} × {settings.length}, {settings.dtype}, "
            f"{f'base in {settings.quantization}, ' if settings.quantization else ''}"
            f"{results.environment['device']}"
        )
    for steps in results.steps:
        _show_steps(steps, results.memory, console)
    if results.memory is not None and results.memory.contenders:
        _show_memory(results.memory, facts["largest_layer_bytes"], console)
    for noise in results.noise:
        _show_noise(noise, results, console)
    if not results.is_complete:
        console.print("interrupted: not everything was measured")


def _show_steps(times: StepTimes, memory: Memory | None, console: Console) -> None:
    done = max(map(len, times.seconds.values()), default=0)
    columns = ["contender", "s", "min", "max", "forward equivalents", "peak MiB", "state MiB"]
    is_wide = console.width >= _WIDE
    table = _table(
        console,
        f"one step, {times.threads} thread(s), median of {done} rounds",
        [*columns, "what"] if is_wide else columns,
        left=(0, 7),
    )
    for name, row in times.rows.items():
        samples = times.seconds.get(name, [])
        peak = memory.contenders.get(name, {}).get("peak") if memory is not None else None
        cells = [*_seconds(samples), str(row.forward_equivalents)]
        cells += [_mebibytes(peak), _mebibytes(row.state_bytes)]
        table.add_row(name, *cells, *([row.what] if is_wide else []))
    console.print(table)
    for name, why in times.failed.items():
        console.print(f"  {name} was not timed: {why}")
    _show_ratios(
        "time over time (less is better for the first)",
        ratios_of(STEP_RATIOS, times.seconds),
        console,
    )


def _show_memory(memory: Memory, layer_bytes: int, console: Console) -> None:
    parts = ("peak", "libraries", "kernels", "model", "step", "optimizer_state")
    table = _table(
        console,
        "peak memory, MiB, a process each",
        ("contender", "peak", "libraries", "kernels", "model", "step", "state"),
        left=(0,),
    )
    for name, row in memory.contenders.items():
        table.add_row(name, *(_mebibytes(row.get(part)) for part in parts))
    console.print(table)
    for name, row in memory.contenders.items():
        if "failed" in row:
            console.print(f"  {name} was not measured: {row['failed']}", markup=False)
    if memory.kernels_bytes is not None:
        console.print(
            f"code of the noise kernels, resident once per process for any model: "
            f"{memory.kernels_bytes / _MIB:.1f} MiB"
        )
    console.print(f"largest layer: {layer_bytes / _MIB:.1f} MiB")
    for label, value in memory.ratios(layer_bytes).items():
        console.print(f"  {label:<58}{value:7.3f}")


def _show_noise(times: NoiseTimes, results: Results, console: Console) -> None:
    settings = results.settings
    table = _table(
        console,
        f"noise kernels, {times.threads} thread(s), {settings.elements:,} elements, "
        f"{settings.dtype}, median of {max(map(len, times.seconds.values()), default=0)} rounds",
        ("kernel", "ms", "min", "max", "MiB moved", "GB/s"),
        left=(0,),
    )
    for name, size in times.num_bytes.items():
        rate = times.rate(name)
        table.add_row(
            name,
            *_seconds(times.seconds.get(name, []), 1e3),
            _mebibytes(size),
            "" if rate is None else f"{rate:.2f}",
        )
    console.print(table)
    _show_ratios(
        "speed over speed (more is better for the first)",
        ratios_of(NOISE_RATIOS, times.seconds),
        console,
    )


def _show_ratios(title: str, ratios: Mapping[str, dict[str, Any]], console: Console) -> None:
    if not ratios:
        return
    console.print(f"{title}, median of the rounds' ratios [min, max]", markup=False)
    for label, found in ratios.items():
        console.print(
            f"  {label:<42}{found['median']:7.3f}  [{found['min']:.3f}, {found['max']:.3f}]",
            markup=False,
        )


def _table(console: Console, title: str, columns: Sequence[str], *, left: tuple[int, ...]) -> Table:
    """An empty table, with rules on a terminal and without them elsewhere."""
    table = Table(title=title, title_justify="left")
    if not console.is_terminal:
        table.box = None
    for i, column in enumerate(columns):
        # The longest word sets the least width, so that rich wraps headings but cuts no number.
        width = max(map(len, column.split()))
        table.add_column(column, justify="left" if i in left else "right", min_width=width)
    return table


def _seconds(samples: list[float], scale: float = 1.0) -> list[str]:
    from statistics import median

    if not samples:
        return ["", "", ""]
    return [f"{scale * f(samples):.4g}" for f in (median, min, max)]


def _mebibytes(size: int | None) -> str:
    return "" if size is None else f"{size / _MIB:,.1f}"
