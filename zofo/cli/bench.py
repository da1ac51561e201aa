"""`zofo bench`: measure, print the tables, write the JSON."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import typer
from rich.console import Console

from zofo.bench.memory import measure_here
from zofo.bench.report import show
from zofo.bench.results import Results
from zofo.bench.run import bench as measure
from zofo.bench.settings import Settings
from zofo.cli.app import EXIT_INTERRUPTED
from zofo.disk.files import write_json

_PLAIN_WIDTH = 160
"""Columns where no terminal says how wide it is, so that no cell is cut."""


def bench(settings: Settings, json_file: Path | None) -> None:
    """Measure what the settings ask for; Ctrl-C keeps what was measured."""
    results = Results(settings)
    code = 0
    try:
        measure(settings, results, Console(stderr=True))
    except KeyboardInterrupt:
        code = EXIT_INTERRUPTED
    width = None if sys.stdout.isatty() else _PLAIN_WIDTH
    show(results, Console(highlight=False, width=width))
    if json_file is not None:
        write_json(json_file, results.as_dict())
        print(f"samples, ratios and environment in {json_file}", file=sys.stderr)
    if code:
        raise typer.Exit(code)


def memory_of(settings: Settings, name: str) -> None:
    """Print the memory of one contender, measured in this process."""
    print(json.dumps(measure_here(settings, name)))
