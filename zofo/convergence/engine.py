"""The hybrid step on a problem, for many seeds and many rates side by side.

    s_k = (f_i(x + eps v_k, y) − f_i(x, y)) / eps            or the central difference
    x  ← x − η_x mean_k s_k v_k ;   y ← y − η_y ∇_y f_i(x, y)        both from the same point

All rates of a seed see the same samples and the same directions, as they would in runs of
`zofo.HybridOptimizer` with that seed: directions have the same Philox addresses, orders come from
`zofo.optim.reshuffle.epoch_order`. The tests run both and compare;
`zofo.convergence.reference` is the slow twin that runs the optimizer itself.

What is measured is what the theorem bounds, exactly: (1/T) Σ_t ‖∇f(x_t, y_t)‖² with the whole
gradient at the start of every epoch t.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Final, Literal

import numpy as np

from zofo.convergence.problems.base import QUADRATIC, Problem
from zofo.errors import UserError
from zofo.noise.combine import Distribution
from zofo.optim.options import STEP_KEYS, StepOptions
from zofo.optim.reshuffle import Sampling, epoch_order

_BLOCK: Final = 64
"""Epochs whose orders are drawn at a time."""
DIVERGED: Final = 1e12
"""A run whose ‖∇f‖² is this many times that of the start is given up: it counts as infinite."""
USED_KEYS: Final = (
    *("base_order", "sampling", "estimator", "distribution", "num_directions", "eps"),
)
"""What of a `Setting` the engines vary; a cell's file and its digest hold these."""


@dataclass(kw_only=True)
class Setting(StepOptions):
    """How the base is moved and in which order samples come.

    Of `StepOptions`, the engines take those in `USED_KEYS`; they refuse the others.

    Attributes:
        base_order: "zeroth", or "first" for the exact gradient in both blocks.
        sampling: "reshuffle", "shuffle-once" or "with-replacement".
        distribution: the paper's by default.
        eps: small by default, so that rounding and curvature do not show.
    """

    base_order: Literal["zeroth", "first"] = "zeroth"
    sampling: Sampling = "reshuffle"
    distribution: Distribution = "gaussian"
    eps: float = 1e-4

    def __post_init__(self) -> None:
        unused = [key for key in STEP_KEYS if key not in USED_KEYS]
        wrong = [key for key in unused if getattr(self, key) != getattr(StepOptions, key)]
        if wrong:
            raise UserError(f"the engine does not vary {', '.join(wrong)}; leave the default")

    def as_dict(self) -> dict[str, float | str]:
        """What a cell's file says of it."""
        return {key: getattr(self, key) for key in USED_KEYS}


@dataclass
class Traces:
    """What a set of runs did, at some numbers of epochs.

    Attributes:
        checkpoints: T, ascending.
        mean_x: (1/T) Σ ‖∇_x f‖² over the starts of the first T epochs, [T, rates, seeds]; infinite
            from the checkpoint on at which a run had diverged.
        mean_y: likewise of ∇_y f.
        last: ‖∇f‖² after T epochs, likewise.
        w: where the runs ended, [rates, seeds, d_x + d_y].
    """

    checkpoints: tuple[int, ...]
    mean_x: np.ndarray
    mean_y: np.ndarray
    last: np.ndarray
    w: np.ndarray

    @property
    def mean(self) -> np.ndarray:
        """(1/T) Σ ‖∇f‖²."""
        return np.asarray(self.mean_x + self.mean_y)


@lru_cache(maxsize=2048)
def _orders(num_samples: int, seeds: tuple[int, ...], block: int, sampling: Sampling) -> np.ndarray:
    """Sample indices of a block of epochs: int64, [epochs, seeds, n]."""
    epochs = range(block * _BLOCK, (block + 1) * _BLOCK)
    rows = [
        [epoch_order(num_samples, seed=s, epoch=e, sampling=sampling) for s in seeds]
        for e in epochs
    ]
    return np.array(rows, dtype=np.int32)


def run(
    problem: Problem,
    setting: Setting,
    rates: Sequence[tuple[float, float]],
    seeds: Sequence[int],
    checkpoints: Sequence[int],
    *,
    on_epoch: Callable[[int], None] | None = None,
) -> Traces:
    """Run every rate with every seed.

    Args:
        problem: the finite sum.
        setting: how it is run.
        rates: (η_x, η_y) pairs.
        seeds: of directions and orders.
        checkpoints: numbers of epochs to report at, ascending; the last ends the run.
        on_epoch: called after each epoch with their number.

    Returns:
        The traces.
    """
    from zofo.convergence import kernels

    kind, params, data, mean_row = problem.compiled()
    common = (kind, problem.d_x, params, data)
    shape = (len(rates), len(seeds))
    points = np.tile(problem.start().numpy(), (*shape, 1))
    lost, squares = np.zeros(shape, dtype=bool), np.zeros((2, *shape))
    lr_x, lr_y = (np.array([pair[i] for pair in rates], dtype=np.float64) for i in (0, 1))
    keys, num = np.array([*seeds], dtype=np.uint64), problem.num_samples
    how = (
        setting.base_order == "zeroth",
        setting.estimator == "central",
        setting.distribution == "gaussian",
        setting.num_directions,
        setting.eps,
    )
    sums, limit = np.zeros((2, *shape)), np.inf
    found: list[tuple[np.ndarray, np.ndarray]] = []
    for epoch in range(checkpoints[-1] + 1):
        kernels.measure(*common, mean_row, points, limit, lost, squares)
        if epoch == 0:
            limit = DIVERGED * max(float(squares.sum(0).max()), 1e-12)
        if epoch in checkpoints:
            known = np.where(lost, np.inf, sums / max(epoch, 1))
            found.append((known, np.where(lost, np.inf, squares.sum(0))))
        sums += squares
        if epoch < checkpoints[-1]:
            block = _orders(num, tuple(seeds), epoch // _BLOCK, setting.sampling)
            order = block[epoch % _BLOCK]
            is_fast = kind == QUADRATIC and setting.base_order == "zeroth"
            move = kernels.move_quadratic if is_fast else kernels.move
            move(common, (points, lost, lr_x, lr_y, keys, order, epoch * num), how)
            if on_epoch is not None:
                on_epoch(epoch + 1)
    means = np.stack([mean for mean, _ in found], axis=1)
    return Traces(
        tuple(checkpoints), means[0], means[1], np.stack([last for _, last in found]), points
    )
