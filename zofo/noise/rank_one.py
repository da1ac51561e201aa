"""Rank-one directions of a matrix, v = a bᵀ: the signs a of its rows and b of its columns.

    E vvᵀ = I, as for independent signs; v has m + n random signs instead of m · n
    (W + eps · v) x = W x + eps · a (b · x)

So a layer is evaluated at a perturbed weight without computing that weight, and each row of a batch
may have a direction of its own. `zofo.noise.combine` applies these directions to a weight under the
distribution "rank-one".

References:
    "Evolution Strategies at the Hyperscale" (EGGROLL), arXiv 2511.16652: low-rank perturbations.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any, Final, Literal

import torch
from torch import Tensor

from zofo.noise import backends, philox
from zofo.noise.address_checks import check_address

Side = Literal["rows", "columns"]
_PURPOSES: Final = {"rows": philox.ROWS, "columns": philox.COLUMNS}


def signs(
    size: int,
    side: Side,
    *,
    num_directions: int,
    first_direction: int,
    seed: int,
    step: int,
    tensor: int,
    device: torch.device | str = "cpu",
) -> Tensor:
    """Draw the signs of one side of a matrix, for several directions.

    Args:
        size: number of rows or columns of the matrix.
        side: "rows" for a, "columns" for b.
        num_directions: K.
        first_direction: index of the first direction.
        seed: seed of the run, in [0, 2^64).
        step: in [0, 2^32).
        tensor: the tensor's index.
        device: where the signs are needed.

    Returns:
        ±1, float32, [K, size].

    Raises:
        ValueError: for an address outside its range.
    """
    check_address(seed=seed, step=step, num_directions=first_direction + num_directions)
    purpose = _PURPOSES[side]
    address: dict[str, Any] = {"seed": seed, "step": step, "tensor": tensor, "purpose": purpose}
    chosen = backends.backend(torch.device(device).type)
    if chosen == "torch":
        elements = torch.arange(size, device=device).expand(num_directions, size)
        directions = torch.arange(num_directions, device=device)[:, None] + first_direction
        return philox.rademacher(elements, direction=directions, **address)
    drawn = torch.empty(num_directions, size, device=device)
    if chosen == "triton":
        backends.triton_launch().fill_signs(drawn, first_direction=first_direction, **address)
    else:
        _filler()(drawn.numpy(), seed, step, first_direction, tensor, purpose)
    return drawn


def signs_of_rows(rows: Tensor, directions: Tensor, *, seed: int, step: int, tensor: int) -> Tensor:
    """Draw the signs a of some rows of a matrix, such as the rows that an embedding reads.

    Args:
        rows: int64, any shape.
        directions: the direction of each of them, int64, of a shape that broadcasts to `rows`.
        seed: seed of the run.
        step: address of the directions.
        tensor: the tensor's index.

    Returns:
        ±1, float32, shape of `rows`.
    """
    return philox.rademacher(
        rows, direction=directions, seed=seed, step=step, tensor=tensor, purpose=philox.ROWS
    )


@lru_cache(maxsize=1)
def _filler() -> Any:
    """The compiled function, imported on first use because numba loads slowly."""
    from zofo.noise import kernels

    return kernels.sign_filler()
