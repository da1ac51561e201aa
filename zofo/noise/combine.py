"""Sums of a weight and its directions, w + Σ_k c_k v_k: drawn, read and written in one pass.

`combine` serves the perturbation and the update. The perturbation has one coefficient, writes to a
scratch buffer and rounds to nearest. The update has one coefficient per direction, works in place
and rounds stochastically. `combine_many` does the same for all tensors of a model. `backends` says
which kernels compute it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any, Final, Literal, get_args

import torch
from torch import Tensor

from zofo.noise import backends, philox
from zofo.noise.address_checks import check_address, check_tensors

Distribution = Literal["rademacher", "gaussian", "rank-one"]
Rounding = Literal["nearest", "stochastic"]
DISTRIBUTIONS: Final[tuple[str, ...]] = get_args(Distribution)
PURPOSES: Final = {
    "rademacher": philox.RADEMACHER,
    "gaussian": philox.GAUSSIAN,
    "rank-one": philox.ROWS,
}


def combine(
    weight: Tensor,
    coefficients: Sequence[float],
    *,
    seed: int,
    step: int,
    tensor: int,
    out: Tensor | None = None,
    decay: float = 1.0,
    first_direction: int = 0,
    offset: int = 0,
    distribution: Distribution = "rademacher",
    rounding: Rounding = "nearest",
) -> Tensor:
    """Compute out = round(decay · weight + Σ_k coefficients[k] · v_k).

    Arithmetic is float32 (float64 for float64 weights). The coefficients are rounded to it first.

    Args:
        weight: float32, float64, bfloat16 or float16, any shape and strides: a whole tensor, or a
            slice of its row-major elements.
        coefficients: one per direction, from `first_direction` on.
        seed: seed of the run, in [0, 2^64).
        step: in [0, 2^32).
        tensor: the tensor's index in [0, 2^20).
        out: receives the sum; shape, dtype and device of `weight`. None: `weight` itself.
        decay: factor of the weight (decoupled weight decay).
        first_direction: index of the first direction.
        offset: index of the slice's first element within the whole tensor.
        distribution: "rademacher" or "gaussian".
        rounding: "nearest" (ties to even), or "stochastic" with bits drawn from the same address.
            Float32 and float64 weights are the same with both.

    Returns:
        `out`.

    Raises:
        ValueError: for a dtype without kernels, an `out` that does not fit, or an address outside
            its range.
    """
    out = weight if out is None else out
    drawing = _drawing(seed, distribution, first_direction, rounding)
    backends.compute(
        [(weight, out, tensor, offset)], [tuple(coefficients)], [decay], [step], **drawing
    )
    return out


def prepare(
    weights: Sequence[Tensor],
    outs: Sequence[Tensor],
    *,
    tensors: Sequence[int],
    seed: int,
    distribution: Distribution = "rademacher",
    offset: int = 0,
) -> Callable[[float, int, int], None]:
    """Prepare the sums weights + coefficient · v for repeated computation into the same memory.

    Everything that does not change is laid out once, and all tensors of a dtype take one call. On
    CUDA the calls run on the current stream. If all tensors are contiguous, they neither wait nor
    allocate.

    Args:
        weights: as for `combine`. The memory of weights and outs must not move.
        outs: receive the sums; they must not overlap the weights.
        tensors: the tensor indices.
        seed: seed of the run.
        distribution: "rademacher" or "gaussian".
        offset: index of each weight's first element within its whole tensor.

    Returns:
        A function of coefficient, step and direction, which computes the sums.

    Raises:
        ValueError: as `combine`.
    """
    ready: dict[str, list[backends.Job]] = {"cpu": [], "triton": []}
    rest: list[backends.Job] = []
    for weight, out, tensor in zip(weights, outs, tensors, strict=True):
        job = (weight, out, tensor, offset)
        check_tensors(weight, out, 1, seed, 0, tensor, 0, offset)
        backend = backends.backend(weight.device.type)
        if backend == "torch" or not (weight.is_contiguous() and out.is_contiguous()):
            rest.append(job)
        elif weight.numel():
            ready[backend].append(job)
    calls = {
        dtype: backends.cpu().call_of(*zip(*jobs, strict=True))
        for dtype, jobs in backends.grouped(ready["cpu"], lambda weight: weight.dtype).items()
    }
    layouts = [
        backends.triton_launch().layout_of(*zip(*jobs, strict=True))
        for jobs in backends.grouped(ready["triton"], lambda weight: weight.device).values()
    ]

    def run(coefficient: float, step: int, index: int) -> None:
        check_address(seed=seed, step=step, num_directions=index + 1)
        drawing, row = _drawing(seed, distribution, index), (coefficient,)
        for dtype, call in calls.items():
            call.run(_plan(dtype, coefficient, step, index, seed, distribution))
        for layout in layouts:
            backends.triton_launch().run_layout(layout, row, decay=1.0, step=step, **drawing)
        backends.compute(rest, [row], [1.0], [step], **drawing)

    return run


# One evaluation has the same plan for all of its layers, so a few are enough.
@lru_cache(maxsize=16)
def _plan(
    dtype: torch.dtype,
    coefficient: float,
    step: int,
    index: int,
    seed: int,
    distribution: Distribution,
) -> Any:
    drawing = _drawing(seed, distribution, index)
    return backends.cpu().Plan(dtype, [[coefficient]], decays=[1.0], steps=[step], **drawing)


def _drawing(
    seed: int, distribution: Distribution, first_direction: int, rounding: Rounding = "nearest"
) -> dict[str, Any]:
    """The options that all kernels share."""
    return {
        "seed": seed,
        "purpose": PURPOSES[distribution],
        "first_direction": first_direction,
        "stochastic": rounding == "stochastic",
    }


def combine_many(
    weights: Sequence[Tensor],
    coefficients: Sequence[float] | Tensor,
    *,
    seed: int,
    step: int,
    tensors: Sequence[int],
    offsets: Sequence[int] | None = None,
    outs: Sequence[Tensor] | None = None,
    decay: float = 1.0,
    first_direction: int = 0,
    distribution: Distribution = "rademacher",
    rounding: Rounding = "nearest",
) -> list[Tensor]:
    """Apply `combine` to each of many tensors; on CUDA in one launch per dtype.

    Args:
        weights: as for `combine`; devices, dtypes and layouts may differ.
        coefficients: one per direction. The host does not wait for a tensor, [directions], on
            CUDA. If one of its values is not finite, nothing is written.
        seed: seed of the run.
        step: address of the directions.
        tensors: the tensor indices.
        offsets: index of each weight's first element within its whole tensor; None: 0 for all.
        outs: receive the sums; None: the weights themselves.
        decay: factor of the weights.
        first_direction: index of the first direction.
        distribution: "rademacher" or "gaussian".
        rounding: "nearest" or "stochastic".

    Returns:
        `outs`.

    Raises:
        ValueError: as `combine`, before anything is written; or if the numbers of tensors differ.
    """
    outs = list(weights if outs is None else outs)
    if not len(weights) == len(outs) == len(tensors):
        raise ValueError(
            f"{len(weights)} weights, {len(outs)} outs and {len(tensors)} tensor indices; "
            "their numbers must be equal"
        )
    if isinstance(coefficients, Tensor) and coefficients.ndim != 1:
        raise ValueError(
            f"coefficients has shape {tuple(coefficients.shape)}; it must be [directions]"
        )
    jobs = list(zip(weights, outs, tensors, offsets or [0] * len(weights), strict=True))
    rows = coefficients if isinstance(coefficients, Tensor) else [coefficients]
    drawing = _drawing(seed, distribution, first_direction, rounding)
    backends.compute(jobs, rows, [decay], [step], **drawing)
    return outs


def combine_rows(
    weight: Tensor,
    rows: Tensor,
    coefficient: float,
    *,
    seed: int,
    step: int,
    tensor: int,
    first_direction: int = 0,
    distribution: Distribution = "rademacher",
) -> Tensor:
    """Compute some rows of weight + coefficient · v, with the bits of `combine`.

    Args:
        weight: [rows of the whole, width], contiguous.
        rows: indices of the rows, int64, [n].
        coefficient: factor of the direction.
        seed: seed of the run.
        step: address of the direction.
        tensor: the tensor index.
        first_direction: index of the direction.
        distribution: "rademacher" or "gaussian".

    Returns:
        [n, width], newly allocated.

    Raises:
        ValueError: as `combine`.
    """
    table = weight.detach()[rows]  # [n, width], a copy
    check_tensors(weight, weight, 1, seed, step, tensor, first_direction, 0)
    if table.numel() == 0:
        return table
    backend = backends.backend(weight.device.type)
    drawing = _drawing(seed, distribution, first_direction)
    if backend == "cpu":
        plan = _plan(weight.dtype, coefficient, step, first_direction, seed, distribution)
        backends.cpu().call_of_rows(table, rows, tensor).run(plan)
    elif backend == "triton":
        backends.triton_launch().combine_rows(
            table, rows, coefficient, step=step, tensor=tensor, **drawing
        )
    else:
        for row, i in zip(table, rows.tolist(), strict=True):
            job = (row, row, tensor, i * weight.shape[1])
            backends.compute([job], [(coefficient,)], [1.0], [step], **drawing)
    return table


def combine_steps(
    weight: Tensor,
    coefficients: Sequence[Sequence[float]],
    *,
    decays: Sequence[float],
    steps: Sequence[int],
    seed: int,
    tensor: int,
    offset: int = 0,
    distribution: Distribution = "rademacher",
    rounding: Rounding = "nearest",
) -> Tensor:
    """Apply several updates to a weight in one pass over it, in place.

    The result has the bits of one `combine` per step, in order.

    Args:
        weight: as for `combine`.
        coefficients: [steps][directions], with as many directions in every step.
        decays: [steps].
        steps: addresses of the directions.
        seed: seed of the run.
        tensor: the tensor index.
        offset: index of the weight's first element within its whole tensor.
        distribution: "rademacher" or "gaussian".
        rounding: "nearest" or "stochastic".

    Returns:
        `weight`.

    Raises:
        ValueError: as `combine`.
    """
    if not steps:
        return weight
    check_address(seed=seed, step=min(steps), num_directions=0)
    drawing = _drawing(seed, distribution, 0, rounding)
    backends.compute([(weight, weight, tensor, offset)], coefficients, decays, steps, **drawing)
    return weight


def direction(
    shape: Sequence[int],
    *,
    seed: int,
    step: int,
    tensor: int,
    index: int = 0,
    distribution: Distribution = "rademacher",
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
) -> Tensor:
    """The direction itself as a tensor, for tests and inspection. The steps never store it."""
    zero = torch.zeros(tuple(shape), dtype=torch.float32, device=device)
    combine(
        zero,
        (1.0,),
        seed=seed,
        step=step,
        tensor=tensor,
        first_direction=index,
        distribution=distribution,
    )
    return zero.to(dtype)
