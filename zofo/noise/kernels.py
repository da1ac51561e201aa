"""The CPU kernels: one pass over a weight, nothing of its size allocated.

    out[i] = round(decay · w[i] + Σ_k c_k v_k[offset + i])

A thread works through its range in chunks of 2,048 elements: the sum of directions is built in a
buffer that stays in the first-level cache, then one vectorised loop reads w and writes out. Without
`fastmath` LLVM neither fuses nor reorders these operations, so Rademacher results equal the
reference bit for bit. The Gaussian's logarithm, sine and cosine are series in plain float32
arithmetic (LLVM vectorises them, libm's calls it does not), the same bits on every CPU.

Numba has no 16-bit floats: bfloat16 arrives viewed as uint16, float16 as int16.
"""

# Numba reads these functions' types from their arguments.
# mypy: disallow-untyped-defs=False, disallow-untyped-calls=False, check-untyped-defs=False
from __future__ import annotations

import math

import numba
import numpy as np
from numba.extending import intrinsic, overload

from zofo.noise import philox

CHUNK = 2048
_M0, _M1 = np.uint64(philox.MULTIPLIER_0), np.uint64(philox.MULTIPLIER_1)
_W0, _W1 = np.uint64(philox.WEYL_0), np.uint64(philox.WEYL_1)
_MASK = np.uint64(philox.MASK32)
_S32 = np.uint64(32)
_ONE32 = np.float32(1)
_RADEMACHER, _GAUSSIAN, _ROUNDING = philox.RADEMACHER, philox.GAUSSIAN, philox.ROUNDING


@intrinsic
def _float_of(typing_context, bits):
    """The float32 with these 32 bits."""

    def codegen(context, builder, signature, args):
        return builder.bitcast(args[0], context.get_value_type(signature.return_type))

    return numba.types.float32(numba.types.uint32), codegen


@intrinsic
def _bits_of(typing_context, x):
    """The 32 bits of a float32."""

    def codegen(context, builder, signature, args):
        return builder.bitcast(args[0], context.get_value_type(signature.return_type))

    return numba.types.uint32(numba.types.float32), codegen


@numba.njit(inline="always")
def _philox(block, seed, step, direction, tensor, purpose):
    c0 = block & _MASK
    c1 = (block >> _S32) | (tensor << np.uint64(12))
    c2 = step
    c3 = (purpose << np.uint64(24)) | direction
    k0, k1 = seed & _MASK, seed >> _S32
    for _ in range(10):
        p0, p1 = _M0 * c0, _M1 * c2
        c0, c1, c2, c3 = (p1 >> _S32) ^ c1 ^ k0, p1 & _MASK, (p0 >> _S32) ^ c3 ^ k1, p0 & _MASK
        k0, k1 = (k0 + _W0) & _MASK, (k1 + _W1) & _MASK
    return c0, c1, c2, c3


@numba.njit
def _add_rademacher(delta, start, n, c, first, seed, step, direction, tensor):
    """Add c · v[start : start + n] to delta[:n] (`first`: write it)."""
    stop = start + n
    for block in range(start >> 7, ((stop - 1) >> 7) + 1):
        four = _philox(np.uint64(block), seed, step, direction, tensor, np.uint64(_RADEMACHER))
        for j in range(4):
            word = np.uint32(four[0])
            if j == 1:
                word = np.uint32(four[1])
            elif j == 2:
                word = np.uint32(four[2])
            elif j == 3:
                word = np.uint32(four[3])
            low = (block << 7) + (j << 5)
            if low >= start and low + 32 <= stop:
                at = low - start
                for i in range(32):
                    value = -c if (word >> np.uint32(i)) & np.uint32(1) else c
                    delta[at + i] = value if first else delta[at + i] + value
            else:
                for e in range(max(low, start), min(low + 32, stop)):
                    value = -c if (word >> np.uint32(e - low)) & np.uint32(1) else c
                    delta[e - start] = value if first else delta[e - start] + value


@numba.njit(inline="always")
def _normal_pair(word_1, word_2):
    """Two standard normals from two words (Box-Muller), float32."""
    u = (np.float32(word_1) + np.float32(0.5)) * np.float32(2.0**-32)
    # ln u = e ln 2 + 2 artanh(s), m in [sqrt(1/2), sqrt 2), s = (m - 1)/(m + 1), |s| < 0.172
    bits = _bits_of(u) + np.uint32(0x3F800000 - 0x3F3504F3)
    e = np.float32(np.int32(bits >> np.uint32(23)) - np.int32(127))
    m = _float_of((bits & np.uint32(0x7FFFFF)) + np.uint32(0x3F3504F3))
    s = (m - _ONE32) / (m + _ONE32)
    z = s * s
    series = np.float32(1 / 7) + z * np.float32(1 / 9)
    series = np.float32(1 / 3) + z * (np.float32(1 / 5) + z * series)
    log = e * np.float32(math.log(2)) + np.float32(2) * (s + s * z * series)
    # The rounded e·ln 2 + ... of u near 1 may be a hair above zero.
    radius = np.float32(math.sqrt(max(np.float32(-2) * log, np.float32(0))))
    # The angle's nearest quarter turn, and the rest in [-1/8, 1/8) of a turn.
    quarter = ((word_2 + np.uint64(1 << 29)) >> np.uint64(30)) & np.uint64(3)
    rest = np.int32(np.uint32(word_2 - (quarter << np.uint64(30))))
    t = np.float32(rest) * np.float32(2 * math.pi * 2.0**-32)
    t2 = t * t
    a = np.float32(-1 / 5040) + t2 * np.float32(1 / 362880)
    sine = t + t * t2 * (np.float32(-1 / 6) + t2 * (np.float32(1 / 120) + t2 * a))
    b = np.float32(1 / 40320) + t2 * np.float32(-1 / 3628800)
    b = np.float32(1 / 24) + t2 * (np.float32(-1 / 720) + t2 * b)
    cosine = _ONE32 + t2 * (np.float32(-1 / 2) + t2 * b)
    odd = (quarter & np.uint64(1)) != np.uint64(0)
    x, y = (sine, cosine) if odd else (cosine, sine)
    x = -x if (quarter == np.uint64(1)) | (quarter == np.uint64(2)) else x
    y = -y if quarter >= np.uint64(2) else y
    return radius * x, radius * y


@numba.njit
def _add_gaussian(delta, values, start, n, c, first, seed, step, direction, tensor):
    """Add c · v[start : start + n] to delta[:n]; `values` holds whole blocks of four."""
    block_0 = start >> 2
    num_blocks = ((start + n - 1) >> 2) + 1 - block_0
    for b in range(num_blocks):
        w0, w1, w2, w3 = _philox(
            np.uint64(block_0 + b), seed, step, direction, tensor, np.uint64(_GAUSSIAN)
        )
        v0, v1 = _normal_pair(w0, w1)
        v2, v3 = _normal_pair(w2, w3)
        values[4 * b], values[4 * b + 1] = v0, v1
        values[4 * b + 2], values[4 * b + 3] = v2, v3
    shift = start - (block_0 << 2)
    for i in range(n):
        value = c * values[shift + i]
        delta[i] = value if first else delta[i] + value


@numba.njit
def _draw_rounding_bits(draws, start, n, seed, step, tensor):
    """Write the sixteen rounding bits of elements start .. start + n to draws[:n]."""
    stop = start + n
    zero = np.uint64(0)
    for block in range(start >> 3, ((stop - 1) >> 3) + 1):
        w0, w1, w2, w3 = _philox(np.uint64(block), seed, step, zero, tensor, np.uint64(_ROUNDING))
        low = block << 3
        for i in range(max(low, start) - low, min(low + 8, stop) - low):
            word = w0 if i < 2 else (w1 if i < 4 else (w2 if i < 6 else w3))
            draws[low + i - start] = np.uint32(
                (word >> np.uint64(16 * (i & 1))) & np.uint64(0xFFFF)
            )


@numba.njit(inline="always")
def _bf16_to_float(h):
    return _float_of(np.uint32(h) << np.uint32(16))


@numba.njit(inline="always")
def _float_to_bf16(x):
    bits = _bits_of(x)
    nearest = np.uint32(bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1)))
    return np.uint16(nearest >> np.uint32(16)) if x == x else np.uint16(0x7FC0)


@numba.njit(inline="always")
def _fp16_to_float(h):
    raw = np.uint32(np.uint16(h))
    # Shifted into float32's fields the exponent is 112 too small; the product is exact, also for
    # float16's subnormals.
    magnitude = np.uint32((raw & np.uint32(0x7FFF)) << np.uint32(13))
    scaled = _float_of(magnitude) * np.float32(2.0**112)
    special = _float_of(magnitude | np.uint32(0x7F800000))
    value = special if (raw & np.uint32(0x7C00)) == np.uint32(0x7C00) else scaled
    return -value if raw & np.uint32(0x8000) else value


@numba.njit(inline="always")
def _pack_fp16(magnitude_bits, negative):
    sign = np.uint16(0x8000) if negative else np.uint16(0)
    return np.int16(np.uint16(magnitude_bits) | sign)


@numba.njit(inline="always")
def _float_to_fp16(x):
    raw = _bits_of(x)
    magnitude = np.uint32(raw & np.uint32(0x7FFFFFFF))
    if magnitude > np.uint32(0x7F800000):
        half = np.uint32(0x7E00)
    elif magnitude >= np.uint32(0x477FF000):  # 65520, the first value nearer to 2^16
        half = np.uint32(0x7C00)
    elif magnitude < np.uint32(0x38800000):  # 2^-14: the spacing is 2^-24 from here down
        # Adding 1/2 puts that spacing at float32's last bit; the addition rounds to nearest even.
        half = _bits_of(_float_of(magnitude) + np.float32(0.5)) - np.uint32(0x3F000000)
    else:
        odd = (magnitude >> np.uint32(13)) & np.uint32(1)
        half = np.uint32(magnitude + np.uint32(0xC8000FFF) + odd) >> np.uint32(13)
    return _pack_fp16(half, (raw >> np.uint32(31)) != np.uint32(0))


def _apply(w, out, delta, draws, n, at, decay, stochastic):
    """out[at : at + n] = round(decay · w[at : at + n] + delta[:n]); compiled by the type of w."""
    raise NotImplementedError


@overload(_apply)
def _apply_overload(w, out, delta, draws, n, at, decay, stochastic):
    if isinstance(w.dtype, numba.types.Float):

        def apply_float(w, out, delta, draws, n, at, decay, stochastic):
            for i in range(n):
                out[at + i] = w[at + i] * decay + delta[i]

        return apply_float
    if w.dtype == numba.types.uint16:

        def apply_bf16(w, out, delta, draws, n, at, decay, stochastic):
            if stochastic:
                for i in range(n):
                    x = _bf16_to_float(w[at + i]) * decay + delta[i]
                    up = np.uint16((_bits_of(x) + draws[i]) >> np.uint32(16))
                    out[at + i] = up if abs(x) < np.float32(np.inf) else _float_to_bf16(x)
            else:
                for i in range(n):
                    out[at + i] = _float_to_bf16(_bf16_to_float(w[at + i]) * decay + delta[i])

        return apply_bf16

    def apply_fp16(w, out, delta, draws, n, at, decay, stochastic):
        if stochastic:
            for i in range(n):
                x = _fp16_to_float(w[at + i]) * decay + delta[i]
                raw = _bits_of(x)
                magnitude = raw & np.uint32(0x7FFFFFFF)
                if magnitude < np.uint32(0x38800000):
                    tiny = abs(x) * np.float32(2.0**24)
                    half = np.uint32(tiny + np.float32(draws[i]) * np.float32(2.0**-16))
                    out[at + i] = _pack_fp16(half, (raw >> np.uint32(31)) != np.uint32(0))
                elif magnitude >= np.uint32(0x7F800000):
                    out[at + i] = _float_to_fp16(x)
                else:
                    cut = np.uint32(magnitude + (draws[i] >> np.uint32(3))) & np.uint32(0xFFFFE000)
                    signed = np.uint32(cut | (raw & np.uint32(0x80000000)))
                    out[at + i] = _float_to_fp16(_float_of(signed))
        else:
            for i in range(n):
                out[at + i] = _float_to_fp16(_fp16_to_float(w[at + i]) * decay + delta[i])

    return apply_fp16


@numba.njit(nogil=True, cache=True)
def combine(
    w,
    out,
    begin,
    end,
    coefficients,
    decay,
    seed,
    step,
    tensor,
    offset,
    purpose,
    direction_0,
    stochastic,
):
    """Elements begin .. end of out = round(decay · w + Σ c_k v_k), one-dimensional w and out."""
    delta = np.empty(CHUNK, coefficients.dtype)
    values = np.empty(CHUNK + 8, np.float32)
    draws = np.empty(CHUNK, np.uint32)
    at = begin
    while at < end:
        start = offset + at
        # Chunks end on multiples of CHUNK in the tensor's own numbering, so whole blocks are used.
        n = min(CHUNK - (start & (CHUNK - 1)), end - at)
        for k in range(coefficients.size):
            direction = np.uint64(direction_0 + k)
            if purpose == _RADEMACHER:
                _add_rademacher(
                    delta, start, n, coefficients[k], k == 0, seed, step, direction, tensor
                )
            else:
                _add_gaussian(
                    delta, values, start, n, coefficients[k], k == 0, seed, step, direction, tensor
                )
        if coefficients.size == 0:
            delta[:n] = 0
        if stochastic:
            _draw_rounding_bits(draws, start, n, seed, step, tensor)
        _apply(w, out, delta, draws, n, at, decay, stochastic)
        at += n
