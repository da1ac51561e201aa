"""What the optimizer's steps did: the newest report, and the trajectory of the base.

A host that waits for a step's scalars lets the device idle while it prepares the next step. So on
CUDA the scalars stay where they are: the device itself leaves a step out whose loss or scalars are
not finite, and the host reads the numbers for trajectory and logs one step later.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from zofo.optim.trajectory import Trajectory, Update

Rates = tuple[tuple[str, int, float, float], ...]
"""Block, number of weights, lr and weight decay of each zeroth-order group."""


@dataclass(frozen=True)
class StepReport:
    """What a step did.

    Attributes:
        step: its number, from 0.
        loss: unperturbed loss, summed over micro-batches; None where none was measured.
        projected_grad: s_k, one a direction; empty where the zeroth-order groups were not due.
        grad_norm: norm of the first-order gradient before clipping; None without `max_grad_norm`.
        non_finite: whether a loss or scalar was not finite, so that it was not applied.
        num_forwards: forwards spent on the zeroth-order estimate; those of a part by its share.
        update_norms: block -> norm of its update. Of a zeroth-order block its expectation over the
            directions, lr sqrt(d Σ s_k²) / K, exact for one direction of signs; of a first-order
            adapter measured; weight decay apart.
    """

    step: int
    loss: float | None
    projected_grad: tuple[float, ...]
    grad_norm: float | None
    non_finite: bool
    num_forwards: float
    update_norms: Mapping[str, float] = field(default_factory=dict)


class Reading:
    """Numbers on their way to the host.

    Args:
        values: name -> float tensor of any shape, on the device.
    """

    def __init__(self, values: Mapping[str, Tensor]) -> None:
        self._sizes = {name: value.numel() for name, value in values.items()}
        device = next((value.device for value in values.values()), None)
        columns = [value.detach().double().reshape(-1).to(device) for value in values.values()]
        flat = torch.cat(columns or [torch.empty(0)])
        self._event: torch.cuda.Event | None = None
        if flat.device.type == "cuda":
            self._host = torch.empty(flat.shape, dtype=flat.dtype, pin_memory=True)
            self._host.copy_(flat, non_blocking=True)
            self._event = torch.cuda.Event()
            self._event.record(torch.cuda.current_stream(flat.device))
        else:
            self._host = flat

    def get(self) -> dict[str, tuple[float, ...]]:
        """Wait for the numbers: name -> its elements."""
        if self._event is not None:
            self._event.synchronize()
        numbers, result = iter(self._host.tolist()), {}
        for name, size in self._sizes.items():
            result[name] = tuple(next(numbers) for _ in range(size))
        return result


class StepNumbers:
    """The numbers of one step, read now or later, and what they allow to move.

    Read now, the host waits for loss and scalars before anything moves, and leaves out what is not
    finite. Read later, they stay on the device, which leaves it out itself; the host never waits.

    Args:
        loss: unperturbed loss, float64, shape []; None: none was measured.
        scalars: s_k, float64, [directions], on the loss's device; None: none were measured.
        reads_late: whether the numbers are read later; needs a loss or scalars.

    Attributes:
        values: name -> tensor, everything that `StepLog` reports.
        counters: tensors of the first-order optimizer on the host, each with its value before.
        moves_zeroth: whether the zeroth-order groups are to be moved.
        projected_grad: the scalars, empty while they are unread.
        unread: the scalars on the device, NaN where nothing is to move; None when read now.
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
        """Add a number to the report; None: there is none."""
        if value is not None:
            self.values[name] = value

    def step_first(self, step: Callable[[], object], held: Sequence[Tensor]) -> None:
        """Step the first-order groups, unless the loss is not finite.

        Args:
            step: changes the tensors in place.
            held: every tensor that it changes.
        """
        if isinstance(self._loss_is_finite, Tensor):
            self.counters = _step_unless(step, held, self._loss_is_finite)
        elif self._loss_is_finite:
            step()


@dataclass(frozen=True)
class PendingStep:
    """A step that was taken and not yet read."""

    step: int
    num_forwards: float
    rates: Rates
    reading: Reading
    counters: Sequence[tuple[Tensor, Tensor]]


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

    def add(self, step: int, num_forwards: float, rates: Rates, numbers: StepNumbers) -> None:
        """Note a step; report it now, unless its numbers are read later."""
        reading = Reading(numbers.values)
        self.pending = PendingStep(step, num_forwards, rates, reading, numbers.counters)
        if not numbers.reads_late:
            self.read_pending()

    def read_pending(self) -> None:
        """Wait for the step that is not yet read, and report it in the trajectory and as newest."""
        pending, self.pending = self.pending, None
        if pending is None:
            return
        step, rates, values = pending.step, pending.rates, pending.reading.get()
        scalars = values.get("scalars", ())
        loss, grad_norm, adapter_norm = (
            values[name][0] if name in values else None
            for name in ("loss", "grad_norm", "adapter_norm")
        )
        loss_is_finite = loss is None or math.isfinite(loss)
        is_finite = loss_is_finite and all(map(math.isfinite, scalars))
        norms: dict[str, float] = {}
        if not loss_is_finite:
            for counter, before in pending.counters:
                counter.copy_(before)
        elif adapter_norm is not None:
            norms["adapter"] = adapter_norm
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
        self.last = StepReport(
            step, loss, scalars, grad_norm, not is_finite, pending.num_forwards, norms
        )
        if scalars:
            self.last_measured = self.last


def _step_unless(
    step: Callable[[], object], held: Sequence[Tensor], applies: Tensor
) -> list[tuple[Tensor, Tensor]]:
    """Run `step`, which changes `held`; where `applies` is false all of it stays as it was.

    Args:
        step: changes the tensors in place.
        held: every tensor that it changes.
        applies: a bool on the device; not waited for.

    Returns:
        The held tensors that lie elsewhere (torch counts an optimizer's steps on the host), each
        with its value before: to be put back by whoever reads `applies`.
    """
    there = [t for t in held if t.device == applies.device]
    elsewhere = [(t, t.clone()) for t in held if t.device != applies.device]
    before = [t.clone() for t in there]
    step()
    for tensor, old in zip(there, before, strict=True):
        tensor.copy_(torch.where(applies, tensor, old))
    return elsewhere


def _expected_norms(
    scalars: tuple[float, ...], rates: Sequence[tuple[str, int, float, float]]
) -> dict[str, float]:
    squares: dict[str, float] = {}
    for block, num_weights, lr, _ in rates:
        squares[block] = squares.get(block, 0.0) + lr**2 * num_weights
    length = math.sqrt(math.fsum(s * s for s in scalars)) / len(scalars)
    return {block: math.sqrt(square) * length for block, square in squares.items()}
