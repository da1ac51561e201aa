"""Directions and what is done with them: w + Σ_k c_k v_k, read, drawn and written in one pass.

One function, `combine`, serves the perturbation (one coefficient, into a scratch buffer, rounded to
nearest) and the update (one coefficient a direction, in place, rounded stochastically);
`combine_many` is the same for the tensors of a whole model. On the CPU they run compiled kernels
over the threads torch is set to use, on CUDA Triton kernels, elsewhere the torch reference.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache, partial
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
]

Distribution = Literal["rademacher", "gaussian"]
DISTRIBUTIONS: Final[tuple[str, ...]] = get_args(Distribution)
_PURPOSE: Final = {"rademacher": philox.RADEMACHER, "gaussian": philox.GAUSSIAN}
# Numba has no 16-bit floats.
_SEEN_AS: Final = {torch.bfloat16: torch.uint16, torch.float16: torch.int16}
_DTYPES: Final = (torch.float32, torch.float64, torch.bfloat16, torch.float16)

# Below this many elements a second thread costs more than it saves (about 30 µs a hand-over).
_MIN_ELEMENTS_PER_THREAD: Final = 1 << 17


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
    for device, triples in per_device.items():
        if _backend(device.type) == "triton":
            _many_by_triton(
                [triple for triple in triples if triple[0].numel()],
                coefficients,
                decay=decay,
                purpose=_PURPOSE[distribution],
                stochastic=rounding == "stochastic",
                **address,
            )
            continue
        values = coefficients
        if isinstance(values, Tensor):
            values = values.tolist()
            if not all(map(math.isfinite, values)):
                continue
        for weight, out, tensor in triples:
            combine(
                weight,
                values,
                tensor=tensor,
                out=out,
                decay=decay,
                distribution=distribution,
                rounding=rounding,
                **address,
            )
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

    np, kernels = _numpy_and_kernels()
    (view,), wide = _views(table)
    kernels.combine_rows(
        view.reshape(table.shape),
        rows.numpy(),
        np.asarray([[coefficient]], dtype=wide),
        np.ones(1, dtype=wide),
        np.asarray([step], dtype=np.uint64),
        np.uint64(seed),
        np.uint64(tensor),
        _PURPOSE[distribution],
        first_direction,
    )
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
    limits = {
        "seed": (seed, 2**64),
        "step": (step, philox.MAX_STEP),
        "tensor": (tensor, philox.MAX_TENSORS),
        "first_direction + directions": (first_direction + num_directions, philox.MAX_DIRECTIONS),
        "offset + elements": (offset + weight.numel(), philox.MAX_BLOCKS * 4),
    }
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
    decays: Sequence[float],
    steps: Sequence[int],
    seed: int,
    tensor: int,
    offset: int,
    purpose: int,
    first_direction: int,
    stochastic: bool,
) -> None:
    np, kernels = _numpy_and_kernels()
    arrays, wide = _views(weight, out)
    shared = (
        np.asarray(coefficients, dtype=wide).reshape(len(steps), -1),
        np.asarray(decays, dtype=wide),
        np.asarray(steps, dtype=np.uint64),
        np.uint64(seed),
        np.uint64(tensor),
        offset,
        purpose,
        first_direction,
        stochastic,
        weight.data_ptr() == out.data_ptr(),
    )
    kernel: Any = kernels.combine
    size = weight.numel()
    threads = min(torch.get_num_threads(), max(1, size // _MIN_ELEMENTS_PER_THREAD))
    if threads == 1:
        kernel(*arrays, 0, size, *shared)
        return
    share = -(-size // threads)
    bounds = [(i, min(i + share, size)) for i in range(0, size, share)]
    jobs = [
        _pool(threads).submit(partial(kernel, *arrays, begin, end, *shared))
        for begin, end in bounds[1:]
    ]
    kernel(*arrays, *bounds[0], *shared)
    for job in jobs:
        job.result()


_COMBINE: Final[dict[str, Any]] = {
    "cpu": _combine_cpu,
    "triton": _combine_triton,
    "torch": _combine_anywhere,
}


def _views(*tensors: Tensor) -> tuple[list[Any], Any]:
    """One-dimensional arrays over the tensors' memory, and the dtype of the arithmetic."""
    np, _ = _numpy_and_kernels()
    dtype = tensors[0].dtype
    if dtype in _SEEN_AS:
        return [t.view(-1).view(_SEEN_AS[dtype]).numpy() for t in tensors], np.float32
    return [
        t.numpy().reshape(-1) for t in tensors
    ], np.float64 if dtype == torch.float64 else np.float32


@lru_cache(maxsize=1)
def _numpy_and_kernels() -> tuple[Any, Any]:
    """Imported on first use: compiled kernels take a moment to load."""
    import numpy as np

    from zofo.noise import kernels

    return np, kernels


@lru_cache(maxsize=1)
def _pool(threads: int) -> ThreadPoolExecutor:
    """Threads for the kernels, which release the interpreter lock."""
    return ThreadPoolExecutor(max_workers=threads, thread_name_prefix="zofo-noise")
