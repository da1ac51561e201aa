"""What computes the sums of weights and directions, by device.

On the CPU numba's kernels (`cpu`), on CUDA Triton's (`triton_launch`) where it can be imported,
elsewhere plain torch operations (`philox`): the same directions, slower; said once.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from functools import lru_cache
from typing import Any, Final, Literal

import torch
from torch import Tensor

from zofo.noise import philox

Backend = Literal["cpu", "triton", "torch"]


@lru_cache(maxsize=8)
def backend(device_type: str) -> Backend:
    """What computes on such a device. Said once where it is the slow way."""
    chosen, reason = _choice(device_type)
    if reason is not None:
        warnings.warn(
            f"directions on {device_type} are drawn by plain torch operations, the same but "
            f"slower: {reason}",
            stacklevel=4,
        )
    return chosen


def in_words(device_type: str) -> str:
    """What `backend` chooses for a device, and why where it is the slow way; warns of nothing."""
    chosen, reason = _choice(device_type)
    if chosen == "cpu":
        return f"compiled kernels, {cpu().team_in_words()}"
    if chosen == "triton":
        return "Triton's kernels"
    return f"plain torch operations, the same but slower: {reason}"


def _choice(device_type: str) -> tuple[Backend, str | None]:
    """The backend, and why it is the slow one if it is."""
    if device_type == "cpu":
        return "cpu", None
    if device_type != "cuda":
        return "torch", "there are kernels for CPU and CUDA only"
    try:
        triton_launch()
    except ImportError:
        return "torch", "triton cannot be imported; install it"
    return "triton", None


def triton_launch() -> Any:
    """Imported on first use: triton is there only on Linux, and takes a moment to load."""
    from zofo.noise import triton_launch

    return triton_launch


def _combine_triton(weight: Tensor, out: Tensor, *args: Any, **options: Any) -> None:
    triton_launch().combine(weight, out, *args, **options)


def _combine_anywhere(
    weight: Tensor,
    out: Tensor,
    coefficients: Sequence[Sequence[float]],
    *,
    decays: Sequence[float],
    steps: Sequence[int],
    **address: Any,
) -> None:
    """By the reference, in torch's own operations: any device, slower."""
    for step, decay, row in zip(steps, decays, coefficients, strict=True):
        philox.combine(weight, out, tuple(row), decay=decay, step=step, **address)
        weight = out


def _combine_cpu(
    weight: Tensor,
    out: Tensor,
    coefficients: Sequence[Sequence[float]],
    *,
    tensor: int,
    offset: int,
    **options: Any,
) -> None:
    plan = cpu().Plan(weight.dtype, coefficients, **options)
    cpu().call_of([weight], [out], [tensor], offset).run(plan)


def _many_by_cpu(
    triples: Sequence[tuple[Tensor, Tensor, int]],
    coefficients: Sequence[float],
    *,
    decay: float,
    step: int,
    stochastic: bool,
    **options: Any,
) -> None:
    """One call for each dtype."""
    groups: dict[torch.dtype, list[tuple[Tensor, Tensor, int]]] = {}
    for triple in triples:
        groups.setdefault(triple[0].dtype, []).append(triple)
    for dtype, group in groups.items():
        sources = [weight.detach().contiguous() for weight, _, _ in group]
        targets = [
            out.detach() if out.is_contiguous() else torch.empty_like(source)
            for source, (_, out, _) in zip(sources, group, strict=True)
        ]
        plan = cpu().Plan(
            dtype,
            [coefficients],
            decays=[decay],
            steps=[step],
            stochastic=stochastic and dtype.itemsize == 2,
            **options,
        )
        cpu().call_of(sources, targets, [tensor for _, _, tensor in group]).run(plan)
        for target, (_, out, _) in zip(targets, group, strict=True):
            hand_back(target, out)


def _many_by_triton(
    triples: Sequence[tuple[Tensor, Tensor, int]],
    coefficients: Sequence[float] | Tensor,
    **options: Any,
) -> None:
    if not triples:
        return
    sources = [weight.detach().contiguous() for weight, _, _ in triples]
    # A copy has the values that `out` has: the kernel may decide to write nothing.
    targets = [out.detach().contiguous() for _, out, _ in triples]
    triton_launch().combine_many(
        sources, targets, coefficients, tensors=[tensor for _, _, tensor in triples], **options
    )
    for target, (_, out, _) in zip(targets, triples, strict=True):
        hand_back(target, out)


def _many_anywhere(
    triples: Sequence[tuple[Tensor, Tensor, int]],
    coefficients: Sequence[float],
    *,
    decay: float,
    step: int,
    stochastic: bool,
    **options: Any,
) -> None:
    for weight, out, tensor in triples:
        source = weight.detach().contiguous()
        target = out.detach() if out.is_contiguous() else torch.empty_like(source)
        _combine_anywhere(
            source,
            target,
            [coefficients],
            decays=[decay],
            steps=[step],
            tensor=tensor,
            offset=0,
            stochastic=stochastic and weight.element_size() == 2,
            **options,
        )
        hand_back(target, out)


COMBINE: Final[dict[str, Any]] = {
    "cpu": _combine_cpu,
    "triton": _combine_triton,
    "torch": _combine_anywhere,
}


MANY: Final[dict[str, Any]] = {
    "cpu": _many_by_cpu,
    "triton": _many_by_triton,
    "torch": _many_anywhere,
}


@lru_cache(maxsize=1)
def cpu() -> Any:
    """Imported on first use: compiled kernels take a moment to load."""
    from zofo.noise import cpu as module

    return module


def hand_back(target: Tensor, out: Tensor) -> None:
    """What was written to `target` is out's, if it does not lie there already."""
    if target.data_ptr() != out.data_ptr():
        out.detach().copy_(target)
    elif not out.is_inference():
        torch.autograd.graph.increment_version(out)
