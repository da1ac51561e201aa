"""Moves a weight a share of the way back to where it began.

    w ← round(w + share · (w_0 − w))

The plain torch operations below have the same bits on every device. On the CPU, a kernel with these
bits takes 16-bit weights (`zofo.noise.kernel_pull`). They are rounded stochastically, from other
counters than in an update; a weight that equals w_0 has nothing to round.
"""

from __future__ import annotations

from typing import Final

import torch
from torch import Tensor

from zofo.noise.philox import (
    ELEMENTS_PER_BLOCK,
    ROUNDING,
    round_stochastically,
    rounding_bits,
    words,
)

_DRAW: Final = 1
"""Number of the rounding of a pull within a step; that of the update is 0."""
_CHUNK: Final = 1 << 18
"""Elements that the torch operations take at a time: a multiple of a block of random words."""


@torch.no_grad()
def pull(
    parameter: Tensor, origin: Tensor, share: float, *, seed: int, step: int, tensor: int
) -> None:
    """Move a weight towards its origin, in place.

    Args:
        parameter: the whole weight: float32, float64, bfloat16 or float16, of any strides.
        origin: its value before training, of its shape and dtype, on any device.
        share: of the way, rounded to float32 (float64 for a float64 weight).
        seed: seed of the run.
        step: of the update.
        tensor: the tensor index; it addresses the bits of the rounding with seed and step.
    """
    weight = parameter.detach()
    here = weight.contiguous().view(-1)
    there = origin.to(weight.device).contiguous().view(-1)
    if weight.device.type == "cpu" and weight.dtype.itemsize == 2:
        from zofo.noise.kernel_pull import puller  # Numba loads slowly.

        seen_as = torch.uint16 if weight.dtype == torch.bfloat16 else torch.int16  # by the kernel
        now, goal = (part.view(seen_as).numpy() for part in (here, there))
        puller(now.dtype)(now, goal, share, seed, step, _DRAW, tensor)
        torch.autograd.graph.increment_version(parameter)
    else:
        pull_by_torch(here, there, share, seed=seed, step=step, tensor=tensor)
    if here.data_ptr() != weight.data_ptr():
        weight.copy_(here.view(weight.shape))


def pull_by_torch(
    weight: Tensor, origin: Tensor, share: float, *, seed: int, step: int, tensor: int
) -> None:
    """`pull` of a contiguous weight [n] to its origin [n] on the same device."""
    wide = torch.float64 if weight.dtype == torch.float64 else torch.float32
    factor = torch.tensor(share, dtype=wide)
    for start in range(0, weight.numel(), _CHUNK):
        here, there = weight[start : start + _CHUNK], origin[start : start + _CHUNK]
        # Separate operations, because a fused one rounds only once on some devices.
        if weight.dtype == wide:
            here += (there - here) * factor
            continue
        places = (here != there).nonzero()[:, 0]  # few, if updates are small
        exact = here[places].to(wide)
        exact += (there[places].to(wide) - exact) * factor
        bits = _bits_at(places, start, len(here), seed=seed, step=step, tensor=tensor)
        here[places] = round_stochastically(exact, bits, weight.dtype)


def _bits_at(places: Tensor, start: int, size: int, **address: int) -> Tensor:
    """The bits of a pull's rounding at some places of the `size` elements from `start` on."""
    each = ELEMENTS_PER_BLOCK[ROUNDING]
    if len(places) * each < size:
        return rounding_bits(places + start, draw=_DRAW, **address)
    # The bits of all elements cost less, because those of a block come from one evaluation.
    first = torch.arange(start, start + size, each, device=places.device)
    four = words(first, direction=_DRAW, purpose=ROUNDING, **address)  # [blocks, 4], two in each
    return torch.stack((four & 0xFFFF, four >> 16), -1).reshape(-1)[places]
