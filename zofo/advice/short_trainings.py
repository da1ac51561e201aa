r"""The rate of a first-order block, from short trainings that are undone.

Curvature along the first step says where to begin: η = ⟨∇f, u⟩ / (uᵀ∇²f u) with u = ∇f for SGD and
u = sign(∇f), Adam's first step. It does not say where to end: at LoRA's start B = 0, curvature and
gradient are another's than a few steps on. So the block is really trained for n steps at a few
rates on a geometric ladder, each time from the same weights with the same batches and masks, and
put back.

    score of a rate = ½ (mean loss of the last half's fresh batches + loss on held-aside rows)

The loss of a batch before the step that uses it is a held-out loss that costs nothing. With common
batches two rates are compared row by row. Whether a rate does harm is seen in its score, against
the same rows under the same masks at the weights of the beginning, evaluated once for all rates.
The first half counts for nothing: Adam's first steps are signs, and a loss that rises under them
and comes back is how the larger of two good rates begins.

From n to N steps: where the distance to go decides, the best rate shrinks like 1 / N; where the
curvature decides it stays; where noise decides, it shrinks like 1 / √N. √(n / N) is taken, the
middle one, applied to the largest rate that is not told apart from the best and does no harm. Where
the best has not moved beyond noise it is told apart from none: what does no harm is all that can be
said.

References:
    Smith, "Cyclical Learning Rates for Training Neural Networks", 2017, section 3.3 (a range test).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import torch
from torch import nn
from torch.optim import Optimizer

from zofo.advice.probe import Probe

RATIO: Final = 10**0.5
MAX_RATES: Final = 5
_WORSE: Final = 2.0
"""Standard errors of the paired difference by which a rate must be worse to be told apart."""
_SHARE: Final = 0.02
"""Share of the loss at the start by which a rate is worse than another, however uncertain that is:
twice what 48 rows leave open where losses are near ln 2 (MiniLM, rotten-tomatoes)."""
_HARM: Final = 0.05
"""Share of the loss at the start by which a rate is worse than standing still: two standard errors
of that, in the middle of 14 trainings of MiniLM at rates that move the shares of the classes."""


@dataclass(frozen=True)
class Beginning:
    """Losses at the weights that every short training starts from.

    Attributes:
        held: of the held-aside rows, [rows].
        fresh: of the batches that the last half's steps will see, under their masks,
            [steps - steps // 2].
    """

    held: np.ndarray
    fresh: tuple[float, ...]

    @property
    def score(self) -> float:
        """Of a training that does not move."""
        return 0.5 * (float(np.mean(self.fresh)) + float(self.held.mean()))


@dataclass(frozen=True)
class VirtualRun:
    """A short training.

    Attributes:
        rate: of the block.
        losses: of each step's fresh batch before the step, [steps]; short if it blew up.
        held: losses of the held-aside rows at the end, [rows]; empty if it blew up.
        start: losses of the same rows, and of the last half's batches, at the beginning.
    """

    rate: float
    losses: tuple[float, ...]
    held: np.ndarray
    start: Beginning

    @property
    def blew_up(self) -> bool:
        """Whether a loss was not finite."""
        return len(self.held) == 0

    @property
    def score(self) -> float:
        """Lower is better; infinite if it blew up."""
        if self.blew_up:
            return math.inf
        return 0.5 * (float(np.mean(self.last_half)) + float(self.held.mean()))

    @property
    def last_half(self) -> tuple[float, ...]:
        """Losses of the fresh batches that count, [steps - steps // 2]."""
        return self.losses[len(self.losses) // 2 :]

    @property
    def is_harmful(self) -> bool:
        """Whether standing still would have been better, beyond what few rows leave open."""
        return self.score > (1 + _HARM) * self.start.score

    @property
    def decrease(self) -> float:
        """Of the loss on the held-aside rows."""
        return -math.inf if self.blew_up else float(self.start.held.mean() - self.held.mean())

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        held = None if self.blew_up else float(self.held.mean())
        return {
            "rate": self.rate,
            "losses": list(self.losses),
            "losses_at_the_start": list(self.start.fresh),
            "held_before": float(self.start.held.mean()),
            "held_after": held,
            "score": None if self.blew_up else self.score,
        }


@dataclass(frozen=True)
class FirstRate:
    """The rate of a first-order block.

    Attributes:
        rate: advised.
        best: of the harmless short trainings, the largest that is not told apart from the best;
            below all of them where each did harm.
        start: where the ladder began.
        shrinkage: rate / best: √(n / N).
        runs: by rate, ascending.
        num_steps: of a short training.
        moved: whether the best harmless one lowered the loss on held-aside rows beyond its noise.
    """

    rate: float
    best: float
    start: float
    shrinkage: float
    runs: tuple[VirtualRun, ...]
    num_steps: int
    moved: bool

    @property
    def is_below_harm(self) -> bool:
        """Whether every rate that was tried did harm."""
        return all(run.is_harmful for run in self.runs)


def virtual_training(
    probe: Probe,
    parameters: Sequence[nn.Parameter],
    rate: float,
    *,
    optimizer: Callable[[Sequence[nn.Parameter], float], Optimizer],
    num_steps: int,
    accumulation: int = 1,
    max_grad_norm: float | None = None,
    is_full: bool = False,
    start: Beginning | None = None,
    seed: int = 0,
) -> VirtualRun:
    """Train a block for a few steps, from and back to where it stands only in the caller's hands.

    Args:
        probe: rows; it is rewound, so that every rate sees the same.
        parameters: of the block; written.
        rate: learning rate.
        optimizer: parameters and rate -> a new optimizer.
        num_steps: n.
        accumulation: micro-batches a step.
        max_grad_norm: clipping, as in the run.
        is_full: whether every weight has a gradient, for the cost.
        start: losses at the beginning, if known.
        seed: of the dropout masks.
    """
    if start is None:
        start = beginning(probe, num_steps=num_steps, accumulation=accumulation, seed=seed)
    probe.rewind()
    stepper = optimizer(parameters, rate)
    losses: list[float] = []
    for step in range(num_steps):
        _seed_masks(seed, step)
        stepper.zero_grad()
        share = 1 / accumulation
        loss = math.fsum(
            share * probe.backward(probe.draw(), is_full=is_full, share=share)
            for _ in range(accumulation)
        )
        if not math.isfinite(loss):
            return VirtualRun(rate, tuple(losses), np.empty(0), start)
        losses.append(loss)
        if max_grad_norm is not None:
            nn.utils.clip_grad_norm_(parameters, max_grad_norm)
        stepper.step()
    stepper.zero_grad()
    held = _held(probe)
    if not np.isfinite(held).all():
        held = np.empty(0)
    return VirtualRun(rate, tuple(losses), held, start)


def beginning(probe: Probe, *, num_steps: int, accumulation: int = 1, seed: int = 0) -> Beginning:
    """Losses of a short training's rows where the model stands; arguments as there."""
    held = _held(probe)
    probe.rewind()
    fresh: list[float] = []
    for step in range(num_steps):
        rows = [probe.draw() for _ in range(accumulation)]
        if step >= num_steps // 2:
            _seed_masks(seed, step)
            fresh.append(math.fsum(probe.batch_loss(part)[0] for part in rows) / accumulation)
    return Beginning(held, tuple(fresh))


def search_rate(
    train: Callable[[float], VirtualRun],
    *,
    start: float,
    num_steps: int,
    horizon: int,
    max_rates: int = MAX_RATES,
) -> FirstRate:
    """Walk up or down a geometric ladder until the best rate lies inside, and shrink it for N.

    Args:
        train: rate -> a short training.
        start: where to begin.
        num_steps: n.
        horizon: N.
        max_rates: short trainings at most.
    """
    runs: dict[int, VirtualRun] = {}

    def at(rung: int) -> VirtualRun:
        if rung not in runs:
            runs[rung] = train(start * RATIO**rung)
        return runs[rung]

    at(0)
    at(1)
    while len(runs) < max_rates:
        safe = {rung: run for rung, run in runs.items() if not run.is_harmful}
        low, high = min(runs), max(runs)
        best = min(safe, key=lambda rung: (safe[rung].score, rung)) if safe else low
        # Up first: a rate that is too large shows at once, one that is too small never does.
        if high in safe and _is_equal(runs[high], runs[best]):
            at(high + 1)
        elif best == low:
            at(low - 1)
        else:
            break
    harmless = [run for run in runs.values() if not run.is_harmful]
    shrinkage = math.sqrt(min(1.0, num_steps / max(1, horizon)))
    if harmless:
        best_run = min(harmless, key=lambda run: (run.score, run.rate))
        tied = max(run.rate for run in harmless if _is_equal(run, best_run))
        moved = _has_moved(best_run)
    else:
        tied, moved = min(run.rate for run in runs.values()) / RATIO, False
    return FirstRate(tied * shrinkage, tied, start, shrinkage, _ordered(runs), num_steps, moved)


def num_virtual_steps(horizon: int) -> int:
    """n: a fifth of the run, from 5 to 50 steps."""
    return max(5, min(50, horizon // 5))


def _seed_masks(seed: int, step: int) -> None:
    """Dropout masks of a step, the same at every rate and where the model stood."""
    torch.manual_seed((seed + step) % 2**63)


def _held(probe: Probe) -> np.ndarray:
    """Losses of the held-aside rows, without dropout's noise."""
    was_training = probe.model.training
    probe.model.eval()
    try:
        size = probe.batch_size
        parts = [probe.rows(probe.held[i : i + size]) for i in range(0, len(probe.held), size)]
    finally:
        probe.model.train(was_training)
    return torch.cat(parts).numpy()


def _is_equal(run: VirtualRun, best: VirtualRun) -> bool:
    """Whether a harmless rate is not told apart from the best harmless one."""
    if run is best or not _has_moved(best):
        return True
    fresh = np.array(run.last_half) - np.array(best.last_half)
    both = (run.held - best.held, fresh)
    errors = [float(d.std(ddof=1) / math.sqrt(len(d))) if len(d) > 1 else math.inf for d in both]
    # A loss that swings is uncertain, and no reason to take the rate that makes it swing.
    margin = min(_WORSE * 0.5 * math.hypot(*errors), _SHARE * best.start.score)
    return run.score - best.score <= margin


def _has_moved(run: VirtualRun) -> bool:
    if run.blew_up:
        return False
    change = run.start.held - run.held
    return bool(change.mean() > _WORSE * change.std(ddof=1) / math.sqrt(len(change)))


def _ordered(runs: dict[int, VirtualRun]) -> tuple[VirtualRun, ...]:
    return tuple(runs[rung] for rung in sorted(runs))
