"""The directions of many seeds and steps at once, for studies that run many seeds side by side.

The numbers are those of `zofo.noise.combine` at the same addresses: its kernels draw them.
"""

# Numba reads the kernel's types from its arguments.
# mypy: disallow-untyped-defs=False, disallow-untyped-calls=False, check-untyped-defs=False
from __future__ import annotations

from collections.abc import Sequence

import numba
import numpy as np
import torch
from torch import Tensor

from zofo.noise import Distribution, kernels, philox


@numba.njit(cache=True)
def _draw(out, seeds, first_step, tensor, purpose):
    """Fill out [steps, directions, seeds, elements] with directions."""
    num_steps, num_directions, num_seeds, num = out.shape
    words = np.empty(num + 256, np.uint32)
    values = np.empty(num + 256, np.float32)
    one = np.float64(1)
    for t in range(num_steps):
        step = np.uint64(first_step + t)
        for k in range(num_directions):
            for s in range(num_seeds):
                row, seed, index = out[t, k, s], seeds[s], np.uint64(k)
                if purpose == philox.RADEMACHER:
                    kernels._add_rademacher(row, words, 0, num, one, seed, step, index, tensor)
                else:
                    kernels._add_gaussian(row, words, values, 0, num, one, seed, step, index, tensor)


def directions_of_seeds(
    num_elements: int,
    seeds: Sequence[int],
    *,
    first_step: int,
    num_steps: int,
    num_directions: int = 1,
    tensor: int = 0,
    distribution: Distribution = "rademacher",
) -> Tensor:
    """The directions of one tensor.

    Args:
        num_elements: of the tensor.
        seeds: run seeds in [0, 2^64).
        first_step: address of the first step.
        num_steps: steps from there on.
        num_directions: directions a step.
        tensor: the tensor's index.
        distribution: "rademacher" or "gaussian".

    Returns:
        float64 with float32's values, [steps, directions, seeds, elements].
    """
    out = np.zeros((num_steps, num_directions, len(seeds), num_elements))
    purpose = philox.RADEMACHER if distribution == "rademacher" else philox.GAUSSIAN
    keys = np.array([*seeds], dtype=np.uint64)
    _draw(out, keys, first_step, np.uint64(tensor), purpose)
    return torch.from_numpy(out)
