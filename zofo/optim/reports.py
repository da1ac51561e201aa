"""What the optimizer's steps did: the newest report, and the trajectory of the base.

A step taken without waiting for its numbers is noted as pending and read when somebody asks, or at
the next step.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from zofo.optim.reading import Reading, StepReport
from zofo.optim.trajectory import Trajectory, Update

Rates = tuple[tuple[str, int, float, float], ...]
"""Block, number of weights, lr and weight decay of each zeroth-order group."""


@dataclass(frozen=True)
class PendingStep:
    """A step that was taken and not yet read."""

    step: int
    num_forwards: float
    rates: Rates
    reading: Reading
    counters: tuple[tuple[Tensor, Tensor], ...]
    """From `zofo.optim.reading.step_unless`."""


class StepLog:
    """Reports of the steps.

    Args:
        trajectory: where updates of the base are noted.
    """

    def __init__(self, trajectory: Trajectory) -> None:
        self.trajectory = trajectory
        self.pending: PendingStep | None = None
        self.last: StepReport | None = None
        self.last_measured: StepReport | None = None

    def read_pending(self) -> None:
        """Wait for the step that is not yet read, if there is one."""
        pending, self.pending = self.pending, None
        if pending is None:
            return
        values = pending.reading.get()
        loss = values["loss"][0] if "loss" in values else None
        if loss is not None and not math.isfinite(loss):
            for counter, before in pending.counters:
                counter.copy_(before)
        self.report(
            pending.step,
            loss,
            values.get("scalars", ()),
            values["grad_norm"][0] if "grad_norm" in values else None,
            {"adapter": values["adapter_norm"][0]} if "adapter_norm" in values else {},
            pending.num_forwards,
            pending.rates,
        )

    def report(
        self,
        step: int,
        loss: float | None,
        scalars: tuple[float, ...],
        grad_norm: float | None,
        norms: dict[str, float],
        num_forwards: float,
        rates: Rates,
    ) -> None:
        """Note a step in the trajectory and as the newest report."""
        loss_is_finite = loss is None or math.isfinite(loss)
        is_finite = loss_is_finite and all(map(math.isfinite, scalars))
        norms = norms if loss_is_finite else {}
        if is_finite and scalars:
            row = [
                Update(step, scalars, lr, decay) for block, _, lr, decay in rates if block == "base"
            ]
            if row:
                self.trajectory.updates.append(tuple(row))
            norms |= _expected_norms(scalars, rates)
        if not is_finite:
            warnings.warn(
                f"step {step}: loss {loss}, projected gradient {scalars}: not finite, "
                "not applied. Lower the learning rates; in float16 raise eps or use bfloat16",
                stacklevel=4,
            )
        self.last = StepReport(step, loss, scalars, grad_norm, not is_finite, num_forwards, norms)
        if scalars:
            self.last_measured = self.last


def _expected_norms(
    scalars: tuple[float, ...], rates: Sequence[tuple[str, int, float, float]]
) -> dict[str, float]:
    squares: dict[str, float] = {}
    for block, num_weights, lr, _ in rates:
        squares[block] = squares.get(block, 0.0) + lr**2 * num_weights
    length = math.sqrt(math.fsum(s * s for s in scalars)) / len(scalars)
    return {block: math.sqrt(square) * length for block, square in squares.items()}
