"""The learning rate of a first-order block, from short trainings that are undone.

The curvature along the first step gives the starting rate: η = ⟨∇f, u⟩ / (uᵀ∇²f u), with u = ∇f for
SGD and u = sign(∇f), Adam's first step, for Adam. It cannot give the final rate: LoRA starts at B =
0, and its curvature and gradient are different a few steps later. The block is therefore trained
for n steps at a few rates on a geometric ladder. Every training starts from the same weights, sees
the same batches and dropout masks, and is undone.

    score of a rate = ½ (mean loss of the last half's fresh batches + loss on held-aside rows)

The loss of a batch before the step that uses it is a held-out loss without extra cost. All rates
see the same batches, so two rates are compared row by row. A rate is harmful if its score exceeds
the score of the initial weights on the same rows and masks. That score is evaluated once for all
rates. The first half is ignored: Adam's first steps are signs, and with the larger of two good
rates the loss often rises first and then falls.

The best rate of n steps must be carried over to N steps:

    limited by               how the best rate changes
    distance to go           shrinks like 1 / N
    noise                    shrinks like 1 / √N
    curvature                stays

The factor of noise, √(n / N), lies between the others. It is applied to the largest harmless rate
that is not measurably worse than the best. If no rate improved measurably, none can be preferred;
the largest harmless one is taken.

References:
    Smith, "Cyclical Learning Rates for Training Neural Networks", 2017, section 3.3 (a range test).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
from torch import nn
from torch.optim import Optimizer

from zofo.advice.probe import Probe
from zofo.optim.generators import seed_generators

RATIO: Final = 10**0.5
MAX_RATES: Final = 5
_WORSE: Final = 2.0
"""A rate is measurably worse if the paired difference exceeds this many standard errors."""
_SHARE: Final = 0.02
"""A rate also counts as worse if its score is higher by this share of the loss at the start,
however uncertain the difference. This is twice the uncertainty of 48 rows with losses near ln 2
(MiniLM, rotten-tomatoes)."""
_HARM: Final = 0.05
"""A rate is harmful if its score exceeds the initial score by this share. This is the median of two
standard errors of the score over 14 trainings of MiniLM at rates that change the proportions of the
predicted classes."""


@dataclass(frozen=True)
class Beginning:
    """Losses at the weights from which every short training starts.

    Attributes:
        held: losses of the held-aside rows, [rows].
        fresh: losses of the last half's batches under their dropout masks, [steps - steps // 2].
    """

    held: np.ndarray
    fresh: tuple[float, ...]

    @property
    def score(self) -> float:
        """The score of the initial weights."""
        return 0.5 * (float(np.mean(self.fresh)) + float(self.held.mean()))


@dataclass(frozen=True)
class VirtualRun:
    """A short training.

    Attributes:
        rate: learning rate of the block.
        losses: loss of each step's batch before the step, [steps]; shorter if a loss was not
            finite.
        held: losses of the held-aside rows at the end, [rows]; empty if a loss was not finite.
        start: losses of the same rows and batches at the start.
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
        """Lower is better; infinite if a loss was not finite."""
        if self.blew_up:
            return math.inf
        return 0.5 * (float(np.mean(self.last_half)) + float(self.held.mean()))

    @property
    def last_half(self) -> tuple[float, ...]:
        """Losses of the batches that count, [steps - steps // 2]."""
        return self.losses[len(self.losses) // 2 :]

    @property
    def is_harmful(self) -> bool:
        """Whether the score exceeds the initial score by more than few rows leave uncertain."""
        return self.score > (1 + _HARM) * self.start.score

    @property
    def decrease(self) -> float:
        """Decrease of the loss on the held-aside rows."""
        return -math.inf if self.blew_up else float(self.start.held.mean() - self.held.mean())

    def as_dict(self) -> dict[str, Any]:
        """The values for JSON."""
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
    """The learning rate of a first-order block.

    Attributes:
        rate: the advised rate.
        best: the largest harmless rate that is not measurably worse than the best one. If all rates
            were harmful, it lies one rung below them.
        start: first rate of the ladder.
        shrinkage: rate / best = √(n / N).
        runs: the short trainings, by ascending rate.
        num_steps: steps of a short training.
        moved: whether the best harmless rate lowered the loss on held-aside rows measurably.
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
        """Whether every tried rate was harmful."""
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
    """Train a block for a few steps. The caller restores the weights.

    Args:
        probe: supplies rows. It is rewound, so that every rate sees the same rows.
        parameters: the parameters of the block, which are written.
        rate: learning rate.
        optimizer: parameters and rate -> a new optimizer.
        num_steps: n.
        accumulation: micro-batches a step.
        max_grad_norm: gradient clipping, as in the run.
        is_full: whether all weights have gradients, which sets the cost.
        start: losses at the start, if they are known.
        seed: seed of the dropout masks.
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
    """Losses of a short training's rows at the current weights."""
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
    train: Callable[[float], VirtualRun], *, start: float, num_steps: int, horizon: int
) -> FirstRate:
    """Walk along a geometric ladder until the best rate lies inside, then shrink it for N steps.

    Args:
        train: rate -> a short training.
        start: first rate.
        num_steps: n.
        horizon: N.
    """
    runs: dict[int, VirtualRun] = {}

    def at(rung: int) -> VirtualRun:
        if rung not in runs:
            runs[rung] = train(start * RATIO**rung)
        return runs[rung]

    at(0)
    at(1)
    # The ladder grows by one rung at a time, towards the side where the best rate may lie.
    while len(runs) < MAX_RATES:
        safe = {rung: run for rung, run in runs.items() if not run.is_harmful}
        low, high = min(runs), max(runs)
        best = min(safe, key=lambda rung: (safe[rung].score, rung)) if safe else low
        # Larger rates first: a short training reveals a rate that is too large, but a rate that is
        # too small looks harmless.
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
    ordered = tuple(runs[rung] for rung in sorted(runs))
    return FirstRate(tied * shrinkage, tied, start, shrinkage, ordered, num_steps, moved)


def num_virtual_steps(horizon: int) -> int:
    """n: a fifth of the run, at least 5 and at most 50 steps."""
    return max(5, min(50, horizon // 5))


def _seed_masks(seed: int, step: int) -> None:
    """Give a step the same dropout masks at every rate and at the start."""
    seed_generators((seed + step) % 2**63)


def _held(probe: Probe) -> np.ndarray:
    """Losses of the held-aside rows without dropout."""
    was_training = probe.model.training
    probe.model.eval()  # dropout would add noise to the comparison of rates
    try:
        size = probe.batch_size
        starts = range(0, len(probe.held), size)
        parts = [probe.batch_loss(probe.held[i : i + size])[1] for i in starts]
    finally:
        probe.model.train(was_training)
    return np.concatenate(parts)


def _is_equal(run: VirtualRun, best: VirtualRun) -> bool:
    """Whether a harmless rate is not measurably worse than the best harmless one."""
    if run is best or not _has_moved(best):
        return True
    fresh = np.array(run.last_half) - np.array(best.last_half)
    both = (run.held - best.held, fresh)
    # Differences row by row: what a hard row adds to both runs cancels.
    errors = [float(d.std(ddof=1) / math.sqrt(len(d))) if len(d) > 1 else math.inf for d in both]
    # A rate that makes the loss oscillate also widens its standard error. The second bound keeps
    # such a rate from passing as equal.
    margin = min(_WORSE * 0.5 * math.hypot(*errors), _SHARE * best.start.score)
    return run.score - best.score <= margin


def _has_moved(run: VirtualRun) -> bool:
    if run.blew_up:
        return False
    change = run.start.held - run.held
    return bool(change.mean() > _WORSE * change.std(ddof=1) / math.sqrt(len(change)))
