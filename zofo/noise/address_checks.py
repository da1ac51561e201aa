"""Checks that a weight has a dtype with kernels, and that the counters can hold its address."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

import torch
from torch import Tensor

from zofo.noise import philox

DTYPES: Final = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def check_tensors(
    weight: Tensor,
    out: Tensor,
    num_directions: int,
    seed: int,
    step: int,
    tensor: int,
    first_direction: int,
    offset: int,
) -> None:
    """Raise ValueError for a dtype, shape, device or address that the kernels cannot serve."""
    if weight.dtype not in DTYPES:
        raise ValueError(
            f"dtype {weight.dtype} cannot be perturbed; load the base in one of "
            + ", ".join(str(d) for d in DTYPES)
        )
    if out.shape != weight.shape or out.dtype != weight.dtype or out.device != weight.device:
        raise ValueError(
            f"out is {tuple(out.shape)} {out.dtype} on {out.device}, weight is "
            f"{tuple(weight.shape)} {weight.dtype} on {weight.device}; they must be equal"
        )
    check_address(seed=seed, step=step, num_directions=first_direction + num_directions)
    check_limits(
        {
            "tensor": (tensor, philox.MAX_TENSORS),
            # A Gaussian block holds the fewest elements, four.
            "offset + elements": (offset + weight.numel(), philox.MAX_BLOCKS * 4),
        }
    )


def check_address(*, seed: int, step: int, num_directions: int) -> None:
    """Raise ValueError for a seed, step or number of directions that the counters cannot hold."""
    check_limits(
        {
            "seed": (seed, 2**64),
            "step": (step, philox.MAX_STEP),
            "first_direction + directions": (num_directions, philox.MAX_DIRECTIONS),
        }
    )


def check_limits(limits: Mapping[str, tuple[int, int]]) -> None:
    """Raise ValueError for a value outside [0, limit); `limits` is name -> (value, limit)."""
    for name, (value, limit) in limits.items():
        if not 0 <= value < limit:
            raise ValueError(f"{name} is {value}; it must lie in [0, {limit})")
