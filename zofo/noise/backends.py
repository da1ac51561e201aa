"""The sums of weights and directions, computed by the backend of their device.

    device      backend
    cpu         numba's kernels (`cpu`)
    cuda        Triton's kernels (`triton_launch`), if Triton can be imported
    any other   plain torch operations (`philox`), which are slower; one warning says so

All backends draw the same directions.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterable, Sequence
from functools import lru_cache
from typing import Any, Final, Literal, TypeVar

import torch
from torch import Tensor

from zofo.noise import philox
from zofo.noise.address_checks import check_tensors

Backend = Literal["cpu", "triton", "torch"]
Job = tuple[Tensor, Tensor, int, int]
"""A weight, the tensor that receives the sum, and the weight's address: its tensor index, and the
index of its first element within the whole tensor, of which it may be a slice."""
_Key = TypeVar("_Key")


@lru_cache(maxsize=8)
def backend(device_type: str) -> Backend:
    """The backend of a device. Warns once if it is the slow one."""
    chosen, reason = _choice(device_type)
    if reason is not None:
        warnings.warn(
            f"directions on {device_type} are drawn by plain torch operations, which give the same "
            f"numbers but are slower: {reason}",
            stacklevel=4,
        )
    return chosen


def in_words(device_type: str) -> str:
    """Describe the backend of a device without a warning, and say why if it is the slow one."""
    chosen, reason = _choice(device_type)
    if chosen == "cpu":
        return f"compiled kernels, {cpu().team_in_words()}"
    if chosen == "triton":
        return "Triton's kernels"
    return f"plain torch operations, the same numbers but slower: {reason}"


def _choice(device_type: str) -> tuple[Backend, str | None]:
    """The backend, and the reason if it is the slow one."""
    if device_type == "cpu":
        return "cpu", None
    if device_type != "cuda":
        return "torch", "there are kernels for CPU and CUDA only"
    try:
        triton_launch()
    except ImportError:
        return "torch", "triton cannot be imported; install it"
    return "triton", None


@lru_cache(maxsize=1)
def cpu() -> Any:
    """The launcher of the CPU kernels, imported on first use because numba loads slowly."""
    from zofo.noise import cpu as module

    return module


def triton_launch() -> Any:
    """The launcher of the CUDA kernels, imported on first use: only some systems have Triton."""
    from zofo.noise import triton_launch

    return triton_launch


def grouped(jobs: Iterable[Job], key: Callable[[Tensor], _Key]) -> dict[_Key, list[Job]]:
    """The jobs by a property of their weights, in order."""
    groups: dict[_Key, list[Job]] = {}
    for job in jobs:
        groups.setdefault(key(job[0]), []).append(job)
    return groups


def _by_cpu(
    jobs: Sequence[Job],
    coefficients: Sequence[Sequence[float]],
    *,
    stochastic: bool,
    **options: Any,
) -> None:
    # One call serves tensors of one dtype.
    for dtype, group in grouped(jobs, lambda weight: weight.dtype).items():
        stochastic_here = stochastic and dtype.itemsize == 2
        plan = cpu().Plan(dtype, coefficients, stochastic=stochastic_here, **options)
        cpu().call_of(*zip(*group, strict=True)).run(plan)


def _by_triton(
    jobs: Sequence[Job],
    coefficients: Sequence[Sequence[float]] | Tensor,
    *,
    decays: Sequence[float],
    steps: Sequence[int],
    **options: Any,
) -> None:
    if len(jobs) == 1 and not isinstance(coefficients, Tensor):
        # A single tensor needs no table on the device, and may take several steps at once.
        weight, out, tensor, offset = jobs[0]
        options |= {"decays": decays, "steps": steps, "tensor": tensor, "offset": offset}
        triton_launch().combine(weight, out, coefficients, **options)
        return
    weights, outs, tensors, offsets = zip(*jobs, strict=True)
    row = coefficients if isinstance(coefficients, Tensor) else coefficients[0]
    options |= {"decay": decays[0], "step": steps[0], "tensors": tensors, "offsets": offsets}
    triton_launch().combine_many(weights, outs, row, **options)


def _by_torch(
    jobs: Sequence[Job],
    coefficients: Sequence[Sequence[float]],
    *,
    decays: Sequence[float],
    steps: Sequence[int],
    **options: Any,
) -> None:
    for weight, out, tensor, offset in jobs:
        options |= {"tensor": tensor, "offset": offset}
        source = weight
        for row, decay, step in zip(coefficients, decays, steps, strict=True):
            philox.combine(source, out, tuple(row), decay=decay, step=step, **options)
            source = out


_BACKENDS: Final[dict[Backend, Callable[..., None]]] = {
    "cpu": _by_cpu,
    "triton": _by_triton,
    "torch": _by_torch,
}


def compute(
    jobs: Sequence[Job],
    coefficients: Sequence[Sequence[float]] | Tensor,
    decays: Sequence[float],
    steps: Sequence[int],
    *,
    seed: int,
    purpose: int,
    first_direction: int,
    stochastic: bool,
) -> None:
    """Compute and write all jobs, after a check of all addresses.

    Args:
        jobs: on any devices, in any dtypes and layouts.
        coefficients: [steps][directions]; or a tensor, [directions], for a single step.
        decays: [steps].
        steps: addresses of the directions, at least one.
        seed: seed of the run.
        purpose: `philox.RADEMACHER` or `philox.GAUSSIAN`.
        first_direction: index of the first direction.
        stochastic: round 16-bit weights stochastically.

    Raises:
        ValueError: for a dtype, shape, device or address that the kernels cannot serve.
    """
    num_directions = (
        len(coefficients) if isinstance(coefficients, Tensor) else max(map(len, coefficients))
    )
    for weight, out, tensor, offset in jobs:
        check_tensors(
            weight, out, num_directions, seed, max(steps), tensor, first_direction, offset
        )
        if purpose == philox.ROWS and weight.ndim != 2:
            raise ValueError(
                f"a weight of shape {list(weight.shape)} has no rank-one direction; it must be a "
                "matrix, or take another distribution"
            )
    drawing = {"seed": seed, "purpose": purpose, "first_direction": first_direction}
    full = [job for job in jobs if job[0].numel()]
    for device, given in grouped(full, lambda weight: weight.device).items():
        chosen = backend(device.type)
        rows = coefficients
        if isinstance(rows, Tensor) and chosen != "triton":
            rows = [rows.tolist()]
            if not all(map(math.isfinite, rows[0])):
                continue
        # Kernels walk row-major memory, so another layout goes through a copy. The copy of `out`
        # has its values, because the CUDA kernel writes nothing if a coefficient is not finite.
        flat = [(w.detach().contiguous(), o.detach().contiguous(), t, i) for w, o, t, i in given]
        _BACKENDS[chosen](flat, rows, decays=decays, steps=steps, stochastic=stochastic, **drawing)
        for (_, target, _, _), (_, out, _, _) in zip(flat, given, strict=True):
            if target.data_ptr() != out.data_ptr():
                out.detach().copy_(target)
            elif not out.is_inference():
                # Autograd cannot see that the kernels wrote to it.
                torch.autograd.graph.increment_version(out)
