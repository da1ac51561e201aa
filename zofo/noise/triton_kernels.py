"""The CUDA kernels: one launch for many tensors, w read once and out written once.

    out[i] = round(decay · w[i] + Σ_k c_k v_k[offset + i])

A program works on a tile of 16 blocks of 128 elements. It draws the blocks' words once and spreads
them to [words, 32], one bit per element, so that neighbouring threads read neighbouring memory. A
table on the device lists the tensors, and is made once for each set of them. Seed, step and scalars
are arguments that cause no new compilation. Scalars on the device are read there.

Three rules give the bits of the reference:
  - Every launch has enable_fp_fusion=False, because a fused multiply-add rounds once where the
    reference rounds twice.
  - The Gaussian's logarithm, sine and cosine are series in plain float32 arithmetic with IEEE
    division and square root, so they do not depend on a device's library.
  - Integer arithmetic packs and unpacks bfloat16. The conversion of Triton's interpreter, which the
    tests use (TRITON_INTERPRET=1), does not round to nearest even as the compiled one does.
A NaN stays a NaN, but its sign and payload depend on the device. In the interpreter, an argument
annotated as float64 arrives as float32, so doubles travel as int64 bits.
"""

# Triton infers the types of these functions from their arguments. Names in capitals are known at
# compile time. Of a branch on them, only the chosen side is compiled.
# ruff: noqa: N803, RET505, SIM300
# mypy: disallow-untyped-defs=False, disallow-untyped-calls=False, check-untyped-defs=False
from __future__ import annotations

import math
from typing import Final

import triton
import triton.language as tl

from zofo.noise import philox

_RADEMACHER = tl.constexpr(philox.RADEMACHER)
_ROUNDING = tl.constexpr(philox.ROUNDING)
_ROWS = tl.constexpr(philox.ROWS)
_COLUMNS = tl.constexpr(philox.COLUMNS)
_LN2 = tl.constexpr(math.log(2))
_TURN = tl.constexpr(2 * math.pi * 2.0**-32)

# The place of the coefficients (SCALARS):
ARGUMENT = tl.constexpr(0)  # at most one, as an argument
DEVICE = tl.constexpr(1)  # [directions] on the device, not checked by the host
SCHEDULE = tl.constexpr(2)  # float64 [steps, 2 + directions]: step, decay, coefficients
# Arguments whose values cause no new compilation.
_ARGUMENTS: Final = [
    "offset",
    "size",
    "width",
    "tiles_per_row",
    "tensor",
    "seed",
    "step",
    "decay",
    "coefficient",
    "scalars",
    "num_steps",
    "first_direction",
]


@triton.jit
def _words(first_block, COUNT: tl.constexpr, seed, step, direction, tensor, PURPOSE: tl.constexpr):
    """The words of COUNT blocks: uint32 [COUNT, 2, 2]; word 2i + j of a block is at [i, j]."""
    block = first_block + tl.arange(0, COUNT)
    w0, w1, w2, w3 = tl.philox(
        seed,
        block.to(tl.uint32),
        (block >> 32).to(tl.uint32) | (tensor << 12),
        step,
        direction | (PURPOSE << 24),
    )
    # join appends an axis: i chooses within (w0, w2) or (w1, w3), and j chooses the pair.
    return tl.join(tl.join(w0, w2), tl.join(w1, w3))


@triton.jit
def _normal_pairs(word_1, word_2):
    """Two standard normals from two words, float32: `kernel_draws._normal_pair` explains it."""
    u = (word_1.to(tl.float32) + 0.5) * 2.3283064365386963e-10
    # ln u = e ln 2 + 2 artanh(s), m in [sqrt(1/2), sqrt 2), s = (m - 1)/(m + 1), |s| < 0.172
    bits = u.to(tl.uint32, bitcast=True) + (0x3F800000 - 0x3F3504F3)
    e = ((bits >> 23).to(tl.int32) - 127).to(tl.float32)
    m = ((bits & 0x7FFFFF) + 0x3F3504F3).to(tl.float32, bitcast=True)
    s = tl.div_rn(m - 1.0, m + 1.0)
    z = s * s
    series = 0.3333333333333333 + z * (0.2 + z * (0.14285714285714285 + z * 0.1111111111111111))
    log = e * _LN2 + 2.0 * (s + s * z * series)
    # For u near 1, rounding may leave the logarithm slightly above zero.
    radius = tl.sqrt_rn(tl.maximum(-2.0 * log, 0.0))
    # The angle is its nearest quarter turn plus the rest, in [-1/8, 1/8) of a turn.
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
    """A stored weight in the dtype of the arithmetic. 16 bits arrive as uint16."""
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
            # Below 2^-14, the spacing of float16 is 2^-24 for all exponents, so its bits count
            # spacings. Larger values become 0, because an integer may not hold their count.
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
def _sign_bits(index, seed, step, direction, tensor, PURPOSE: tl.constexpr):
    """The bit of each index, 1 for −1: uint32, shape of `index`, each from a block of its own."""
    block = index >> 7
    w0, w1, w2, w3 = tl.philox(
        seed,
        block.to(tl.uint32),
        (block >> 32).to(tl.uint32) | (tensor << 12),
        step,
        direction | (PURPOSE << 24),
    )
    which = (index >> 5) & 3
    word = tl.where(which == 0, w0, tl.where(which == 1, w1, tl.where(which == 2, w2, w3)))
    return (word >> (index & 31).to(tl.uint32)) & 1


@triton.jit
def _add_direction(
    delta,
    c,
    first,
    width,
    seed,
    step,
    direction,
    tensor,
    PURPOSE: tl.constexpr,
    BLOCKS: tl.constexpr,
):
    """Return delta [words, 32] + c · v; v starts at element `first`, the first of a block."""
    if PURPOSE == _ROWS:
        at = tl.arange(0, BLOCKS * 4)[:, None] * 32 + tl.arange(0, 32)[None, :]
        element = first + at.to(tl.int64)
        a = _sign_bits(element // width, seed, step, direction, tensor, _ROWS)
        b = _sign_bits(element % width, seed, step, direction, tensor, _COLUMNS)
        return delta + tl.where((a ^ b) != 0, -c, c)
    elif PURPOSE == _RADEMACHER:
        words = _words(first >> 7, BLOCKS, seed, step, direction, tensor, PURPOSE)
        word = tl.reshape(words, [BLOCKS * 4, 1])  # one word per row of 32 elements
        is_negative = (word >> tl.arange(0, 32)[None, :].to(tl.uint32)) & 1
        return delta + tl.where(is_negative != 0, -c, c)
    else:
        # A block holds 4 values, so 128 elements need 32 blocks.
        words = _words(first >> 2, BLOCKS * 32, seed, step, direction, tensor, PURPOSE)
        word_1, word_2 = tl.split(words)
        cosine, sine = _normal_pairs(word_1, word_2)
        v = tl.reshape(tl.join(cosine, sine), [BLOCKS * 4, 32])
        return delta + v.to(delta.dtype) * c


@triton.jit
def _rounding_bits(first, seed, step, tensor, BLOCKS: tl.constexpr):
    """Sixteen bits for each element: uint32 [words, 32]."""
    # A block holds 8 draws, so 128 elements need 16 blocks.
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
    width,
    tensor,
    seed,
    step,
    decay,
    coefficient,
    scalars,
    num_steps,
    first_direction,
    DTYPE: tl.constexpr,
    PURPOSE: tl.constexpr,
    STOCHASTIC: tl.constexpr,
    SCALARS: tl.constexpr,
    NUM_DIRECTIONS: tl.constexpr,
    ALIGNED: tl.constexpr,
    BLOCKS: tl.constexpr,
):
    """Compute tile `tile` of the elements offset .. offset + size − 1; source[0] is the first."""
    WIDE: tl.constexpr = tl.float64 if DTYPE == tl.float64 else tl.float32
    tensor = tensor.to(tl.uint32)
    if SCALARS == DEVICE:
        # If a coefficient is not finite, no element is in range, so nothing is written.
        for k in range(NUM_DIRECTIONS):
            is_finite = tl.abs(tl.load(scalars + k)) < float("inf")
            size = tl.where(is_finite, size, 0)
    # Tiles consist of whole blocks, so `first`, the tile's first element, may precede the offset.
    # `begin` and `end` are the limits of the tensor's part within the tile.
    first = ((offset >> 7) << 7) + tile.to(tl.int64) * (BLOCKS * 128)
    begin = offset - first
    end = begin + size
    source += first - offset
    out += first - offset
    if ALIGNED:
        # Both addresses are multiples of 16 bytes. Wide accesses need this, and the compiler cannot
        # see it.
        source = tl.multiple_of(source, 16)
        out = tl.multiple_of(out, 16)
    at = tl.arange(0, BLOCKS * 4)[:, None] * 32 + tl.arange(0, 32)[None, :]
    # A mask of unknown alignment makes accesses narrow, so whole tiles have none.
    is_whole = (begin <= 0) & (end >= BLOCKS * 128)
    if is_whole:
        w = tl.load(source + at)
    else:
        w = tl.load(source + at, mask=(at >= begin) & (at < end), other=0)
    for t in range(num_steps if SCALARS == SCHEDULE else 1):
        # Doubles arrive as int64 bits and are rounded to the dtype of the arithmetic.
        now, factor, c = step.to(tl.uint32), decay.to(tl.int64), coefficient.to(tl.int64)
        factor = factor.to(tl.float64, bitcast=True).to(WIDE)
        c = c.to(tl.float64, bitcast=True).to(WIDE)
        coefficients = scalars
        if SCALARS == SCHEDULE:
            row = scalars + t * (NUM_DIRECTIONS + 2)  # step, decay, coefficients
            now = tl.load(row).to(tl.int64).to(tl.uint32)
            factor = tl.load(row + 1).to(WIDE)
            coefficients = row + 2
        delta = tl.zeros([BLOCKS * 4, 32], WIDE)
        for k in range(NUM_DIRECTIONS):
            if SCALARS != ARGUMENT:
                c = tl.load(coefficients + k).to(WIDE)
            direction = (first_direction + k).to(tl.uint32)
            delta = _add_direction(
                delta, c, first, width, seed, now, direction, tensor, PURPOSE, BLOCKS
            )
        draws = 0
        if STOCHASTIC:
            draws = _rounding_bits(first, seed, now, tensor, BLOCKS)
        w = _pack(_unpack(w, DTYPE) * factor + delta, draws, DTYPE, STOCHASTIC)
    if is_whole:
        tl.store(out + at, w)
    else:
        tl.store(out + at, w, mask=(at >= begin) & (at < end))


@triton.jit(do_not_specialize=_ARGUMENTS)
def fill_signs(
    out,
    size: tl.int64,
    tiles_per_row: tl.int64,
    tensor: tl.int64,
    seed: tl.uint64,
    step: tl.int64,
    first_direction: tl.int64,
    PURPOSE: tl.constexpr,
    BLOCKS: tl.constexpr,
):
    """Fill float32 [directions, size] with the signs of one side of a matrix."""
    program = tl.program_id(0).to(tl.int64)
    k, tile = program // tiles_per_row, program % tiles_per_row
    first = tile * (BLOCKS * 128)
    direction = (first_direction + k).to(tl.uint32)
    words = _words(
        first >> 7, BLOCKS, seed, step.to(tl.uint32), direction, tensor.to(tl.uint32), PURPOSE
    )
    word = tl.reshape(words, [BLOCKS * 4, 1])
    is_negative = (word >> tl.arange(0, 32)[None, :].to(tl.uint32)) & 1
    at = first + tl.arange(0, BLOCKS * 4)[:, None] * 32 + tl.arange(0, 32)[None, :]
    tl.store(out + k * size + at, tl.where(is_negative != 0, -1.0, 1.0), mask=at < size)


@triton.jit(do_not_specialize=_ARGUMENTS)
def combine_rows(
    source,
    out,
    rows,
    offset: tl.int64,
    size: tl.int64,
    width: tl.int64,
    tiles_per_row: tl.int64,
    tensor: tl.int64,
    seed: tl.uint64,
    step: tl.int64,
    decay: tl.int64,
    coefficient: tl.int64,
    scalars,
    num_steps: tl.int64,
    first_direction: tl.int64,
    DTYPE: tl.constexpr,
    PURPOSE: tl.constexpr,
    STOCHASTIC: tl.constexpr,
    SCALARS: tl.constexpr,
    NUM_DIRECTIONS: tl.constexpr,
    ALIGNED: tl.constexpr,
    BLOCKS: tl.constexpr,
    HAS_ROWS: tl.constexpr,
):
    """Compute one tensor from `offset` on, or a table whose row i is row rows[i] of the tensor."""
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
        width.to(tl.int64),
        tensor,
        seed,
        step,
        decay,
        coefficient,
        scalars,
        num_steps,
        first_direction,
        DTYPE,
        PURPOSE,
        STOCHASTIC,
        SCALARS,
        NUM_DIRECTIONS,
        ALIGNED,
        BLOCKS,
    )


@triton.jit(do_not_specialize=_ARGUMENTS)
def combine_tensors(
    table,
    tensor_of_tile,
    seed: tl.uint64,
    step: tl.int64,
    decay: tl.int64,
    coefficient: tl.int64,
    scalars,
    first_direction: tl.int64,
    DTYPE: tl.constexpr,
    STORED: tl.constexpr,
    PURPOSE: tl.constexpr,
    STOCHASTIC: tl.constexpr,
    SCALARS: tl.constexpr,
    NUM_DIRECTIONS: tl.constexpr,
    ALIGNED: tl.constexpr,
    BLOCKS: tl.constexpr,
):
    """Compute tensors or slices of tensors, laid out in `table`.

    A row of it: source, out, size, width, tensor index, index of the first element within the whole
    tensor, first tile. The width is that of a row of a matrix, for directions of rank one.
    """
    program = tl.program_id(0)
    row = table + tl.load(tensor_of_tile + program) * 7
    source = tl.load(row).to(tl.pointer_type(STORED))
    out = tl.load(row + 1).to(tl.pointer_type(STORED))
    _tile(
        source,
        out,
        program - tl.load(row + 6),
        tl.load(row + 5),
        tl.load(row + 2),
        tl.load(row + 3),
        tl.load(row + 4),
        seed,
        step,
        decay,
        coefficient,
        scalars,
        1,
        first_direction,
        DTYPE,
        PURPOSE,
        STOCHASTIC,
        SCALARS,
        NUM_DIRECTIONS,
        ALIGNED,
        BLOCKS,
    )
