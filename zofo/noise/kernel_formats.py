"""Number formats of the CPU kernels: stored weights as float32 or float64, and back by rounding.

Numba has no 16-bit floats, so a bfloat16 arrives as uint16 and a float16 as int16. The functions
with an empty body exist only for numba, which compiles the overload of each instead.
"""

# Numba infers the types of these functions from their arguments.
# mypy: disallow-untyped-defs=False, disallow-untyped-calls=False, check-untyped-defs=False
from __future__ import annotations

import numba
import numpy as np
from llvmlite import ir
from numba.extending import intrinsic, overload

_FLOAT, _HALF, _INT16, _INT32 = ir.FloatType(), ir.HalfType(), ir.IntType(16), ir.IntType(32)


def conversion(source, target, build):
    """Make a numba function that converts one numba type to another.

    `build` receives an LLVM builder and the value, and adds the instructions.
    """

    @intrinsic
    def convert(typing_context, value):
        return target(source), lambda context, builder, signature, args: build(builder, args[0])

    return convert


float_of_bits = conversion(
    numba.types.uint32, numba.types.float32, lambda builder, x: builder.bitcast(x, _FLOAT)
)
bits_of_float = conversion(
    numba.types.float32, numba.types.uint32, lambda builder, x: builder.bitcast(x, _INT32)
)
_half_to_float = conversion(
    numba.types.int16,
    numba.types.float32,
    lambda builder, x: builder.fpext(builder.bitcast(x, _HALF), _FLOAT),
)
# The instruction rounds to nearest, ties to even.
_float_to_half = conversion(
    numba.types.float32,
    numba.types.int16,
    lambda builder, x: builder.bitcast(builder.fptrunc(x, _HALF), _INT16),
)


def widen(stored):
    """A stored weight in the dtype of the arithmetic."""


@overload(widen)
def _widen_overload(stored):
    if isinstance(stored, numba.types.Float):
        return lambda stored: stored
    if stored == numba.types.uint16:
        # bfloat16 is the upper half of a float32.
        return lambda stored: float_of_bits(np.uint32(stored) << np.uint32(16))
    return lambda stored: _half_to_float(stored)


def round_to_nearest(x, stored):
    """The number nearest to x in the dtype of `stored`, ties to even."""


@overload(round_to_nearest)
def _nearest_overload(x, stored):
    if isinstance(stored, numba.types.Float):
        return lambda x, stored: x
    if stored == numba.types.uint16:

        def to_bf16(x, stored):
            bits = bits_of_float(x)
            # Half a spacing carries into the upper half. A tie carries only if that half is odd.
            half = np.uint32(bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1)))
            # The sum could turn the bits of a NaN into another number.
            return np.uint16(half >> np.uint32(16)) if x == x else np.uint16(0x7FC0)

        return to_bf16
    return lambda x, stored: _float_to_half(x)


def round_stochastically(x, draw, stored):
    """A neighbour of x in the dtype of `stored`, chosen by sixteen random bits.

    `zofo.noise.philox.round_stochastically` is the readable reference.
    """


@overload(round_stochastically)
def _stochastic_overload(x, draw, stored):
    if isinstance(stored, numba.types.Float):
        return lambda x, draw, stored: x
    if stored == numba.types.uint16:

        def to_bf16(x, draw, stored):
            # The draw carries into the upper half with the probability of the lower half.
            up = np.uint16(np.uint32(bits_of_float(x) + draw) >> np.uint32(16))
            return up if abs(x) < np.float32(np.inf) else round_to_nearest(x, stored)

        return to_bf16

    def to_fp16(x, draw, stored):
        raw = bits_of_float(x)
        magnitude = np.uint32(raw & np.uint32(0x7FFFFFFF))
        sign = np.uint32(raw & np.uint32(0x80000000))
        # Below 2^-14, the spacing of float16 is 2^-24 for all exponents: its bits count spacings.
        is_tiny = magnitude < np.uint32(0x38800000)
        tiny = (abs(x) if is_tiny else np.float32(0)) * np.float32(2.0**24)
        steps = np.uint32(tiny + np.float32(draw) * np.float32(2.0**-16))
        # float16 drops 13 bits of the mantissa, so 13 of the 16 random bits decide.
        cut = np.uint32(magnitude + (draw >> np.uint32(3))) & np.uint32(0xFFFFE000)
        kept = _float_to_half(float_of_bits(np.uint32(cut | sign)))
        small = np.int16(np.uint16(steps | (sign >> np.uint32(16))))
        finite = small if is_tiny else kept
        return finite if magnitude < np.uint32(0x7F800000) else _float_to_half(x)

    return to_fp16
