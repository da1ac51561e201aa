"""Checks that an address of the noise lies within what the counters hold."""

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
    """Refuse tensors and an address that the kernels cannot serve.

    Raises:
        ValueError: for a dtype, shape, device or counter out of range.
    """
    if weight.dtype not in DTYPES:
        raise ValueError(
            f"dtype {weight.dtype} cannot be perturbed; load the base in one of "
            + ", ".join(str(d) for d in DTYPES)
        )
    if out.shape != weight.shape or out.dtype != weight.dtype or out.device != weight.device:
        raise ValueError(
            f"out is {tuple(out.shape)} {out.dtype} on {out.device}, weight is "
            f"{tuple(weight.shape)} {weight.dtype} on {weight.device}; they must agree"
        )
    check_address(seed=seed, step=step, num_directions=first_direction + num_directions)
    limits = {
        "tensor": (tensor, philox.MAX_TENSORS),
        "offset + elements": (offset + weight.numel(), philox.MAX_BLOCKS * 4),
    }
    check_limits(limits)


def check_address(*, seed: int, step: int, num_directions: int) -> None:
    """Refuse a seed, a step or a number of directions that the counters cannot hold."""
    check_limits(
        {
            "seed": (seed, 2**64),
            "step": (step, philox.MAX_STEP),
            "first_direction + directions": (num_directions, philox.MAX_DIRECTIONS),
        }
    )


def check_limits(limits: Mapping[str, tuple[int, int]]) -> None:
    """Refuse a value outside [0, limit); `limits` maps a name to value and limit."""
    for name, (value, limit) in limits.items():
        if not 0 <= value < limit:
            raise ValueError(f"{name} is {value}; it must lie in [0, {limit})")
