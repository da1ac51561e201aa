"""The hybrid step on a problem, for many seeds and many rates side by side.

    s_k = (f_i(x + eps v_k, y) − f_i(x, y)) / eps            or the central difference
    x  ← x − η_x mean_k s_k v_k ;   y ← y − η_y ∇_y f_i(x, y)        both from the same point

A point is [rates, seeds, d]. All rates of a seed see the same samples and the same directions, as
they would in runs of `zofo.HybridOptimizer` with that seed: directions have the same Philox
addresses, orders come from `zofo.reshuffle.epoch_order`. The tests run both and compare.
`zofo.theory.convergence.reference` is the slow twin that runs the optimizer itself.

What is measured is what the theorem bounds, exactly: (1/T) Σ_t ‖∇f(x_t, y_t)‖² with the whole
gradient at the start of every epoch t.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Final, Literal

import numpy as np
import torch
from torch import Tensor

from zofo.estimator import Estimator
from zofo.noise import Distribution
from zofo.noise.seeds import directions_of_seeds
from zofo.reshuffle import Sampling, epoch_order
from zofo.theory.problems.base import Problem

_BLOCK_ELEMENTS: Final = 1 << 20
"""Directions are drawn ahead for as many steps as give about this many numbers."""
DIVERGED: Final = 1e12
"""A run whose ‖∇f‖² is this many times that of the start is given up: it counts as infinite."""


@dataclass(frozen=True)
class Setting:
    """How the base is moved and in which order samples come.

    Attributes:
        base_order: "zeroth", or "first" for the exact gradient in both blocks.
        sampling: "reshuffle", "shuffle-once" or "with-replacement".
        estimator: "forward" or "central".
        distribution: "gaussian" (the paper's) or "rademacher".
        num_directions: K.
        eps: smoothing radius; small by default, so that rounding and curvature do not show.
    """

    base_order: Literal["zeroth", "first"] = "zeroth"
    sampling: Sampling = "reshuffle"
    estimator: Estimator = "forward"
    distribution: Distribution = "gaussian"
    num_directions: int = 1
    eps: float = 1e-4


@dataclass
class Traces:
    """What a set of runs did, at some numbers of epochs.

    Attributes:
        checkpoints: T, ascending.
        mean_x: (1/T) Σ ‖∇_x f‖² over the starts of the first T epochs, [T, rates, seeds]; infinite
            from the checkpoint on at which a run had diverged.
        mean_y: likewise of ∇_y f.
        last: ‖∇f‖² after T epochs, likewise.
        x: where the runs ended, [rates, seeds, d_x].
        y: [rates, seeds, d_y].
    """

    checkpoints: tuple[int, ...]
    mean_x: np.ndarray
    mean_y: np.ndarray
    last: np.ndarray
    x: Tensor
    y: Tensor

    @property
    def mean(self) -> np.ndarray:
        """(1/T) Σ ‖∇f‖²."""
        return np.asarray(self.mean_x + self.mean_y)


@lru_cache(maxsize=64)
def orders(num_samples: int, seeds: tuple[int, ...], epoch: int, sampling: Sampling) -> Tensor:
    """Sample indices of one epoch: int64, [steps, seeds]."""
    rows = [epoch_order(num_samples, seed=s, epoch=epoch, sampling=sampling) for s in seeds]
    return torch.from_numpy(np.stack(rows, axis=1))


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
    state = _State(problem, setting, rates, tuple(seeds), tuple(checkpoints))
    for epoch in range(checkpoints[-1]):
        state.measure()
        state.report(epoch)
        state.move(epoch)
        if on_epoch is not None:
            on_epoch(epoch + 1)
    state.measure()
    state.report(checkpoints[-1])
    return state.traces()


class _State:
    """The points, and the sums of what was measured."""

    def __init__(
        self,
        problem: Problem,
        setting: Setting,
        rates: Sequence[tuple[float, float]],
        seeds: tuple[int, ...],
        checkpoints: tuple[int, ...],
    ) -> None:
        self.problem, self.setting, self.seeds = problem, setting, seeds
        self.checkpoints = checkpoints
        shape = (len(rates), len(seeds))
        x, y = problem.start()
        self.x, self.y = x.expand(*shape, -1).clone(), y.expand(*shape, -1).clone()
        table = torch.tensor(rates, dtype=torch.float64)
        self.lr_x, self.lr_y = (table[:, i].view(-1, 1) for i in (0, 1))
        self.sum_x, self.sum_y = torch.zeros(shape).double(), torch.zeros(shape).double()
        self.now_x, self.now_y = self.sum_x, self.sum_y
        self.limit: float | None = None
        self.diverged = torch.zeros(shape, dtype=torch.bool)
        self.rows: dict[str, list[np.ndarray]] = {"mean_x": [], "mean_y": [], "last": []}
        self.num_measured = 0
        self.drawn: Tensor | None = None
        self.first_drawn = 0

    def measure(self) -> None:
        """Add ‖∇f‖² at the present points."""
        g_x, g_y = self.problem.gradient(self.x, self.y)
        self.now_x, self.now_y = g_x.square().sum(-1), g_y.square().sum(-1)
        total = self.now_x + self.now_y
        if self.limit is None:
            self.limit = DIVERGED * max(float(total.max()), 1e-12)
        is_lost = ~(total < self.limit)
        if bool(is_lost.any()):
            self.diverged |= is_lost
            for part in (self.x, self.y):  # where arithmetic stays finite, and fast
                part[is_lost] = 0.0
        self.num_measured += 1

    def report(self, epoch: int) -> None:
        """Write a row if this number of epochs is asked for; then count this epoch's start."""
        if epoch in self.checkpoints:
            lost = self.diverged.numpy()
            for name, values in (
                ("mean_x", self.sum_x / max(epoch, 1)),
                ("mean_y", self.sum_y / max(epoch, 1)),
                ("last", self.now_x + self.now_y),
            ):
                self.rows[name].append(np.where(lost, np.inf, values.numpy()))
        self.sum_x, self.sum_y = self.sum_x + self.now_x, self.sum_y + self.now_y

    def move(self, epoch: int) -> None:
        """One epoch."""
        num = self.problem.num_samples
        order = orders(num, self.seeds, epoch, self.setting.sampling)
        for i in range(num):
            self._step(epoch * num + i, order[i])

    def _step(self, step: int, samples: Tensor) -> None:
        problem, x, y = self.problem, self.x, self.y
        if self.setting.base_order == "first":
            g_x, g_y = problem.gradients(x, y, samples)
            self.x = x - self.lr_x.unsqueeze(-1) * g_x
            self.y = y - self.lr_y.unsqueeze(-1) * g_y
            return
        _, g_y = problem.gradients(x, y, samples)
        directions, eps = self._directions(step), self.setting.eps
        loss = problem.losses(x, y, samples) if self.setting.estimator == "forward" else None
        delta = None
        for v in directions:
            away = eps * v
            ahead = problem.losses(x + away, y, samples)
            if loss is not None:
                scalar = (ahead - loss) / eps
            else:
                # As combine does: the coefficient −eps times v, added.
                scalar = (ahead - problem.losses(x + -eps * v, y, samples)) / (2 * eps)
            moved = (-self.lr_x * scalar / len(directions)).unsqueeze(-1) * v
            delta = moved if delta is None else delta + moved
        assert delta is not None
        self.x = x + delta
        self.y = y - self.lr_y.unsqueeze(-1) * g_y

    def _directions(self, step: int) -> Tensor:
        """[directions, seeds, d_x]."""
        if self.drawn is None or step >= self.first_drawn + len(self.drawn):
            num = self.setting.num_directions
            a_step = num * len(self.seeds) * self.problem.d_x
            last = self.checkpoints[-1] * self.problem.num_samples
            self.first_drawn = step
            self.drawn = directions_of_seeds(
                self.problem.d_x,
                self.seeds,
                first_step=step,
                num_steps=min(max(_BLOCK_ELEMENTS // a_step, 1), last - step),
                num_directions=num,
                distribution=self.setting.distribution,
            )
        return self.drawn[step - self.first_drawn]

    def traces(self) -> Traces:
        """What was measured."""
        rows = {name: np.stack(values) for name, values in self.rows.items()}
        return Traces(self.checkpoints, x=self.x, y=self.y, **rows)
