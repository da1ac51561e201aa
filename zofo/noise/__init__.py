"""Directions and what is done with them: w + Σ_k c_k v_k, read, drawn and written in one pass.

One function, `combine`, serves the perturbation (one coefficient, into a scratch buffer, rounded to
nearest) and the update (one coefficient a direction, in place, rounded stochastically). On the CPU
it runs compiled kernels over the threads torch is set to use; elsewhere the torch reference.
"""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache, partial
from typing import Any, Final, Literal, get_args

import torch
from torch import Tensor

from zofo.noise import philox
from zofo.noise.philox import NOISE_VERSION

__all__ = ["DISTRIBUTIONS", "NOISE_VERSION", "Distribution", "combine", "direction"]

Distribution = Literal["rademacher", "gaussian"]
DISTRIBUTIONS: Final[tuple[str, ...]] = get_args(Distribution)
_PURPOSE: Final = {"rademacher": philox.RADEMACHER, "gaussian": philox.GAUSSIAN}
_DTYPES: Final = (torch.float32, torch.float64, torch.bfloat16, torch.float16)

# Below this many elements a second thread costs more than it saves (about 30 µs a hand-over).
_MIN_ELEMENTS_PER_THREAD: Final = 1 << 17


@torch.no_grad()
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
    out = weight if out is None else out
    _check(weight, out, len(coefficients), seed, step, tensor, first_direction, offset)
    if weight.numel() == 0:
        return out
    # Kernels walk row-major memory; another layout goes through a copy.
    source = weight.detach().contiguous()
    target = out.detach() if out.is_contiguous() else torch.empty_like(source)
    arguments = {
        "decay": decay,
        "seed": seed,
        "step": step,
        "tensor": tensor,
        "offset": offset,
        "purpose": _PURPOSE[distribution],
        "first_direction": first_direction,
        "stochastic": rounding == "stochastic" and weight.element_size() == 2,
    }
    run = _combine_cpu if weight.device.type == "cpu" else philox.combine
    run(source, target, tuple(coefficients), **arguments)  # type: ignore[arg-type]
    if target.data_ptr() != out.data_ptr():
        out.copy_(target)
    elif not out.is_inference():
        torch.autograd.graph.increment_version(out)
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


def _combine_cpu(
    weight: Tensor,
    out: Tensor,
    coefficients: tuple[float, ...],
    *,
    decay: float,
    seed: int,
    step: int,
    tensor: int,
    offset: int,
    purpose: int,
    first_direction: int,
    stochastic: bool,
) -> None:
    import numpy as np

    from zofo.noise import kernels

    view = {torch.bfloat16: torch.uint16, torch.float16: torch.int16}.get(weight.dtype)
    w, o = (t.view(-1) if view is None else t.view(-1).view(view) for t in (weight, out))
    wide = np.float64 if weight.dtype == torch.float64 else np.float32
    shared = (
        np.asarray(coefficients, dtype=wide),
        wide(decay),
        np.uint64(seed),
        np.uint64(step),
        np.uint64(tensor),
        offset,
        purpose,
        first_direction,
        stochastic,
    )
    kernel: Any = kernels.combine
    arrays = w.numpy(), o.numpy()
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


@lru_cache(maxsize=1)
def _pool(threads: int) -> ThreadPoolExecutor:
    """Threads for the kernels, which release the interpreter lock."""
    return ThreadPoolExecutor(max_workers=threads, thread_name_prefix="zofo-noise")
