"""Directions and what is done with them: w + Σ_k c_k v_k, read, drawn and written in one pass.

One function, `combine`, serves the perturbation (one coefficient, into a scratch buffer, rounded to
nearest) and the update (one coefficient a direction, in place, rounded stochastically);
`combine_many` is the same for the tensors of a whole model. On the CPU they run compiled kernels
over the threads torch is set to use, on CUDA Triton kernels, elsewhere the torch reference.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from typing import Any, Final, Literal, get_args

import torch
from torch import Tensor

from zofo.noise import philox
from zofo.noise.philox import NOISE_VERSION

__all__ = [
    "DISTRIBUTIONS",
    "NOISE_VERSION",
    "Distribution",
    "combine",
    "combine_many",
    "combine_rows",
    "combine_steps",
    "direction",
    "prepare",
]

Distribution = Literal["rademacher", "gaussian"]
DISTRIBUTIONS: Final[tuple[str, ...]] = get_args(Distribution)
_PURPOSE: Final = {"rademacher": philox.RADEMACHER, "gaussian": philox.GAUSSIAN}
_DTYPES: Final = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


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
) -> Callable[[float, int, int], None]:
    """Sums weights + coefficient · v, to be computed again and again into the same places.

    What does not change is laid out once, and all tensors of a dtype are one call.

    Args:
        weights: as for `combine`. Their memory must stay where it is, and so must that of outs.
        outs: where to write, apart from the weights.
        tensors: the tensors' indices.
        seed: run seed.
        distribution: "rademacher" or "gaussian".

    Returns:
        A function of coefficient, step and direction.

    Raises:
        ValueError: as `combine`.
    """
    per_dtype: dict[torch.dtype, list[tuple[Tensor, Tensor, int]]] = {}
    rest = []
    for weight, out, tensor in zip(weights, outs, tensors, strict=True):
        _check(weight, out, 1, seed, 0, tensor, 0, 0)
        is_plain = weight.device.type == "cpu" and weight.is_contiguous() and out.is_contiguous()
        if not is_plain:
            rest.append((weight, out, tensor))
        elif weight.numel():
            per_dtype.setdefault(weight.dtype, []).append((weight, out, tensor))
    calls = {dtype: _cpu().call_of(*zip(*jobs, strict=True)) for dtype, jobs in per_dtype.items()}
    purpose = _PURPOSE[distribution]

    def run(coefficient: float, step: int, index: int) -> None:
        _check_address(seed=seed, step=step, num_directions=index + 1)
        for dtype, call in calls.items():
            call.run(_plan(dtype, coefficient, step, index, seed, purpose))
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
    return _cpu().Plan(
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
        _check(weight, out, len(coefficients), tensor=tensor, offset=0, **address)
        per_device.setdefault(weight.device, []).append((weight, out, tensor))
    options: dict[str, Any] = {
        "decay": decay,
        "purpose": _PURPOSE[distribution],
        "stochastic": rounding == "stochastic",
        **address,
    }
    for device, triples in per_device.items():
        backend = _backend(device.type)
        values = coefficients
        if backend != "triton" and isinstance(values, Tensor):
            values = values.tolist()
            if not all(map(math.isfinite, values)):
                continue
        _MANY[backend]([t for t in triples if t[0].numel()], values, **options)
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
    _check(weight, weight, 1, seed, step, tensor, first_direction, 0)
    if table.numel() == 0:
        return table
    backend = _backend(weight.device.type)
    if backend == "triton":
        _triton_launch().combine_rows(
            table,
            rows,
            coefficient,
            seed=seed,
            step=step,
            tensor=tensor,
            purpose=_PURPOSE[distribution],
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

    cpu = _cpu()
    plan = cpu.Plan(
        weight.dtype,
        [[coefficient]],
        decays=[1.0],
        steps=[step],
        seed=seed,
        purpose=_PURPOSE[distribution],
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
    _check(weight, out, num_directions, seed, max(steps), tensor, first_direction, offset)
    if min(steps) < 0:
        raise ValueError(f"step is {min(steps)}; it must be at least 0")
    if weight.numel() == 0:
        return out
    # Kernels walk row-major memory; another layout goes through a copy.
    source = weight.detach().contiguous()
    target = out.detach() if out.is_contiguous() else torch.empty_like(source)
    _COMBINE[_backend(weight.device.type)](
        source,
        target,
        coefficients,
        decays=decays,
        steps=steps,
        seed=seed,
        tensor=tensor,
        offset=offset,
        purpose=_PURPOSE[distribution],
        first_direction=first_direction,
        stochastic=rounding == "stochastic" and weight.element_size() == 2,
    )
    _hand_back(target, out)
    return out


def _hand_back(target: Tensor, out: Tensor) -> None:
    """What was written to `target` is out's, if it does not lie there already."""
    if target.data_ptr() != out.data_ptr():
        out.detach().copy_(target)
    elif not out.is_inference():
        torch.autograd.graph.increment_version(out)


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


def _check(
    weight: Tensor,
    out: Tensor,
    num_directions: int,
    seed: int,
    step: int,
    tensor: int,
    first_direction: int,
    offset: int,
) -> None:
    if weight.dtype not in _DTYPES:
        raise ValueError(
            f"dtype {weight.dtype} cannot be perturbed; load the base in one of "
            + ", ".join(str(d) for d in _DTYPES)
        )
    if out.shape != weight.shape or out.dtype != weight.dtype or out.device != weight.device:
        raise ValueError(
            f"out is {tuple(out.shape)} {out.dtype} on {out.device}, weight is "
            f"{tuple(weight.shape)} {weight.dtype} on {weight.device}; they must agree"
        )
    _check_address(seed=seed, step=step, num_directions=first_direction + num_directions)
    limits = {
        "tensor": (tensor, philox.MAX_TENSORS),
        "offset + elements": (offset + weight.numel(), philox.MAX_BLOCKS * 4),
    }
    _check_limits(limits)


def _check_address(*, seed: int, step: int, num_directions: int) -> None:
    _check_limits(
        {
            "seed": (seed, 2**64),
            "step": (step, philox.MAX_STEP),
            "first_direction + directions": (num_directions, philox.MAX_DIRECTIONS),
        }
    )


def _check_limits(limits: Mapping[str, tuple[int, int]]) -> None:
    for name, (value, limit) in limits.items():
        if not 0 <= value < limit:
            raise ValueError(f"{name} is {value}; it must lie in [0, {limit})")


@lru_cache(maxsize=8)
def _backend(device_type: str) -> Literal["cpu", "triton", "torch"]:
    """What computes on such a device. Said once where it is the slow way."""
    if device_type == "cpu":
        return "cpu"
    if device_type == "cuda":
        try:
            _triton_launch()
        except ImportError:
            reason = "triton cannot be imported; install it"
        else:
            return "triton"
    else:
        reason = "there are kernels for CPU and CUDA only"
    warnings.warn(
        f"directions on {device_type} are drawn by plain torch operations, the same but slower: "
        f"{reason}",
        stacklevel=4,
    )
    return "torch"


def _triton_launch() -> Any:
    """Imported on first use: triton is there only on Linux, and takes a moment to load."""
    from zofo.noise import triton_launch

    return triton_launch


def _combine_triton(weight: Tensor, out: Tensor, *args: Any, **options: Any) -> None:
    _triton_launch().combine(weight, out, *args, **options)


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
    plan = _cpu().Plan(weight.dtype, coefficients, **options)
    _cpu().call_of([weight], [out], [tensor], offset).run(plan)


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
        plan = _cpu().Plan(
            dtype,
            [coefficients],
            decays=[decay],
            steps=[step],
            stochastic=stochastic and dtype.itemsize == 2,
            **options,
        )
        _cpu().call_of(sources, targets, [tensor for _, _, tensor in group]).run(plan)
        for target, (_, out, _) in zip(targets, group, strict=True):
            _hand_back(target, out)


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
    _triton_launch().combine_many(
        sources, targets, coefficients, tensors=[tensor for _, _, tensor in triples], **options
    )
    for target, (_, out, _) in zip(targets, triples, strict=True):
        _hand_back(target, out)


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
        _hand_back(target, out)


_COMBINE: Final[dict[str, Any]] = {
    "cpu": _combine_cpu,
    "triton": _combine_triton,
    "torch": _combine_anywhere,
}


_MANY: Final[dict[str, Any]] = {
    "cpu": _many_by_cpu,
    "triton": _many_by_triton,
    "torch": _many_anywhere,
}


@lru_cache(maxsize=1)
def _cpu() -> Any:
    """Imported on first use: compiled kernels take a moment to load."""
    from zofo.noise import cpu

    return cpu
