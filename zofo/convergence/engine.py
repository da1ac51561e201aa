"""The hybrid step on a problem, for many seeds and many rates side by side.

    s_k = (f_i(x + eps v_k, y) − f_i(x, y)) / eps            or the central difference
    x  ← x − η_x mean_k s_k v_k ;   y ← y − η_y ∇_y f_i(x, y)        both from the same point

All rates of a seed see the samples and the directions that `zofo.HybridOptimizer` would see with
that seed: directions have the same Philox addresses, and orders come from
`zofo.optim.reshuffle.epoch_order`. `zofo.convergence.reference` runs the optimizer itself. The
tests compare the two.

The engine measures exactly what the theorem bounds: (1/T) Σ_t ‖∇f(x_t, y_t)‖², with the whole
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
"""A run stops at this many times the ‖∇f‖² of the start, and then counts as infinite."""
USED_KEYS: Final = ("base_order", "sampling", "estimator", "distribution", "num_directions", "eps")
"""The options of a `Setting` that the engines use; a cell's file and its digest contain them."""


@dataclass(kw_only=True)
class Setting(StepOptions):
    """How the base moves, and the order of the samples.

    The engines use the step options in `USED_KEYS`. They refuse a value of any other option.

    Attributes:
        base_order: "zeroth", or "first" for the exact gradient in both blocks.
        sampling: "reshuffle", "shuffle-once" or "with-replacement".
        distribution: distribution of the directions; the default is the paper's.
        eps: smoothing radius; the default is so small that curvature has no visible effect.
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
        if self.distribution == "rank-one":
            raise UserError(
                "distribution is rank-one, and the blocks of these problems are vectors, which "
                "have no rank; choose gaussian or rademacher"
            )

    def as_dict(self) -> dict[str, float | str]:
        """The options that determine the numbers of a cell."""
        return {key: getattr(self, key) for key in USED_KEYS}


@dataclass
class Traces:
    """The results of a set of runs after some numbers of epochs T; infinite once a run diverged.

    Attributes:
        checkpoints: T, ascending.
        mean_x, mean_y: (1/T) Σ ‖∇_x f‖² and (1/T) Σ ‖∇_y f‖² over the starts of the first T epochs,
            [T, rates, seeds].
        last: ‖∇f‖² after T epochs, [T, rates, seeds].
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
    """Sample indices of a block of epochs: int32, [epochs, seeds, n]."""
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
    """
    from zofo.convergence import kernels

    kind, params, data, mean_row = problem.compiled()
    common = (kind, problem.d_x, params, data)
    shape = (len(rates), len(seeds))
    # Point and state of every run; the kernels write both in place.
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
        # All runs have the same start. The small constant lets a run begin at a minimum.
        if epoch == 0:
            limit = DIVERGED * max(float(squares.sum(0).max()), 1e-12)
        if epoch in checkpoints:
            known = np.where(lost, np.inf, sums / max(epoch, 1))
            found.append((known, np.where(lost, np.inf, squares.sum(0))))
        sums += squares  # after the report, so that a mean covers the starts of finished epochs
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
