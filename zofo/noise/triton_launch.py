"""Launch the CUDA kernels.

A launch for many tensors reads their addresses from a table on the device. The table is made once
for each set of tensors. The caller of `layout_of` keeps it, or else a small cache does. At most one
coefficient of the host travels as an argument, and several travel through pinned memory.
Coefficients on the device stay there. So a step never waits.
"""

from __future__ import annotations

import contextlib
import struct
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Final

import torch
import triton
import triton.language as tl
from torch import Tensor

from zofo.noise import triton_kernels

_BLOCKS_PER_TILE: Final = 16  # a choice: 16 elements for each of a program's 128 threads
_NAMES: Final = {
    torch.float32: tl.float32,
    torch.float64: tl.float64,
    torch.bfloat16: tl.bfloat16,
    torch.float16: tl.float16,
}


def _num_tiles(num_elements: int, blocks: int) -> int:
    return -(-num_elements // (blocks * 128))


def _new_table(
    device: torch.device, rows: tuple[tuple[int, int, int, int, int, int], ...]
) -> tuple[Tensor, Tensor]:
    """Make the table of `triton_kernels.combine_tensors`, and the row of each of its tiles.

    Returns:
        int64, [tensors, 7], and int32, [tiles].
    """
    # The first block may begin before the offset.
    tiles = torch.tensor([_num_tiles(row[5] % 128 + row[2], _BLOCKS_PER_TILE) for row in rows])
    first = (tiles.cumsum(0) - tiles).tolist()
    table = torch.tensor([(*row, start) for row, start in zip(rows, first, strict=True)])
    tensor_of_tile = torch.repeat_interleave(torch.arange(len(rows)), tiles).int()
    return table.to(device), tensor_of_tile.to(device)


# The key determines the table completely, so a cached one is right even if memory was reused.
_table = lru_cache(maxsize=32)(_new_table)


def combine(
    weight: Tensor,
    out: Tensor,
    coefficients: Sequence[Sequence[float]],
    *,
    decays: Sequence[float],
    steps: Sequence[int],
    tensor: int,
    offset: int,
    **drawing: Any,
) -> None:
    """Compute one tensor after one update for each of `steps`.

    Arguments as for `zofo.noise.backends.compute`; weight and out are contiguous and not empty.
    """
    size = weight.numel()
    _launch_rows(
        weight,
        out,
        None,
        size,
        # The first block may begin before the offset.
        num_programs=_num_tiles(offset % 128 + size, _BLOCKS_PER_TILE),
        blocks=_BLOCKS_PER_TILE,
        offset=offset,
        tensor=tensor,
        scalars=_host_scalars(coefficients, decays, steps, weight.device),
        **drawing,
    )


def combine_rows(
    table: Tensor, rows: Tensor, coefficient: float, *, step: int, tensor: int, **drawing: Any
) -> None:
    """Perturb a table of rows in place, in one launch.

    Args:
        table: [n, width], contiguous, not empty; row i is row rows[i] of the whole tensor.
        rows: int64, [n].
        coefficient: factor of the direction.
        step: address of the direction.
        tensor: the tensor index.
        drawing: seed, purpose, first_direction and stochastic.
    """
    width = table.shape[1]
    # A row may begin anywhere in a block, which adds up to 127 elements. A tile that is larger than
    # that would compute elements that nothing uses.
    blocks = min(_BLOCKS_PER_TILE, triton.next_power_of_2(-(-(width + 127) // 128)))
    tiles_per_row = _num_tiles(width + 127, blocks)
    _launch_rows(
        table,
        table,
        rows.to(table.device).contiguous(),
        width,
        num_programs=len(rows) * tiles_per_row,
        tiles_per_row=tiles_per_row,
        blocks=blocks,
        offset=0,
        tensor=tensor,
        scalars=_host_scalars([(coefficient,)], (1.0,), (step,), table.device),
        **drawing,
    )


def fill_signs(
    drawn: Tensor, *, seed: int, step: int, first_direction: int, tensor: int, purpose: int
) -> None:
    """Fill float32 [directions, size] with the signs of one side of a matrix, in one launch."""
    num_directions, size = drawn.shape
    tiles_per_row = _num_tiles(size, _BLOCKS_PER_TILE)
    with _on(drawn.device):
        triton_kernels.fill_signs[(num_directions * tiles_per_row,)](
            drawn,
            size,
            tiles_per_row,
            tensor,
            seed=seed,
            step=step,
            first_direction=first_direction,
            PURPOSE=purpose,
            BLOCKS=_BLOCKS_PER_TILE,
        )


def combine_many(
    weights: Sequence[Tensor],
    outs: Sequence[Tensor],
    coefficients: Sequence[float] | Tensor,
    *,
    tensors: Sequence[int],
    offsets: Sequence[int],
    **drawing: Any,
) -> None:
    """Lay out and compute tensors of one device; further arguments as for `run_layout`.

    There is one launch for each dtype, and one more for those of its tensors that do not begin at a
    multiple of 16 bytes. Weights and outs are contiguous and not empty.
    """
    run_layout(layout_of(weights, outs, tensors, offsets, table_of=_table), coefficients, **drawing)


@dataclass(frozen=True)
class Layout:
    """Tensors of one device, with a table for each dtype and alignment."""

    device: torch.device
    # Dtype, whether all addresses are aligned, and the two tensors of `_new_table`.
    tables: tuple[tuple[torch.dtype, bool, Tensor, Tensor], ...]


def layout_of(
    weights: Sequence[Tensor],
    outs: Sequence[Tensor],
    tensors: Sequence[int],
    offsets: Sequence[int],
    *,
    table_of: Callable[..., tuple[Tensor, Tensor]] = _new_table,
) -> Layout:
    """Lay out tensors as for `combine_many`; their memory must not move.

    `table_of` finds the tables in a cache, or makes them, which waits for the device.
    """
    device = weights[0].device
    groups: dict[tuple[torch.dtype, bool], list[tuple[int, int, int, int, int, int]]] = {}
    for weight, out, tensor, offset in zip(weights, outs, tensors, offsets, strict=True):
        width = _width(weight)
        row = (weight.data_ptr(), out.data_ptr(), weight.numel(), width, tensor, offset)
        # Tiles begin whole blocks after the tensor's address, less the offset.
        is_aligned = _is_aligned(row[0], row[1], offset * weight.element_size())
        groups.setdefault((weight.dtype, is_aligned), []).append(row)
    return Layout(
        device, tuple((*group, *table_of(device, tuple(rows))) for group, rows in groups.items())
    )


def run_layout(
    layout: Layout,
    coefficients: Sequence[float] | Tensor,
    *,
    decay: float,
    step: int,
    seed: int,
    purpose: int,
    first_direction: int,
    stochastic: bool,
) -> None:
    """Launch a kernel for each table; arguments as for `zofo.noise.combine.combine_many`."""
    device = layout.device
    if isinstance(coefficients, Tensor):
        on_device = coefficients.detach().to(device, torch.float64).contiguous()
        scalars = _scalars(triton_kernels.DEVICE, on_device, len(on_device), decay=decay, step=step)
    else:
        scalars = _host_scalars([coefficients], (decay,), (step,), device)
    for dtype, is_aligned, table, tensor_of_tile in layout.tables:
        with _on(device):
            triton_kernels.combine_tensors[(len(tensor_of_tile),)](
                table,
                tensor_of_tile,
                seed=seed,
                first_direction=first_direction,
                **{name: value for name, value in scalars.items() if name != "num_steps"},
                DTYPE=_NAMES[dtype],
                STORED=_NAMES[dtype] if dtype.itemsize > 2 else tl.uint16,
                PURPOSE=purpose,
                STOCHASTIC=stochastic and dtype.itemsize == 2,
                ALIGNED=is_aligned,
                BLOCKS=_BLOCKS_PER_TILE,
                enable_fp_fusion=False,
            )


def _launch_rows(
    weight: Tensor,
    out: Tensor,
    rows: Tensor | None,
    size: int,
    *,
    num_programs: int,
    blocks: int,
    offset: int,
    tensor: int,
    purpose: int,
    stochastic: bool,
    scalars: dict[str, Any],
    tiles_per_row: int = 1,
    **drawing: Any,
) -> None:
    dtype = weight.dtype
    if dtype.itemsize == 2:
        # The kernels convert the bits of 16-bit floats themselves.
        weight, out = weight.view(torch.uint16), out.view(torch.uint16)
    # Tiles begin whole blocks after the tensor's address, less the offset. Offsets of rows are
    # multiples of the width.
    step_bytes = (offset if rows is None else size) * dtype.itemsize
    with _on(weight.device):
        triton_kernels.combine_rows[(num_programs,)](
            weight,
            out,
            rows,
            offset,
            size,
            _width(weight),
            tiles_per_row,
            tensor,
            **drawing,
            **scalars,
            DTYPE=_NAMES[dtype],
            PURPOSE=purpose,
            STOCHASTIC=stochastic and dtype.itemsize == 2,
            ALIGNED=_is_aligned(weight.data_ptr(), out.data_ptr(), step_bytes),
            BLOCKS=blocks,
            HAS_ROWS=rows is not None,
            enable_fp_fusion=False,
        )


def _width(weight: Tensor) -> int:
    """Elements in a row, of a matrix."""
    return weight.shape[-1] if weight.ndim else 1


def _is_aligned(*num_bytes: int) -> bool:
    return all(n % 16 == 0 for n in num_bytes)


def _on(device: torch.device) -> contextlib.AbstractContextManager[Any]:
    # Triton launches on the current device.
    return torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()


def _host_scalars(
    coefficients: Sequence[Sequence[float]],
    decays: Sequence[float],
    steps: Sequence[int],
    device: torch.device,
) -> dict[str, Any]:
    """The scalars as arguments if there is at most one coefficient; else copied without a wait."""
    num_directions = max(map(len, coefficients))
    if len(steps) == 1 and num_directions <= 1:
        (row,) = coefficients
        return _scalars(
            triton_kernels.ARGUMENT,
            None,
            num_directions,
            coefficient=row[0] if row else 0.0,
            decay=decays[0],
            step=steps[0],
        )
    table = torch.tensor(
        [(step, decay, *row) for step, decay, row in zip(steps, decays, coefficients, strict=True)],
        dtype=torch.float64,
    )
    if device.type == "cuda":
        # Only a copy from pinned memory does not wait.
        table = table.pin_memory().to(device, non_blocking=True)
    return _scalars(triton_kernels.SCHEDULE, table, num_directions, num_steps=len(steps))


def _scalars(
    kind: tl.constexpr,
    scalars: Tensor | None,
    num_directions: int,
    *,
    coefficient: float = 0.0,
    decay: float = 1.0,
    step: int = 0,
    num_steps: int = 1,
) -> dict[str, Any]:
    return {
        "SCALARS": kind.value,
        "scalars": scalars,
        "NUM_DIRECTIONS": num_directions,
        "num_steps": num_steps,
        "coefficient": _bits(coefficient),
        "decay": _bits(decay),
        "step": step,
    }


def _bits(x: float) -> int:
    # The bits of the double, as a signed integer.
    return int(struct.unpack("<q", struct.pack("<d", x))[0])
