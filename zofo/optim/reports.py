"""Reports of the optimizer's steps: the newest report, and the trajectory of the base.

If the host waited for the scalars of a step, the device would idle while the host prepares the next
step. On CUDA the scalars therefore stay on the device. The device itself skips the update of a step
whose loss or scalars are not finite, and the host reads the numbers one step later.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from zofo.errors import UserError, shown
from zofo.optim.trajectory import Trajectory, Update


class GroupRate(NamedTuple):
    """One zeroth-order group: its block, numbers of weights, and what an update of it records."""

    block: str
    num_weights: int
    num_rank_one: int  # of them, those with rank-one directions
    lr: float
    weight_decay: float
    anchor: float = 0.0


Rates = tuple[GroupRate, ...]
"""Those of all zeroth-order groups."""


@dataclass(frozen=True)
class StepReport:
    """What one step measured and updated.

    Attributes:
        step: the number of the step, from 0.
        loss: unperturbed loss, summed over micro-batches; None if none was measured.
        projected_grad: s_k, one per direction; empty if the zeroth-order groups were not due.
        grad_norm: norm of the first-order gradient before clipping; None without `max_grad_norm`.
        non_finite: whether the step was skipped because its loss or a scalar was not finite.
        num_forwards: forward passes of the zeroth-order estimate; some rows count as their share.
        update_norms: block -> norm of its update without weight decay and anchor. A first-order
            adapter's is measured. A zeroth-order block's is the expectation over the directions,
            lr sqrt(d Σ s_k²) / K with d weights, exact for one Rademacher direction. Rank-one
            directions of rows are not averaged over K.
        rows_left_out: rows whose share of the difference is not finite and counts as 0.
    """

    step: int
    loss: float | None
    projected_grad: tuple[float, ...]
    grad_norm: float | None
    non_finite: bool
    num_forwards: float
    update_norms: Mapping[str, float] = field(default_factory=dict)
    rows_left_out: int = 0


class HostCopy:
    """An asynchronous copy of numbers from the device to the host.

    Args:
        values: name -> float tensor of any shape, on the device.
    """

    def __init__(self, values: Mapping[str, Tensor]) -> None:
        self._sizes = {name: value.numel() for name, value in values.items()}
        device = next((value.device for value in values.values()), None)
        columns = [value.detach().double().reshape(-1).to(device) for value in values.values()]
        # One flat tensor, so that the device makes one copy: float64, [numbers].
        flat = torch.cat(columns or [torch.empty(0)])
        self._event: torch.cuda.Event | None = None
        if flat.device.type == "cuda":
            # Only pinned host memory lets the copy run without a wait.
            self._host = torch.empty(flat.shape, dtype=flat.dtype, pin_memory=True)
            self._host.copy_(flat, non_blocking=True)
            self._event = torch.cuda.Event()
            self._event.record(torch.cuda.current_stream(flat.device))
        else:
            self._host = flat

    def get(self) -> dict[str, tuple[float, ...]]:
        """Wait for the copy and return name -> the elements of its tensor."""
        if self._event is not None:
            self._event.synchronize()
        numbers = iter(self._host.tolist())
        return {
            name: tuple(next(numbers) for _ in range(size)) for name, size in self._sizes.items()
        }


class StepNumbers:
    """The numbers of one step, read now or later, and which updates they allow.

    Read now, the host waits for loss and scalars before the update, and skips the update if a
    number is not finite. Read later, the numbers stay on the device, which skips the update itself,
    and the host never waits.

    Args:
        loss: unperturbed loss, float64, shape []; None: none was measured.
        scalars: s_k, float64, [directions], on the loss's device; None: none were measured.
        reads_late: whether to read the numbers later, which needs a loss or scalars.

    Attributes:
        values: name -> tensor, everything that `StepLog` reports.
        counters: host tensors of the first-order optimizer, each with its previous value.
        moves_zeroth: whether to update the zeroth-order groups.
        projected_grad: the scalars; empty while they are unread.
        unread: the scalars on the device, NaN to skip the update; None if they are read now.
    """

    def __init__(self, loss: Tensor | None, scalars: Tensor | None, *, reads_late: bool) -> None:
        self.reads_late = reads_late
        self.values: dict[str, Tensor] = {}
        self.counters: list[tuple[Tensor, Tensor]] = []
        self.note("loss", loss)
        self.note("scalars", scalars)
        self.projected_grad: tuple[float, ...] = ()
        self.unread: Tensor | None = None
        self._loss_is_finite: bool | Tensor
        if not reads_late:
            self._loss_is_finite = loss is None or math.isfinite(float(loss))
            if scalars is not None:
                self.projected_grad = tuple(scalars.tolist())
            all_finite = self._loss_is_finite and all(map(math.isfinite, self.projected_grad))
            self.moves_zeroth = all_finite and scalars is not None
            return
        device = next(iter(self.values.values())).device
        is_finite = torch.ones((), dtype=torch.bool, device=device)
        self._loss_is_finite = is_finite if loss is None else torch.isfinite(loss)
        self.moves_zeroth = scalars is not None
        if scalars is not None:
            is_finite = self._loss_is_finite & torch.isfinite(scalars).all()
            self.unread = torch.where(is_finite, scalars, torch.nan)

    def note(self, name: str, value: Tensor | None) -> None:
        """Add a number to the report, unless it is None."""
        if value is not None:
            self.values[name] = value

    def step_first(self, step: Callable[[], object], held: Sequence[Tensor]) -> None:
        """Run the first-order update, unless the loss is not finite.

        Args:
            step: changes tensors in place.
            held: every tensor that `step` changes.
        """
        if isinstance(self._loss_is_finite, Tensor):
            self.counters = _step_unless(step, held, self._loss_is_finite)
        elif self._loss_is_finite:
            step()


@dataclass(frozen=True)
class PendingStep:
    """A finished step whose numbers the host has not read."""

    step: int
    num_forwards: float
    rates: Rates
    host_copy: HostCopy
    counters: Sequence[tuple[Tensor, Tensor]]


class StepLog:
    """The reports of all steps.

    Args:
        trajectory: receives the updates of the base.
    """

    def __init__(self, trajectory: Trajectory) -> None:
        self.trajectory = trajectory
        self.part_in_words: Callable[[int], str] | None = None  # set if several processes step
        self.pending: PendingStep | None = None
        self.last: StepReport | None = None
        self.last_measured: StepReport | None = None

    def add(self, step: int, num_forwards: float, rates: Rates, numbers: StepNumbers) -> None:
        """Add a step, and report it at once unless its numbers are read later."""
        host_copy = HostCopy(numbers.values)
        self.pending = PendingStep(step, num_forwards, rates, host_copy, numbers.counters)
        if not numbers.reads_late:
            self.read_pending()

    def read_pending(self) -> None:
        """Wait for the unread step; record its update and make its report the newest."""
        pending, self.pending = self.pending, None
        if pending is None:
            return
        step, rates, values = pending.step, pending.rates, pending.host_copy.get()
        scalars = values.get("scalars", ())
        loss, grad_norm, adapter_norm = (
            values[name][0] if name in values else None
            for name in ("loss", "grad_norm", "adapter_norm")
        )
        if values.get("differs", (0.0,))[0]:
            assert self.part_in_words is not None
            raise UserError(
                f"step {step}: the bits of {self.part_in_words(step)} differ between processes, so "
                "their models are no longer the same; resume from the last checkpoint"
            )
        loss_is_finite = loss is None or math.isfinite(loss)
        is_finite = loss_is_finite and all(map(math.isfinite, scalars))
        norms: dict[str, float] = {}
        if not loss_is_finite:
            # The device skipped the update, so the counts on the host go back too.
            for counter, before in pending.counters:
                counter.copy_(before)
        elif adapter_norm is not None:
            norms["adapter"] = adapter_norm
        if is_finite and scalars:
            row = [
                Update(step, scalars, rate.lr, rate.weight_decay, rate.anchor)
                for rate in rates
                if rate.block == "base"
            ]
            if row:
                self.trajectory.updates.append(tuple(row))
            norms |= _expected_norms(scalars, rates, self.trajectory.distribution)
        left_out = int(values.get("rows_left_out", (0,))[0])
        if not is_finite and loss_is_finite and 0 < len(scalars) == left_out:
            warnings.warn(
                f"step {step} did not move the base, because no row has a loss difference or a "
                "reward that is finite",
                stacklevel=4,
            )
        elif not is_finite:
            warnings.warn(
                f"step {step} was not applied, because loss {loss} or projected gradient "
                f"{shown(scalars)} is not finite. Lower the learning rates; in float16, raise eps "
                "or use bfloat16",
                stacklevel=4,
            )
        elif left_out:
            warnings.warn(
                f"step {step}: {left_out} rows have a loss difference or a reward that is not "
                "finite, so the estimate leaves them out",
                stacklevel=4,
            )
        self.last = StepReport(
            step, loss, scalars, grad_norm, not is_finite, pending.num_forwards, norms, left_out
        )
        if scalars:
            self.last_measured = self.last


def _step_unless(
    step: Callable[[], object], held: Sequence[Tensor], applies: Tensor
) -> list[tuple[Tensor, Tensor]]:
    """Run `step`; if `applies` turns out false, everything in `held` keeps its previous value.

    Args:
        step: changes the tensors in place.
        held: every tensor that `step` changes.
        applies: bool, shape [], on the device; the host does not wait for it.

    Returns:
        The held tensors on other devices, each with its previous value. (Torch counts the steps of
        an optimizer on the host.) The caller restores them once it has read `applies`.
    """
    there = [t for t in held if t.device == applies.device]
    elsewhere = [(t, t.clone()) for t in held if t.device != applies.device]
    before = [t.clone() for t in there]
    step()
    for tensor, old in zip(there, before, strict=True):
        tensor.copy_(torch.where(applies, tensor, old))
    return elsewhere


def _expected_norms(
    scalars: tuple[float, ...], rates: Rates, distribution: str
) -> dict[str, float]:
    squares: dict[str, float] = {}
    sum_of_squares = math.fsum(s * s for s in scalars)
    for block, num_weights, num_rank_one, lr, *_ in rates:
        if distribution == "rank-one":
            others = (num_weights - num_rank_one) * math.fsum(scalars) ** 2
            square = num_rank_one * sum_of_squares + others
        else:
            square = num_weights * sum_of_squares / len(scalars) ** 2
        squares[block] = squares.get(block, 0.0) + lr**2 * square
    return {block: math.sqrt(square) for block, square in squares.items()}
