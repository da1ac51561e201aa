"""What a step measured, on its way from the device to the host.

A host that waits for a step's scalars lets the device idle while it prepares the next step. So on
CUDA the scalars stay where they are: the device itself leaves a step out whose loss or scalars are
not finite, and the host reads the numbers for trajectory and logs one step later.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor


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
    """Numbers under way to the host.

    Args:
        values: name -> float tensor on the device, of any shape.
    """

    def __init__(self, values: Mapping[str, Tensor]) -> None:
        self._sizes = {name: value.numel() for name, value in values.items()}
        flat = torch.cat([value.detach().double().reshape(-1) for value in values.values()])
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


def step_unless(
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
