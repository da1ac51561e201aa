"""A cell of the study: one problem in one setting, over a grid of rates and some seeds.

A finished cell is one safetensors file, which is written completely or not at all. The file also
holds the description of its cell. A stopped study therefore continues with the missing cells. The
file's name contains a digest of the description, so a cell with other seeds or another engine has
another file.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Final, Literal

import numpy as np
import torch

from zofo.convergence import engine, reference
from zofo.convergence.engine import Setting
from zofo.convergence.problems import make_problem
from zofo.disk.files import json_digest, read_tensors, write_tensors
from zofo.errors import UserError

Engine = Literal["compiled", "optimizer"]
ENGINES: Final = {"compiled": engine.run, "optimizer": reference.run}
FORMAT: Final = 1
"""Increase this number whenever the numbers of a cell would change."""


@dataclass(frozen=True)
class Rates:
    """A grid of learning rates, evenly spaced on a logarithmic scale.

    Attributes:
        low, high: exponents of 2, both ends included.
        per_octave: rates per factor of 2.
        times_x: η_x is this many times the rate.
        times_y: η_y is this many times the rate.
        high_y: if given, η_x and η_y vary independently: η_x from 2^low to 2^high, η_y from 2^low
            to 2^high_y.
    """

    low: float
    high: float
    per_octave: int = 2
    times_x: float = 1.0
    times_y: float = 1.0
    high_y: float | None = None

    def _axis(self, high: float) -> list[float]:
        num = round((high - self.low) * self.per_octave) + 1
        return [2.0 ** (self.low + i / self.per_octave) for i in range(num)]

    def pairs(self) -> list[tuple[float, float]]:
        """Pairs (η_x, η_y), ascending."""
        if self.high_y is None:
            return [(r * self.times_x, r * self.times_y) for r in self._axis(self.high)]
        return [(a, b) for a in self._axis(self.high) for b in self._axis(self.high_y)]


@dataclass(frozen=True)
class AnyCell:
    """The part that all kinds of cells share.

    Attributes:
        experiment: the experiment that the cell belongs to.
        labels: what varies within the experiment, name -> value.
        problem: a name in `PROBLEMS`.
        options: options of the problem.
    """

    experiment: str
    labels: Mapping[str, float | str]
    problem: str
    options: Mapping[str, Any]

    @property
    def name(self) -> str:
        """Experiment and labels, as part of a file name."""
        return ",".join([self.experiment, *(f"{k}={v}" for k, v in self.labels.items())])


@dataclass(frozen=True)
class Cell(AnyCell):
    """Runs of one problem.

    Attributes:
        setting: how the problem is run.
        rates: the grid of rates.
        checkpoints: numbers of epochs T, ascending.
        num_seeds: the seeds are 0, 1, ..., num_seeds − 1.
    """

    setting: Setting
    rates: Rates
    checkpoints: tuple[int, ...]
    num_seeds: int

    @property
    def num_steps(self) -> int:
        """Steps of one run."""
        # 8 is the default number of samples of the problems that the study runs.
        return self.checkpoints[-1] * int(self.options.get("num_samples", 8))

    def run(
        self, engine_name: Engine, on_progress: Callable[[float], None] | None = None
    ) -> dict[str, np.ndarray]:
        """Run the cell. Arrays: `mean_x`, `mean_y` and `last` [T, rates, seeds], and `rates`."""
        pairs = self.rates.pairs()
        total = self.checkpoints[-1]
        problem = make_problem(self.problem, **self.options)
        traces = ENGINES[engine_name](
            problem,
            self.setting,
            pairs,
            range(self.num_seeds),
            self.checkpoints,
            on_epoch=None if on_progress is None else lambda epoch: on_progress(epoch / total),
        )
        # ‖∇_x f‖² and ‖∇_y f‖² at the start, relative to which a run counts as diverged.
        start = problem.gradient(problem.start()).square()
        return {
            "mean_x": traces.mean_x,
            "mean_y": traces.mean_y,
            "last": traces.last,
            "rates": np.array(pairs),
            "checkpoints": np.array(self.checkpoints),
            "start": np.array([float(part.sum()) for part in problem.split(start)]),
        }


@dataclass
class Result:
    """A finished cell, the arrays of its `run` and the duration; `cache` keeps its tuned values."""

    cell: Any
    arrays: dict[str, np.ndarray]
    elapsed_s: float = 0.0
    cache: dict[Any, Any] = field(default_factory=dict)

    @property
    def checkpoints(self) -> np.ndarray:
        """Numbers of epochs T, ascending."""
        return self.arrays["checkpoints"]


def _content(cell: Any) -> dict[str, Any]:
    """The description of a cell in its file."""
    # Only the options that the engines use count, so that a new option keeps old files valid.
    own = {"setting": cell.setting.as_dict()} if isinstance(cell, Cell) else {}
    return asdict(cell) | own


def digest_of(cell: Any, engine_name: str) -> str:
    """Digest of everything that determines the numbers of a cell."""
    return json_digest({"cell": _content(cell), "engine": engine_name, "format": FORMAT})


def path_of(folder: Path, cell: Any, engine_name: str) -> Path:
    """Path of a cell's file."""
    return folder / "cells" / f"{cell.name},{digest_of(cell, engine_name)[:8]}.safetensors"


def finish(
    folder: Path, cell: Any, engine_name: Engine, on_progress: Callable[[float], None] | None = None
) -> Result:
    """Run a cell and write its file.

    Raises:
        UserError: if the file cannot be written.
    """
    began = time.monotonic()
    arrays = cell.run(engine_name, on_progress)
    elapsed = time.monotonic() - began
    metadata = {
        "digest": digest_of(cell, engine_name),
        "cell": json.dumps(_content(cell)),
        "engine": engine_name,
        "elapsed_s": f"{elapsed:.3f}",
    }
    tensors = {name: torch.from_numpy(np.ascontiguousarray(a)) for name, a in arrays.items()}
    write_tensors(path_of(folder, cell, engine_name), tensors, metadata)
    return Result(cell, arrays, elapsed)


def read(folder: Path, cell: Any, engine_name: Engine) -> Result | None:
    """Read a finished cell; None if its file is missing, damaged or of another cell."""
    try:
        tensors, metadata = read_tensors(path_of(folder, cell, engine_name))
    except UserError:
        return None
    # The file's name has only a part of the digest; the whole digest is compared here.
    if metadata.get("digest") != digest_of(cell, engine_name):
        return None
    arrays = {name: tensor.numpy() for name, tensor in tensors.items()}
    return Result(cell, arrays, float(metadata["elapsed_s"]))
