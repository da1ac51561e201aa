"""Directions and what is done with them: w + Σ_k c_k v_k, read, drawn and written in one pass.

One function, `combine`, serves the perturbation (one coefficient, into a scratch buffer, rounded to
nearest) and the update (one coefficient a direction, in place, rounded stochastically);
`combine_many` does the same for the tensors of a whole model. On the CPU they run compiled kernels
over the threads that torch is set to use, on CUDA Triton kernels, elsewhere the torch reference.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any, Final, Literal, get_args

import torch
from torch import Tensor

from zofo.noise import backends, philox
from zofo.noise.address_checks import check_address, check_tensors

Distribution = Literal["rademacher", "gaussian"]


DISTRIBUTIONS: Final[tuple[str, ...]] = get_args(Distribution)


PURPOSES: Final = {"rademacher": philox.RADEMACHER, "gaussian": philox.GAUSSIAN}


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
    rounding: Literal["nearest", "stochastic"] = "nearest",
) -> Tensor:
    """Compute out = round(decay · weight + Σ_k coefficients[k] · v_k).

    Arithmetic is float32 (float64 for float64 weights); the coefficients are rounded to it first.

    Args:
        weight: float32, float64, bfloat16 or float16, any shape and strides: a whole tensor or a
            contiguous slice of its row-major elements.
        coefficients: one for each direction, from `first_direction` on.
        seed: run seed in [0, 2^64).
        step: in [0, 2^32).
        tensor: the tensor's index in [0, 2^20).
        out: where to write: shape and dtype of `weight`, or `weight` itself (the default).
        decay: factor of the weight (decoupled weight decay).
        first_direction: index of the first direction.
        offset: index of the slice's first element within the whole tensor.
        distribution: "rademacher" or "gaussian".
        rounding: "nearest" (even), or "stochastic" for 16-bit weights, with bits drawn from the
            same address; no difference for float32 and float64.

    Returns:
        `out`.

    Raises:
        ValueError: for a dtype without kernels, or an address outside its range.
    """
    return _run(
        weight,
        weight if out is None else out,
        [tuple(coefficients)],
        decays=[decay],
        steps=[step],
        seed=seed,
        tensor=tensor,
        first_direction=first_direction,
        offset=offset,
        distribution=distribution,
        rounding=rounding,
    )


def prepare(
    weights: Sequence[Tensor],
    outs: Sequence[Tensor],
    *,
    tensors: Sequence[int],
    seed: int,
    distribution: Distribution = "rademacher",
    offset: int = 0,
) -> Callable[[float, int, int], None]:
    """Sums weights + coefficient · v, to be computed again and again into the same places.

    What does not change is laid out once, and all tensors of a dtype are one call. On CUDA it goes
    to the current stream; where the tensors are contiguous it neither waits nor allocates.

    Args:
        weights: as for `combine`. Their memory must stay where it is, and so must that of outs.
        outs: where to write, apart from the weights.
        tensors: the tensors' indices.
        seed: run seed.
        distribution: "rademacher" or "gaussian".
        offset: index of the weights' first element within their whole tensor; on the CPU.

    Returns:
        A function of coefficient, step and direction.

    Raises:
        ValueError: as `combine`.
    """
    per_dtype: dict[torch.dtype, list[tuple[Tensor, Tensor, int]]] = {}
    per_device: dict[torch.device, list[tuple[Tensor, Tensor, int]]] = {}
    rest = []
    for weight, out, tensor in zip(weights, outs, tensors, strict=True):
        check_tensors(weight, out, 1, seed, 0, tensor, 0, offset)
        backend = backends.backend(weight.device.type)
        if backend == "torch" or not (weight.is_contiguous() and out.is_contiguous()):
            rest.append((weight, out, tensor))
        elif weight.numel() and backend == "cpu":
            per_dtype.setdefault(weight.dtype, []).append((weight, out, tensor))
        elif weight.numel():
            per_device.setdefault(weight.device, []).append((weight, out, tensor))
    calls = {
        dtype: backends.cpu().call_of(*zip(*jobs, strict=True), offset)
        for dtype, jobs in per_dtype.items()
    }
    layouts = [
        backends.triton_launch().layout_of(*zip(*jobs, strict=True)) for jobs in per_device.values()
    ]
    if (rest or layouts) and offset:
        raise ValueError("only a contiguous weight on the CPU can be a part of a tensor")
    purpose = PURPOSES[distribution]

    def run(coefficient: float, step: int, index: int) -> None:
        check_address(seed=seed, step=step, num_directions=index + 1)
        for dtype, call in calls.items():
            call.run(_plan(dtype, coefficient, step, index, seed, purpose))
        for layout in layouts:
            backends.triton_launch().run_layout(
                layout,
                (coefficient,),
                decay=1.0,
                step=step,
                seed=seed,
                purpose=purpose,
                first_direction=index,
                stochastic=False,
            )
        if rest:
            combine_many(
                [weight for weight, _, _ in rest],
                (coefficient,),
                seed=seed,
                step=step,
                tensors=[tensor for _, _, tensor in rest],
                outs=[out for _, out, _ in rest],
                first_direction=index,
                distribution=distribution,
            )

    return run


@lru_cache(maxsize=16)
def _plan(
    dtype: torch.dtype, coefficient: float, step: int, index: int, seed: int, purpose: int
) -> Any:
    return backends.cpu().Plan(
        dtype,
        [[coefficient]],
        decays=[1.0],
        steps=[step],
        seed=seed,
        purpose=purpose,
        first_direction=index,
        stochastic=False,
    )


def combine_many(
    weights: Sequence[Tensor],
    coefficients: Sequence[float] | Tensor,
    *,
    seed: int,
    step: int,
    tensors: Sequence[int],
    outs: Sequence[Tensor] | None = None,
    decay: float = 1.0,
    first_direction: int = 0,
    distribution: Distribution = "rademacher",
    rounding: Literal["nearest", "stochastic"] = "nearest",
) -> list[Tensor]:
    """`combine` for each of many tensors; on CUDA in one launch for each dtype.

    Args:
        weights: as for `combine`; devices, dtypes and layouts may differ.
        coefficients: one for each direction. A tensor, [directions], is not waited for on CUDA;
            where a value of it is not finite nothing is written at all.
        seed: run seed in [0, 2^64).
        step: in [0, 2^32).
        tensors: the tensors' indices.
        outs: where to write; None: in place.
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
            "there must be as many of each"
        )
    if isinstance(coefficients, Tensor) and coefficients.ndim != 1:
        raise ValueError(
            f"coefficients has shape {tuple(coefficients.shape)}; it must be [directions]"
        )
    address: dict[str, Any] = {"seed": seed, "step": step, "first_direction": first_direction}
    per_device: dict[torch.device, list[tuple[Tensor, Tensor, int]]] = {}
    for weight, out, tensor in zip(weights, outs, tensors, strict=True):
        check_tensors(weight, out, len(coefficients), tensor=tensor, offset=0, **address)
        per_device.setdefault(weight.device, []).append((weight, out, tensor))
    options: dict[str, Any] = {
        "decay": decay,
        "purpose": PURPOSES[distribution],
        "stochastic": rounding == "stochastic",
        **address,
    }
    for device, triples in per_device.items():
        backend = backends.backend(device.type)
        values = coefficients
        if backend != "triton" and isinstance(values, Tensor):
            values = values.tolist()
            if not all(map(math.isfinite, values)):
                continue
        backends.MANY[backend]([t for t in triples if t[0].numel()], values, **options)
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
    """Some rows of weight + coefficient · v, as `combine` would make them.

    Args:
        weight: [rows of the whole, width], contiguous.
        rows: int64, [n]: which.
        coefficient: of the direction.
        seed: run seed.
        step: of the direction.
        tensor: the tensor's index.
        first_direction: index of the direction.
        distribution: "rademacher" or "gaussian".

    Returns:
        [n, width], newly allocated.

    Raises:
        ValueError: as `combine`.
    """
    table = weight.detach()[rows]
    check_tensors(weight, weight, 1, seed, step, tensor, first_direction, 0)
    if table.numel() == 0:
        return table
    backend = backends.backend(weight.device.type)
    if backend == "triton":
        backends.triton_launch().combine_rows(
            table,
            rows,
            coefficient,
            seed=seed,
            step=step,
            tensor=tensor,
            purpose=PURPOSES[distribution],
            first_direction=first_direction,
            stochastic=False,
        )
        return table
    if backend == "torch":
        width = weight.shape[1]
        for i, row in enumerate(rows.tolist()):
            combine(
                table[i],
                (coefficient,),
                seed=seed,
                step=step,
                tensor=tensor,
                first_direction=first_direction,
                offset=row * width,
                distribution=distribution,
            )
        return table

    cpu = backends.cpu()
    plan = cpu.Plan(
        weight.dtype,
        [[coefficient]],
        decays=[1.0],
        steps=[step],
        seed=seed,
        purpose=PURPOSES[distribution],
        first_direction=first_direction,
        stochastic=False,
    )
    cpu.call_of_rows(table, rows, tensor).run(plan)
    return table


def combine_steps(
    weight: Tensor,
    coefficients: Sequence[Sequence[float]],
    *,
    decays: Sequence[float],
    steps: Sequence[int],
    seed: int,
    tensor: int,
    distribution: Distribution = "rademacher",
    rounding: Literal["nearest", "stochastic"] = "nearest",
) -> Tensor:
    """Several updates of a weight in one pass over it, in place.

    The bits are those of `combine` called once for each step, in order.

    Args:
        weight: as for `combine`.
        coefficients: [steps][directions]: the same number of directions in every step.
        decays: [steps].
        steps: addresses of the directions.
        seed: run seed.
        tensor: the tensor's index.
        distribution: "rademacher" or "gaussian".
        rounding: "nearest" or "stochastic".

    Returns:
        `weight`.

    Raises:
        ValueError: as `combine`.
    """
    if not steps:
        return weight
    return _run(
        weight,
        weight,
        coefficients,
        decays=decays,
        steps=steps,
        seed=seed,
        tensor=tensor,
        first_direction=0,
        offset=0,
        distribution=distribution,
        rounding=rounding,
    )


def _run(
    weight: Tensor,
    out: Tensor,
    coefficients: Sequence[Sequence[float]],
    *,
    decays: Sequence[float],
    steps: Sequence[int],
    seed: int,
    tensor: int,
    first_direction: int,
    offset: int,
    distribution: Distribution,
    rounding: str,
) -> Tensor:
    num_directions = max(map(len, coefficients))
    check_tensors(weight, out, num_directions, seed, max(steps), tensor, first_direction, offset)
    if min(steps) < 0:
        raise ValueError(f"step is {min(steps)}; it must be at least 0")
    if weight.numel() == 0:
        return out
    # Kernels walk row-major memory; another layout goes through a copy.
    source = weight.detach().contiguous()
    target = out.detach() if out.is_contiguous() else torch.empty_like(source)
    backends.COMBINE[backends.backend(weight.device.type)](
        source,
        target,
        coefficients,
        decays=decays,
        steps=steps,
        seed=seed,
        tensor=tensor,
        offset=offset,
        purpose=PURPOSES[distribution],
        first_direction=first_direction,
        stochastic=rounding == "stochastic" and weight.element_size() == 2,
    )
    backends.hand_back(target, out)
    return out


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
    """The direction itself, materialised: for tests and for looking at."""
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
