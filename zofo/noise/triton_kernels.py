"""The CUDA kernels: one launch for many tensors, w read once and out written once.

    out[i] = round(decay · w[i] + Σ_k c_k v_k[offset + i])

A program works on a tile of 32 blocks of 128 elements. It draws the blocks' words once and spreads
them to [words, 32], one bit an element, so that neighbouring threads read neighbouring memory.
Tensors are found through a table on the device, made once for each set of them; seed, step and
scalars are arguments that compile nothing anew, or, where they lie on the device, are read there.

The bits are the reference's. Three things see to that:
  - enable_fp_fusion=False at every launch: a fused multiply-add would round once where the
    reference rounds twice;
  - the Gaussian's logarithm, sine and cosine are series in plain float32 arithmetic with IEEE
    division and square root, so they depend on no device's library;
  - 16-bit values are packed and unpacked by integer arithmetic. Triton's interpreter
    (TRITON_INTERPRET=1, which the tests use) keeps bfloat16 in integers and does not round to
    nearest even where a compiled conversion does.
A NaN stays a NaN, but its sign and payload are the device's. The interpreter also differs in that
an argument annotated as float64 arrives as float32: doubles travel as int64 bits.
"""

# Triton reads these functions' types from their arguments.
# mypy: disallow-untyped-defs=False, disallow-untyped-calls=False, check-untyped-defs=False
from __future__ import annotations

import contextlib
import math
import struct
from collections.abc import Sequence
from functools import lru_cache
from typing import Any, Final

import torch
import triton
import triton.language as tl
from torch import Tensor

from zofo.noise import philox

_RADEMACHER = tl.constexpr(philox.RADEMACHER)
_ROUNDING = tl.constexpr(philox.ROUNDING)
_LN2 = tl.constexpr(math.log(2))
_TURN = tl.constexpr(2 * math.pi * 2.0**-32)

# Where the coefficients are: one as an argument; [directions] on the device, whose values may be
# anything; [steps, 2 + directions] on the device: step, decay, coefficients (float64 holds a step).
_ARGUMENT = tl.constexpr(0)
_DEVICE = tl.constexpr(1)
_SCHEDULE = tl.constexpr(2)

_BLOCKS_PER_TILE: Final = 32
_NAMES: Final = {
    torch.float32: tl.float32,
    torch.float64: tl.float64,
    torch.bfloat16: tl.bfloat16,
    torch.float16: tl.float16,
}
# Values that no kernel is compiled anew for.
_ARGUMENTS: Final = (
    "offset size tiles_per_row tensor seed step decay coefficient scalars num_steps "
    "num_directions first_direction"
).split()


@triton.jit
def _words(first_block, COUNT: tl.constexpr, seed, step, direction, tensor, PURPOSE: tl.constexpr):
    """The words of COUNT blocks: uint32 [COUNT, 2, 2], word 2i + j of a block at [i, j]."""
    block = first_block + tl.arange(0, COUNT)
    w0, w1, w2, w3 = tl.philox(
        seed,
        block.to(tl.uint32),
        (block >> 32).to(tl.uint32) | (tensor << 12),
        step,
        direction | (PURPOSE << 24),
    )
    return tl.join(tl.join(w0, w2), tl.join(w1, w3))


@triton.jit
def _normal_pairs(word_1, word_2):
    """Two standard normals from two words (Box-Muller), float32."""
    u = (word_1.to(tl.float32) + 0.5) * 2.3283064365386963e-10
    # ln u = e ln 2 + 2 artanh(s), m in [sqrt(1/2), sqrt 2), s = (m - 1)/(m + 1), |s| < 0.172
    bits = u.to(tl.uint32, bitcast=True) + (0x3F800000 - 0x3F3504F3)
    e = ((bits >> 23).to(tl.int32) - 127).to(tl.float32)
    m = ((bits & 0x7FFFFF) + 0x3F3504F3).to(tl.float32, bitcast=True)
    s = tl.div_rn(m - 1.0, m + 1.0)
    z = s * s
    series = 0.3333333333333333 + z * (0.2 + z * (0.14285714285714285 + z * 0.1111111111111111))
    log = e * _LN2 + 2.0 * (s + s * z * series)
    # The rounded e·ln 2 + ... of u near 1 may be a hair above zero.
    radius = tl.sqrt_rn(tl.maximum(-2.0 * log, 0.0))
    # The angle's nearest quarter turn, and the rest in [-1/8, 1/8) of a turn.
    quarter = (word_2 + (1 << 29)) >> 30
    t = (word_2 - (quarter << 30)).to(tl.int32, bitcast=True).to(tl.float32) * _TURN
    t2 = t * t
    a = -0.0001984126984126984 + t2 * 2.7557319223985893e-06
    sine = t + t * t2 * (-0.16666666666666666 + t2 * (0.008333333333333333 + t2 * a))
    b = 2.48015873015873e-05 + t2 * -2.755731922398589e-07
    b = 0.041666666666666664 + t2 * (-0.001388888888888889 + t2 * b)
    cosine = 1.0 + t2 * (-0.5 + t2 * b)
    odd = (quarter & 1) != 0
    x = tl.where(odd, sine, cosine)
    y = tl.where(odd, cosine, sine)
    x = tl.where((quarter == 1) | (quarter == 2), -x, x)
    y = tl.where(quarter >= 2, -y, y)
    return radius * x, radius * y


@triton.jit
def _unpack(stored, DTYPE: tl.constexpr):
    """What is kept in memory, in the dtype of the arithmetic."""
    if DTYPE == tl.bfloat16:
        return (stored.to(tl.uint32) << 16).to(tl.float32, bitcast=True)
    elif DTYPE == tl.float16:
        return stored.to(tl.float16, bitcast=True).to(tl.float32)
    else:
        return stored


@triton.jit
def _pack(x, draws, DTYPE: tl.constexpr, STOCHASTIC: tl.constexpr):
    """Round x to DTYPE as `philox.round_stochastically`, or to nearest even; 16 bits as uint16."""
    if DTYPE == tl.bfloat16:
        bits = x.to(tl.uint32, bitcast=True)
        nearest = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
        packed = tl.where(x == x, nearest, 0x7FC0)
        if STOCHASTIC:
            packed = tl.where(tl.abs(x) < float("inf"), (bits + draws) >> 16, packed)
        return packed.to(tl.uint16)
    elif DTYPE == tl.float16:
        if STOCHASTIC:
            bits = x.to(tl.uint32, bitcast=True)
            sign = bits & 0x80000000
            cut = ((((bits & 0x7FFFFFFF) + (draws >> 3)) & 0xFFFFE000) | sign).to(
                tl.float32, bitcast=True
            )
            # Below 2^-14 the spacing of float16 is 2^-24, whatever the exponent: the number of
            # spacings is what float16 keeps. Other values are kept from the conversion to integer.
            is_tiny = tl.abs(x) < 6.103515625e-05
            spacings = tl.where(is_tiny, tl.abs(x), 0.0) * 16777216.0
            tiny = (spacings + draws.to(tl.float32) * 1.52587890625e-05).to(tl.int32)
            normal = tl.where(tl.abs(x) < float("inf"), cut, x)
            packed = normal.to(tl.float16).to(tl.uint16, bitcast=True).to(tl.uint32)
            packed = tl.where(is_tiny, tiny.to(tl.uint32) | (sign >> 16), packed)
            return packed.to(tl.uint16)
        else:
            return x.to(tl.float16).to(tl.uint16, bitcast=True)
    else:
        return x


@triton.jit
def _add_direction(
    delta, c, first, seed, step, direction, tensor, PURPOSE: tl.constexpr, BLOCKS: tl.constexpr
):
    """delta [words, 32] + c · v, v from element `first` on, the first of a block."""
    if PURPOSE == _RADEMACHER:
        words = _words(first >> 7, BLOCKS, seed, step, direction, tensor, PURPOSE)
        word = tl.reshape(words, [BLOCKS * 4, 1])
        is_negative = (word >> tl.arange(0, 32)[None, :].to(tl.uint32)) & 1
        return delta + tl.where(is_negative != 0, -c, c)
    else:
        words = _words(first >> 2, BLOCKS * 32, seed, step, direction, tensor, PURPOSE)
        word_1, word_2 = tl.split(words)
        cosine, sine = _normal_pairs(word_1, word_2)
        v = tl.reshape(tl.join(cosine, sine), [BLOCKS * 4, 32])
        return delta + v.to(delta.dtype) * c


@triton.jit
def _rounding_bits(first, seed, step, tensor, BLOCKS: tl.constexpr):
    """Sixteen bits for each element: uint32 [words, 32]."""
    zero = tensor * 0
    words = _words(first >> 3, BLOCKS * 16, seed, step, zero, tensor, _ROUNDING)
    word = tl.reshape(words, [BLOCKS * 4, 16])
    return tl.reshape(tl.join(word & 0xFFFF, word >> 16), [BLOCKS * 4, 32])


@triton.jit
def _tile(
    source,
    out,
    tile,
    offset,
    size,
    tensor,
    seed,
    step,
    decay,
    coefficient,
    scalars,
    num_steps,
    num_directions,
    first_direction,
    DTYPE: tl.constexpr,
    PURPOSE: tl.constexpr,
    STOCHASTIC: tl.constexpr,
    SCALARS: tl.constexpr,
    ALIGNED: tl.constexpr,
    BLOCKS: tl.constexpr,
):
    """Tile `tile` of elements offset .. offset + size, which lie at source[0], source[1], ..."""
    WIDE: tl.constexpr = tl.float64 if DTYPE == tl.float64 else tl.float32
    tensor = tensor.to(tl.uint32)
    if SCALARS == _DEVICE:
        # The host has not seen these. Anything but a number: no element is in range.
        for k in range(num_directions):
            is_finite = tl.abs(tl.load(scalars + k)) < float("inf")
            size = tl.where(is_finite, size, 0)
    # Whole blocks: `first` may lie before the offset.
    first = ((offset >> 7) << 7) + tile.to(tl.int64) * (BLOCKS * 128)
    begin = offset - first
    end = begin + size
    source += first - offset
    out += first - offset
    if ALIGNED:
        # What the compiler cannot see, and wide accesses need: these are multiples of 16 bytes.
        source = tl.multiple_of(source, 16)
        out = tl.multiple_of(out, 16)
    at = tl.arange(0, BLOCKS * 4)[:, None] * 32 + tl.arange(0, 32)[None, :]
    # A mask of unknown alignment makes accesses narrow, so whole tiles go without one.
    is_whole = (begin <= 0) & (end >= BLOCKS * 128)
    if is_whole:
        w = tl.load(source + at)
    else:
        w = tl.load(source + at, mask=(at >= begin) & (at < end), other=0)
    for t in range(num_steps if SCALARS == _SCHEDULE else 1):
        now, factor, c = step.to(tl.uint32), decay.to(tl.int64), coefficient.to(tl.int64)
        factor = factor.to(tl.float64, bitcast=True).to(WIDE)
        c = c.to(tl.float64, bitcast=True).to(WIDE)
        coefficients = scalars
        if SCALARS == _SCHEDULE:
            row = scalars + t * (num_directions + 2)
            now = tl.load(row).to(tl.int64).to(tl.uint32)
            factor = tl.load(row + 1).to(WIDE)
            coefficients = row + 2
        delta = tl.zeros([BLOCKS * 4, 32], WIDE)
        for k in range(num_directions):
            if SCALARS != _ARGUMENT:
                c = tl.load(coefficients + k).to(WIDE)
            direction = (first_direction + k).to(tl.uint32)
            delta = _add_direction(delta, c, first, seed, now, direction, tensor, PURPOSE, BLOCKS)
        draws = 0
        if STOCHASTIC:
            draws = _rounding_bits(first, seed, now, tensor, BLOCKS)
        w = _pack(_unpack(w, DTYPE) * factor + delta, draws, DTYPE, STOCHASTIC)
    if is_whole:
        tl.store(out + at, w)
    else:
        tl.store(out + at, w, mask=(at >= begin) & (at < end))


@triton.jit(do_not_specialize=_ARGUMENTS)
def _combine_rows(
    source,
    out,
    rows,
    offset: tl.int64,
    size: tl.int64,
    tiles_per_row: tl.int64,
    tensor: tl.int64,
    seed: tl.uint64,
    step: tl.int64,
    decay: tl.int64,
    coefficient: tl.int64,
    scalars,
    num_steps: tl.int64,
    num_directions: tl.int64,
    first_direction: tl.int64,
    DTYPE: tl.constexpr,
    PURPOSE: tl.constexpr,
    STOCHASTIC: tl.constexpr,
    SCALARS: tl.constexpr,
    ALIGNED: tl.constexpr,
    BLOCKS: tl.constexpr,
    HAS_ROWS: tl.constexpr,
):
    """One tensor from `offset` on; or a table whose row i is row rows[i] of the tensor."""
    program = tl.program_id(0).to(tl.int64)
    if HAS_ROWS:
        row = program // tiles_per_row
        source += row * size
        out += row * size
        offset = tl.load(rows + row) * size
        program = program % tiles_per_row
    _tile(
        source,
        out,
        program,
        offset.to(tl.int64),
        size.to(tl.int64),
        tensor,
        seed,
        step,
        decay,
        coefficient,
        scalars,
        num_steps,
        num_directions,
        first_direction,
        DTYPE,
        PURPOSE,
        STOCHASTIC,
        SCALARS,
        ALIGNED,
        BLOCKS,
    )


@triton.jit(do_not_specialize=_ARGUMENTS)
def _combine_tensors(
    table,
    tensor_of_tile,
    seed: tl.uint64,
    step: tl.int64,
    decay: tl.int64,
    coefficient: tl.int64,
    scalars,
    num_directions: tl.int64,
    first_direction: tl.int64,
    DTYPE: tl.constexpr,
    STORED: tl.constexpr,
    PURPOSE: tl.constexpr,
    STOCHASTIC: tl.constexpr,
    SCALARS: tl.constexpr,
    ALIGNED: tl.constexpr,
    BLOCKS: tl.constexpr,
):
    """Whole tensors: a row of `table` holds source, out, size, tensor index and first tile."""
    program = tl.program_id(0)
    row = table + tl.load(tensor_of_tile + program) * 5
    source = tl.load(row).to(tl.pointer_type(STORED))
    out = tl.load(row + 1).to(tl.pointer_type(STORED))
    zero = tl.load(row + 4) * 0
    _tile(
        source,
        out,
        program - tl.load(row + 4),
        zero,
        tl.load(row + 2),
        tl.load(row + 3),
        seed,
        step,
        decay,
        coefficient,
        scalars,
        1,
        num_directions,
        first_direction,
        DTYPE,
        PURPOSE,
        STOCHASTIC,
        SCALARS,
        ALIGNED,
        BLOCKS,
    )


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
    """One tensor after one update for each of `steps`; see `zofo.noise`.

    Args:
        weight: contiguous, at least one element.
        out: likewise, of that shape and dtype.
        coefficients: [steps][directions].
        decays: [steps].
        steps: addresses of the directions.
        tensor: the tensor's index.
        offset: index of weight's first element within the whole tensor.
        drawing: as for `combine_many`.
    """
    size = weight.numel()
    _launch_rows(
        weight,
        out,
        None,
        size,
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
        coefficient: of the direction.
        step: of the direction.
        tensor: the tensor's index.
        drawing: as for `combine_many`.
    """
    width = table.shape[1]
    # A tile no larger than the row, which may begin in the middle of a block.
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


def combine_many(
    weights: Sequence[Tensor],
    outs: Sequence[Tensor],
    coefficients: Sequence[float] | Tensor,
    *,
    decay: float,
    step: int,
    tensors: Sequence[int],
    seed: int,
    purpose: int,
    first_direction: int,
    stochastic: bool,
) -> None:
    """Whole tensors of one device in one launch for each dtype; see `zofo.noise.combine_many`.

    Tensors that do not begin at a multiple of 16 bytes have a launch of their own.

    Args:
        weights: contiguous, each of at least one element.
        outs: likewise, of their shapes and dtypes.
        coefficients: one for each direction; a tensor stays on the device, and where a value of it
            is not finite nothing is written.
        decay: factor of the weights.
        step: address of the directions.
        tensors: the tensors' indices.
        seed: run seed.
        purpose: `philox.RADEMACHER` or `philox.GAUSSIAN`.
        first_direction: index of the first direction.
        stochastic: whether 16-bit results are rounded stochastically.
    """
    device = weights[0].device
    if isinstance(coefficients, Tensor):
        on_device = coefficients.detach().to(device, torch.float64).contiguous()
        scalars = _scalars(_DEVICE, on_device, len(on_device), decay=decay, step=step)
    else:
        scalars = _host_scalars([coefficients], (decay,), (step,), device)
    groups: dict[tuple[torch.dtype, bool], list[tuple[int, int, int, int]]] = {}
    for weight, out, tensor in zip(weights, outs, tensors, strict=True):
        row = (weight.data_ptr(), out.data_ptr(), weight.numel(), tensor)
        groups.setdefault((weight.dtype, _is_aligned(row[0], row[1])), []).append(row)
    for (dtype, is_aligned), rows in groups.items():
        table, tensor_of_tile = _table(device, tuple(rows))
        with _on(device):
            _combine_tensors[(len(tensor_of_tile),)](
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
    seed: int,
    purpose: int,
    first_direction: int,
    stochastic: bool,
    scalars: dict[str, Any],
    tiles_per_row: int = 1,
) -> None:
    dtype = weight.dtype
    if dtype.itemsize == 2:
        weight, out = weight.view(torch.uint16), out.view(torch.uint16)
    step_bytes = (offset if rows is None else size) * dtype.itemsize
    with _on(weight.device):
        _combine_rows[(num_programs,)](
            weight,
            out,
            rows,
            offset,
            size,
            tiles_per_row,
            tensor,
            seed=seed,
            first_direction=first_direction,
            **scalars,
            DTYPE=_NAMES[dtype],
            PURPOSE=purpose,
            STOCHASTIC=stochastic and dtype.itemsize == 2,
            ALIGNED=_is_aligned(weight.data_ptr(), out.data_ptr(), step_bytes),
            BLOCKS=blocks,
            HAS_ROWS=rows is not None,
            enable_fp_fusion=False,
        )


def _num_tiles(num_elements: int, blocks: int) -> int:
    return -(-num_elements // (blocks * 128))


def _is_aligned(*num_bytes: int) -> bool:
    return all(n % 16 == 0 for n in num_bytes)


def _on(device: torch.device) -> contextlib.AbstractContextManager[Any]:
    """Triton launches on the current device."""
    return torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()


@lru_cache(maxsize=32)
def _table(
    device: torch.device, rows: tuple[tuple[int, int, int, int], ...]
) -> tuple[Tensor, Tensor]:
    """The table of `_combine_tensors` and the row for each of its tiles.

    They say no more than the key does, so a cached one is right whatever became of the memory.
    """
    tiles = torch.tensor([_num_tiles(row[2], _BLOCKS_PER_TILE) for row in rows])
    first = (tiles.cumsum(0) - tiles).tolist()
    table = torch.tensor([(*row, start) for row, start in zip(rows, first, strict=True)])
    tensor_of_tile = torch.repeat_interleave(torch.arange(len(rows)), tiles).int()
    return table.to(device), tensor_of_tile.to(device)


def _host_scalars(
    coefficients: Sequence[Sequence[float]],
    decays: Sequence[float],
    steps: Sequence[int],
    device: torch.device,
) -> dict[str, Any]:
    """As arguments where there is one coefficient at most; else copied, without waiting."""
    num_directions = max(map(len, coefficients))
    if len(steps) == 1 and num_directions <= 1:
        (row,) = coefficients
        return _scalars(
            _ARGUMENT,
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
        table = table.pin_memory().to(device, non_blocking=True)
    return _scalars(_SCHEDULE, table, num_directions, num_steps=len(steps))


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
        "num_directions": num_directions,
        "num_steps": num_steps,
        "coefficient": _bits(coefficient),
        "decay": _bits(decay),
        "step": step,
    }


def _bits(x: float) -> int:
    return int(struct.unpack("<q", struct.pack("<d", x))[0])
