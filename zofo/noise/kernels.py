"""The CPU kernels: one pass over a weight, nothing of its size allocated.

    out[i] = round(decay · w[i] + Σ_k c_k v_k[offset + i])

A thread works through its share in chunks of 2,048 elements: a chunk's random words, or the sum of
its directions, are built in a buffer that stays in the first-level cache, then one vectorised loop
reads w and writes out. Without `fastmath` LLVM neither fuses nor reorders these operations, so
Rademacher results equal the reference bit for bit. The Gaussian's logarithm, sine and cosine are
series in plain float32 arithmetic (LLVM vectorises them, libm's calls it does not), the same bits
on every CPU.

Numba has no 16-bit floats: bfloat16 arrives viewed as uint16, float16 as int16.
"""

# Numba reads these functions' types from their arguments.
# mypy: disallow-untyped-defs=False, disallow-untyped-calls=False, check-untyped-defs=False
from __future__ import annotations

import math
from functools import lru_cache

import numba
import numpy as np
from llvmlite import ir
from numba.core import cgutils
from numba.extending import intrinsic, overload

from zofo.noise import philox

CHUNK = 2048
GRAIN = 1 << 15
"""Elements that a thread takes at a time: some 10 µs of work."""
_AHEAD = 1024
"""Elements between what is read and what is prefetched: measured, 1.1 × faster than without."""
_M0, _M1 = np.uint64(philox.MULTIPLIER_0), np.uint64(philox.MULTIPLIER_1)
_W0, _W1 = np.uint64(philox.WEYL_0), np.uint64(philox.WEYL_1)
_MASK = np.uint64(philox.MASK32)
_S32 = np.uint64(32)
_ONE32 = np.float32(1)
_SIGN = np.uint32(1 << 31)
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


@intrinsic
def _prefetch(typing_context, array, index):
    """Ask for the cache line of array[index]; a hint, without effect on any value."""

    def codegen(context, builder, signature, args):
        array_type, _ = signature.args
        view = context.make_array(array_type)(context, builder, args[0])
        pointer = cgutils.get_item_pointer(context, builder, array_type, view, [args[1]])
        i8p, i32 = ir.IntType(8).as_pointer(), ir.IntType(32)
        function = cgutils.get_or_insert_function(
            builder.module,
            ir.FunctionType(ir.VoidType(), [i8p, i32, i32, i32]),
            "llvm.prefetch.p0",
        )
        read, keep, data = (ir.Constant(i32, value) for value in (0, 3, 1))
        builder.call(function, [builder.bitcast(pointer, i8p), read, keep, data])
        return context.get_dummy_value()

    return numba.types.void(array, index), codegen


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
def _draw_words(words, first_block, num_blocks, seed, step, direction, tensor, purpose):
    """Write the four words of each block: uint32, in the order of the blocks."""
    for b in range(num_blocks):
        w0, w1, w2, w3 = _philox(
            np.uint64(first_block + b), seed, step, direction, tensor, np.uint64(purpose)
        )
        words[4 * b], words[4 * b + 1] = np.uint32(w0), np.uint32(w1)
        words[4 * b + 2], words[4 * b + 3] = np.uint32(w2), np.uint32(w3)


@numba.njit
def add_rademacher(delta, words, start, n, c, seed, step, direction, tensor):
    """Add c · v[start : start + n] to delta[:n]."""
    stop = start + n
    first_block = start >> 7
    num_blocks = ((stop - 1) >> 7) + 1 - first_block
    _draw_words(words, first_block, num_blocks, seed, step, direction, tensor, _RADEMACHER)
    for j in range(4 * num_blocks):
        word = words[j]
        low = (first_block << 7) + (j << 5)
        if low >= start and low + 32 <= stop:
            # A slice tells LLVM that the indices need no check; without it nothing is vectorised.
            part = delta[low - start : low - start + 32]
            for i in range(32):
                part[i] += -c if np.uint32(word << np.uint32(31 - i)) & _SIGN else c
        else:
            for e in range(max(low, start), min(low + 32, stop)):
                bit = np.uint32(word << np.uint32(31 - (e - low))) & _SIGN
                delta[e - start] += -c if bit else c


@numba.njit(inline="always")
def _normal_pair(word_1, word_2):
    """Two standard normals from two words (Box-Muller), float32."""
    u = (np.float32(word_1) + np.float32(0.5)) * np.float32(2.0**-32)
    # ln u = e ln 2 + 2 artanh(s), m in [sqrt(1/2), sqrt 2), s = (m - 1)/(m + 1), |s| < 0.172
    bits = np.uint32(_bits_of(u) + np.uint32(0x3F800000 - 0x3F3504F3))
    e = np.float32(np.int32(np.int32(bits >> np.uint32(23)) - np.int32(127)))
    m = _float_of(np.uint32(np.uint32(bits & np.uint32(0x7FFFFF)) + np.uint32(0x3F3504F3)))
    s = (m - _ONE32) / (m + _ONE32)
    z = s * s
    series = np.float32(1 / 7) + z * np.float32(1 / 9)
    series = np.float32(1 / 3) + z * (np.float32(1 / 5) + z * series)
    log = e * np.float32(math.log(2)) + np.float32(2) * (s + s * z * series)
    # The rounded e·ln 2 + ... of u near 1 may be a hair above zero.
    twice = np.float32(-2) * log
    radius = np.float32(math.sqrt(twice if twice > np.float32(0) else np.float32(0)))
    # The angle's nearest quarter turn, and the rest in [-1/8, 1/8) of a turn.
    quarter = np.uint32(np.uint32(word_2 + np.uint32(1 << 29)) >> np.uint32(30))
    rest = np.int32(np.uint32(word_2 - np.uint32(quarter << np.uint32(30))))
    t = np.float32(rest) * np.float32(2 * math.pi * 2.0**-32)
    t2 = t * t
    a = np.float32(-1 / 5040) + t2 * np.float32(1 / 362880)
    sine = t + t * t2 * (np.float32(-1 / 6) + t2 * (np.float32(1 / 120) + t2 * a))
    b = np.float32(1 / 40320) + t2 * np.float32(-1 / 3628800)
    b = np.float32(1 / 24) + t2 * (np.float32(-1 / 720) + t2 * b)
    cosine = _ONE32 + t2 * (np.float32(-1 / 2) + t2 * b)
    odd = np.uint32(quarter & np.uint32(1)) != np.uint32(0)
    x, y = (sine, cosine) if odd else (cosine, sine)
    x = -x if (quarter == np.uint32(1)) | (quarter == np.uint32(2)) else x
    y = -y if quarter >= np.uint32(2) else y
    return radius * x, radius * y


# numpy's error model: the check for a zero divisor would keep LLVM from vectorising.
@numba.njit(error_model="numpy")
def add_gaussian(delta, words, values, start, n, c, seed, step, direction, tensor):
    """Add c · v[start : start + n] to delta[:n]; `values` holds whole blocks of four."""
    first_block = start >> 2
    num_blocks = ((start + n - 1) >> 2) + 1 - first_block
    _draw_words(words, first_block, num_blocks, seed, step, direction, tensor, _GAUSSIAN)
    pairs, normals = words[: 4 * num_blocks], values[: 4 * num_blocks]
    for i in range(2 * num_blocks):
        normals[2 * i], normals[2 * i + 1] = _normal_pair(pairs[2 * i], pairs[2 * i + 1])
    shift = start - (first_block << 2)
    part, drawn = delta[:n], values[shift : shift + n]
    for i in range(n):
        part[i] += c * drawn[i]


@numba.njit
def _draw_rounding_bits(draws, words, start, n, seed, step, tensor):
    """Write the sixteen rounding bits of elements start .. start + n to draws[:n]."""
    first_block = start >> 3
    num_blocks = ((start + n - 1) >> 3) + 1 - first_block
    zero = np.uint64(0)
    _draw_words(words, first_block, num_blocks, seed, step, zero, tensor, _ROUNDING)
    halves = words[: 4 * num_blocks].view(np.uint16)
    shift = start - (first_block << 3)
    part, drawn = draws[:n], halves[shift : shift + n]
    for i in range(n):
        part[i] = np.uint32(drawn[i])


@intrinsic
def _half_to_float(typing_context, h):
    """A float16, given as int16, as float32."""

    def codegen(context, builder, signature, args):
        return builder.fpext(builder.bitcast(args[0], ir.HalfType()), ir.FloatType())

    return numba.types.float32(numba.types.int16), codegen


@intrinsic
def _float_to_half(typing_context, x):
    """A float32 rounded to the nearest float16 (ties to even), as int16."""

    def codegen(context, builder, signature, args):
        return builder.bitcast(builder.fptrunc(args[0], ir.HalfType()), ir.IntType(16))

    return numba.types.int16(numba.types.float32), codegen


def _widen(stored):
    """A stored weight as a number to compute with."""
    raise NotImplementedError


@overload(_widen)
def _widen_overload(stored):
    if isinstance(stored, numba.types.Float):
        return lambda stored: stored
    if stored == numba.types.uint16:
        return lambda stored: _float_of(np.uint32(stored) << np.uint32(16))
    return lambda stored: _half_to_float(stored)


def _nearest(x, stored):
    """The representation nearest to x in the dtype of `stored`."""
    raise NotImplementedError


@overload(_nearest)
def _nearest_overload(x, stored):
    if isinstance(stored, numba.types.Float):
        return lambda x, stored: x
    if stored == numba.types.uint16:

        def to_bf16(x, stored):
            bits = _bits_of(x)
            half = np.uint32(bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1)))
            return np.uint16(half >> np.uint32(16)) if x == x else np.uint16(0x7FC0)

        return to_bf16
    return lambda x, stored: _float_to_half(x)


def _stochastic(x, draw, stored):
    """A neighbour of x in the dtype of `stored`, chosen by sixteen random bits."""
    raise NotImplementedError


@overload(_stochastic)
def _stochastic_overload(x, draw, stored):
    if isinstance(stored, numba.types.Float):
        return lambda x, draw, stored: x
    if stored == numba.types.uint16:

        def to_bf16(x, draw, stored):
            up = np.uint16(np.uint32(_bits_of(x) + draw) >> np.uint32(16))
            return up if abs(x) < np.float32(np.inf) else _nearest(x, stored)

        return to_bf16

    def to_fp16(x, draw, stored):
        raw = _bits_of(x)
        magnitude = np.uint32(raw & np.uint32(0x7FFFFFFF))
        sign = np.uint32(raw & np.uint32(0x80000000))
        # Below 2^-14 the spacing of float16 is 2^-24, whatever the exponent.
        is_tiny = magnitude < np.uint32(0x38800000)
        tiny = (abs(x) if is_tiny else np.float32(0)) * np.float32(2.0**24)
        steps = np.uint32(tiny + np.float32(draw) * np.float32(2.0**-16))
        cut = np.uint32(magnitude + (draw >> np.uint32(3))) & np.uint32(0xFFFFE000)
        kept = _float_to_half(_float_of(np.uint32(cut | sign)))
        small = np.int16(np.uint16(steps | (sign >> np.uint32(16))))
        finite = small if is_tiny else kept
        return finite if magnitude < np.uint32(0x7F800000) else _float_to_half(x)

    return to_fp16


@numba.njit
def _finish(result, w, delta, draws, decay, stochastic):
    """Write round(decay · w + delta) to result, all of one length."""
    if stochastic:
        for i in range(w.size):
            result[i] = _stochastic(_widen(w[i]) * decay + delta[i], draws[i], w[i])
    else:
        for i in range(w.size):
            result[i] = _nearest(_widen(w[i]) * decay + delta[i], w[i])


def _is_float(w):
    """Whether w holds float32 or float64: known when compiling."""
    raise NotImplementedError


@overload(_is_float)
def _is_float_overload(w):
    answer = isinstance(w.dtype, numba.types.Float)
    return lambda w: answer


@numba.njit
def _add_signs(out, w, words, draws, start, c, decay, stochastic):
    """Write round(decay · w ± c) to out, both of one length: one direction, no buffer between."""
    n = out.size
    origin = (start >> 7) << 7
    for j in range((start - origin) >> 5, ((start + n - 1 - origin) >> 5) + 1):
        word = words[j]
        low = origin + (j << 5) - start
        if low >= 0 and low + 32 <= n:
            # Slices tell LLVM that the indices need no check; without them nothing is vectorised.
            target, source = out[low : low + 32], w[low : low + 32]
            _prefetch(w, low + _AHEAD)
            _prefetch(w, low + _AHEAD + 16)
            if stochastic:
                drawn = draws[low : low + 32]
                for i in range(32):
                    sign = np.uint32(word << np.uint32(31 - i)) & _SIGN
                    x = _widen(source[i]) * decay + (-c if sign else c)
                    target[i] = _stochastic(x, drawn[i], source[i])
            else:
                for i in range(32):
                    sign = np.uint32(word << np.uint32(31 - i)) & _SIGN
                    x = _widen(source[i]) * decay + (-c if sign else c)
                    target[i] = _nearest(x, source[i])
        else:
            for e in range(max(low, 0), min(low + 32, n)):
                sign = np.uint32(word << np.uint32(31 - (e - low))) & _SIGN
                x = _widen(w[e]) * decay + (-c if sign else c)
                out[e] = _stochastic(x, draws[e], w[e]) if stochastic else _nearest(x, w[e])


@numba.njit
def _add_signs_in_place(w, words, start, c, decay):
    """The same with out = w, floats. Given one array twice, LLVM would have to assume overlap."""
    n = w.size
    origin = (start >> 7) << 7
    for j in range((start - origin) >> 5, ((start + n - 1 - origin) >> 5) + 1):
        word = words[j]
        low = origin + (j << 5) - start
        if low >= 0 and low + 32 <= n:
            part = w[low : low + 32]
            _prefetch(w, low + _AHEAD)
            _prefetch(w, low + _AHEAD + 16)
            for i in range(32):
                sign = np.uint32(word << np.uint32(31 - i)) & _SIGN
                part[i] = part[i] * decay + (-c if sign else c)
        else:
            for e in range(max(low, 0), min(low + 32, n)):
                sign = np.uint32(word << np.uint32(31 - (e - low))) & _SIGN
                w[e] = w[e] * decay + (-c if sign else c)


@numba.njit
def _copy(target, source):
    for i in range(target.size):
        target[i] = source[i]


@numba.njit
def _combine(w, out, begin, end, tensor, offset, in_place, plan):
    """Elements begin .. end of out, one-dimensional: w after one update for each step of the plan.

    Update t is w ← round(decays[t] · w + Σ_k coefficients[t, k] v_k[steps[t]]). A chunk takes all
    of them before it is written, so w is read once and out written once, and the result is that
    of the updates one by one.
    """
    coefficients, decays, steps, seed, purpose, direction_0, stochastic = plan
    delta = np.empty(CHUNK, coefficients.dtype)
    values = np.empty(CHUNK + 8, np.float32)
    words = np.empty(CHUNK + 8, np.uint32)
    draws = np.empty(CHUNK, np.uint32)
    # Written apart and copied: in place, LLVM would have to assume overlap.
    here, there = np.empty(CHUNK, w.dtype), np.empty(CHUNK, w.dtype)
    use_signs = purpose == _RADEMACHER and coefficients.shape[1] == 1
    at = begin
    while at < end:
        start = offset + at
        # Chunks end on multiples of CHUNK in the tensor's own numbering, so whole blocks are used.
        n = min(CHUNK - (start & (CHUNK - 1)), end - at)
        source, target = w[at : at + n], out[at : at + n]
        is_written = False
        for t in range(steps.size):
            step, decay, c = steps[t], decays[t], coefficients[t, 0]
            if stochastic:
                _draw_rounding_bits(draws, words, start, n, seed, step, tensor)
            if use_signs:
                first_block, num_blocks = start >> 7, ((start + n - 1) >> 7) + 1 - (start >> 7)
                _draw_words(
                    words,
                    first_block,
                    num_blocks,
                    seed,
                    step,
                    np.uint64(direction_0),
                    tensor,
                    purpose,
                )
                if _is_float(w):
                    if in_place or t > 0:
                        _add_signs_in_place(target, words, start, c, decay)
                    else:
                        _add_signs(target, source, words, draws, start, c, decay, False)
                    is_written = True
                elif not in_place and t == 0:
                    _add_signs(target, source, words, draws, start, c, decay, stochastic)
                    source, is_written = target, True
                else:
                    _add_signs(there[:n], source, words, draws, start, c, decay, stochastic)
                    source, is_written = there[:n], False
                    here, there = there, here
                continue
            delta[:n] = 0
            for k in range(coefficients.shape[1]):
                direction, c = np.uint64(direction_0 + k), coefficients[t, k]
                if purpose == _RADEMACHER:
                    add_rademacher(delta, words, start, n, c, seed, step, direction, tensor)
                else:
                    add_gaussian(delta, words, values, start, n, c, seed, step, direction, tensor)
            _finish(there[:n], source, delta[:n], draws[:n], decay, stochastic)
            source = there[:n]
            here, there = there, here
        if not is_written:
            _copy(target, source)
        at += n


@intrinsic
def _pointer(typing_context, address):
    """An address as a pointer."""

    def codegen(context, builder, signature, args):
        return builder.inttoptr(args[0], context.get_value_type(numba.types.voidptr))

    return numba.types.voidptr(numba.types.int64), codegen


@intrinsic
def _take_next(typing_context, call):
    """Add one to the counter of a call, atomically; returns what it was."""

    def codegen(context, builder, signature, args):
        (array_type,) = signature.args
        view = context.make_array(array_type)(context, builder, args[0])
        place = context.get_constant(numba.types.intp, COUNTER)
        pointer = cgutils.get_item_pointer(context, builder, array_type, view, [place])
        one = context.get_constant(numba.types.int64, 1)
        return builder.atomic_rmw("add", pointer, one, "monotonic")

    return numba.types.int64(call), codegen


# Tables of int64. Addresses are of arrays that the caller keeps alive.
JOBS, NUM_JOBS, NUM_TASKS, PLAN, COUNTER, CALL_SIZE = range(6)
"""A call: which tensors, by which plan, and how many tasks have been taken."""

COEFFICIENTS, DECAYS, STEPS, NUM_STEPS, NUM_DIRECTIONS, SEED, PURPOSE, DIRECTION_0, STOCHASTIC = (
    range(9)
)
PLAN_SIZE = 9
"""A plan: what is done to each of them."""

WEIGHT, OUT, FIRST, SIZE, TENSOR, OFFSET, JOB_SIZE = range(7)
"""A job: one tensor; FIRST counts the elements of the jobs before."""


@lru_cache(maxsize=4)
def entry(stored, wide):
    """The address of `void (*)(void *call)`, which any number of threads may run on one call.

    The jobs' elements, laid end to end, are cut into tasks of `GRAIN`; each thread takes the next
    until none is left, so a thread on a busy core takes fewer.

    Args:
        stored: numpy dtype of the weights; uint16 stands for bfloat16, int16 for float16.
        wide: numpy dtype of the arithmetic.
    """

    @numba.cfunc(numba.types.void(numba.types.voidptr), cache=True)
    def run(address):
        call = numba.carray(address, (CALL_SIZE,), np.int64)
        jobs = numba.carray(_pointer(call[JOBS]), (call[NUM_JOBS], JOB_SIZE), np.int64)
        what = numba.carray(_pointer(call[PLAN]), (PLAN_SIZE,), np.int64)
        num_steps = what[NUM_STEPS]
        plan = (
            numba.carray(_pointer(what[COEFFICIENTS]), (num_steps, what[NUM_DIRECTIONS]), wide),
            numba.carray(_pointer(what[DECAYS]), (num_steps,), wide),
            numba.carray(_pointer(what[STEPS]), (num_steps,), np.uint64),
            np.uint64(what[SEED]),
            what[PURPOSE],
            what[DIRECTION_0],
            what[STOCHASTIC] != 0,
        )
        task = _take_next(call)
        while task < call[NUM_TASKS]:
            first, last = task * GRAIN, (task + 1) * GRAIN
            # The last job that begins at or before the task.
            low, high = 0, jobs.shape[0] - 1
            while low < high:
                middle = (low + high + 1) >> 1
                if jobs[middle, FIRST] <= first:
                    low = middle
                else:
                    high = middle - 1
            for i in range(low, jobs.shape[0]):
                job = jobs[i]
                if job[FIRST] >= last:
                    break
                begin, end = max(first - job[FIRST], 0), min(last - job[FIRST], job[SIZE])
                if begin < end:
                    _combine(
                        numba.carray(_pointer(job[WEIGHT]), (job[SIZE],), stored),
                        numba.carray(_pointer(job[OUT]), (job[SIZE],), stored),
                        begin,
                        end,
                        np.uint64(job[TENSOR]),
                        job[OFFSET],
                        job[WEIGHT] == job[OUT],
                        plan,
                    )
            task = _take_next(call)

    return run.address
