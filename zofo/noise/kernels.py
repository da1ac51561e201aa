"""The CPU kernels: one pass over a weight, without a temporary of the weight's size.

    out[i] = round(decay · w[i] + Σ_k c_k v_k[offset + i])

A thread works on chunks of 2,048 elements. It builds a chunk's random words, or the sum of its
directions, in a buffer that stays in the first-level cache. One vectorised loop then reads w and
writes out. `kernel_draws` draws the directions, and `kernel_formats` rounds the results.

A rank-one direction has few signs, so a thread draws those of a tile of the matrix once:

    out[i, j] = round(decay · w[i, j] + Σ_k (c_k a_k[i]) b_k[j])

A product with a sign is exact, and the sum runs over k in order, so every backend and every tiling
gives the same bits.
"""

# Numba infers the types of these functions from their arguments.
# mypy: disallow-untyped-defs=False, disallow-untyped-calls=False, check-untyped-defs=False
from __future__ import annotations

import inspect
import zlib
from functools import lru_cache

import numba
import numpy as np
from llvmlite import ir
from numba.core import cgutils
from numba.extending import intrinsic, overload

from zofo.noise import kernel_draws, kernel_formats, kernel_products, philox
from zofo.noise.kernel_cache import can_cache
from zofo.noise.kernel_draws import (
    SIGN,
    add_gaussian,
    add_rademacher,
    draw_rounding_bits,
    draw_signs,
    draw_words,
)
from zofo.noise.kernel_formats import conversion, round_stochastically, round_to_nearest, widen
from zofo.noise.kernel_products import BLOCK_ROWS, sum_products

CHUNK = 2048
GRAIN = 1 << 15
"""Elements that a thread takes at a time. They take about 10 µs."""
MATRIX_GRAIN = 1 << 18
"""The same for rank-one directions, whose signs a thread draws again for each task."""
_TILE_ROWS, _TILE_COLUMNS = 256, 1024
_PAD = 16
"""Further columns, because lines a power of 2 apart would evict each other from the cache."""
_AHEAD = 1024
"""Elements between the one read and the one prefetched. Prefetching measured 1.1 times faster."""
_RADEMACHER, _ROWS, _COLUMNS = philox.RADEMACHER, philox.ROWS, philox.COLUMNS


@intrinsic
def _prefetch(typing_context, array, index):
    """Ask for the cache line of array[index]. This is a hint and changes no value."""

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


@numba.njit
def _finish(result, w, delta, draws, decay, stochastic):
    """Write round(decay · w + delta) to result. All arrays have the same length."""
    if stochastic:
        for i in range(w.size):
            result[i] = round_stochastically(widen(w[i]) * decay + delta[i], draws[i], w[i])
    else:
        for i in range(w.size):
            result[i] = round_to_nearest(widen(w[i]) * decay + delta[i], w[i])


def _is_float(w):
    """Whether w holds float32 or float64, which is known when numba compiles."""


@overload(_is_float)
def _is_float_overload(w):
    answer = isinstance(w.dtype, numba.types.Float)
    return lambda w: answer


@numba.njit
def _add_signs(out, w, words, draws, start, c, decay, stochastic):
    """Write round(decay · w ± c) to out of the same length.

    One direction of signs needs no buffer for the sum.
    """
    n = out.size
    origin = (start >> 7) << 7  # first element of the first block of words
    for j in range((start - origin) >> 5, ((start + n - 1 - origin) >> 5) + 1):
        word = words[j]
        low = origin + (j << 5) - start  # position in `out` of the word's lowest bit
        if low >= 0 and low + 32 <= n:
            # LLVM vectorises the loops only over slices, whose indices need no check.
            target, source = out[low : low + 32], w[low : low + 32]
            # 32 elements span two cache lines in float32.
            _prefetch(w, low + _AHEAD)
            _prefetch(w, low + _AHEAD + 16)
            if stochastic:
                drawn = draws[low : low + 32]
                for i in range(32):
                    sign = np.uint32(word << np.uint32(31 - i)) & SIGN
                    x = widen(source[i]) * decay + (-c if sign else c)
                    target[i] = round_stochastically(x, drawn[i], source[i])
            else:
                for i in range(32):
                    sign = np.uint32(word << np.uint32(31 - i)) & SIGN
                    x = widen(source[i]) * decay + (-c if sign else c)
                    target[i] = round_to_nearest(x, source[i])
        else:
            for e in range(max(low, 0), min(low + 32, n)):
                sign = np.uint32(word << np.uint32(31 - (e - low))) & SIGN
                x = widen(w[e]) * decay + (-c if sign else c)
                out[e] = (
                    round_stochastically(x, draws[e], w[e])
                    if stochastic
                    else round_to_nearest(x, w[e])
                )


@numba.njit
def _add_signs_in_place(w, words, start, c, decay):
    """Write decay · w ± c to w, for float32 and float64.

    LLVM would not vectorise `_add_signs` with one array as both arguments, because they overlap.
    """
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
                sign = np.uint32(word << np.uint32(31 - i)) & SIGN
                part[i] = part[i] * decay + (-c if sign else c)
        else:
            for e in range(max(low, 0), min(low + 32, n)):
                sign = np.uint32(word << np.uint32(31 - (e - low))) & SIGN
                w[e] = w[e] * decay + (-c if sign else c)


@numba.njit
def _copy(target, source):
    for i in range(target.size):
        target[i] = source[i]


@numba.njit
def _finish_in_place(target, delta, decay):
    """Write decay · target + delta to target, for float32 and float64."""
    for j in range(target.size):
        target[j] = target[j] * decay + delta[j]


@numba.njit
def _add_products_in_place(target, c, signs, decay):
    """Write decay · target + c · signs to target, for float32 and float64."""
    for j in range(target.size):
        target[j] = target[j] * decay + c * signs[j]


@numba.njit
def _combine_matrix(w, out, begin, end, width, tensor, offset, in_place, plan):
    """`_combine` for rank-one directions of a matrix of `width` columns."""
    coefficients, decays, steps, seed, _, direction_0, stochastic = plan
    num_directions = coefficients.shape[1]
    left = np.zeros((num_directions, _TILE_ROWS + _PAD), coefficients.dtype)  # c_k a_k[i]
    right = np.ones((num_directions, _TILE_COLUMNS + _PAD), coefficients.dtype)  # b_k[j]
    sums = np.empty((BLOCK_ROWS, _TILE_COLUMNS), coefficients.dtype)
    words = np.empty(_TILE_COLUMNS + 8, np.uint32)
    draws = np.empty(_TILE_COLUMNS, np.uint32)
    result = np.empty(_TILE_COLUMNS, w.dtype)
    # Tiles of equal width, because short ones have short rows, which are slow to read.
    num_tiles = (width - 1) // _TILE_COLUMNS + 1
    tile_columns = (width - 1) // num_tiles + 1
    # Positions are those in the whole tensor. The first and the last row may be parts of rows.
    first, last = offset + begin, offset + end
    for row_0 in range(first // width, (last - 1) // width + 1, _TILE_ROWS):
        num_rows = min(_TILE_ROWS, (last - 1) // width + 1 - row_0)
        for column_0 in range(0, width, tile_columns):
            num_columns = min(tile_columns, width - column_0)
            # All steps of a tile run while it is in the cache.
            for t in range(steps.size):
                step, decay = steps[t], decays[t]
                for k in range(num_directions):
                    address = (seed, step, np.uint64(direction_0 + k), tensor)
                    a, c = left[k, :num_rows], coefficients[t, k]
                    draw_signs(a, words, row_0, *address, _ROWS)
                    for i in range(num_rows):
                        a[i] = a[i] * c
                    draw_signs(right[k, :num_columns], words, column_0, *address, _COLUMNS)
                for i in range(num_rows):
                    whole = (row_0 + i) * width + column_0  # where the row begins in this tile
                    start, stop = max(whole, first), min(whole + num_columns, last)
                    n, at, shift = stop - start, start - offset, start - whole
                    if num_directions > 1 and i % BLOCK_ROWS == 0:
                        sum_products(sums, left, right, i, num_columns)
                    if n <= 0:
                        continue
                    target = out[at : at + n]
                    if t == 0 and not in_place:
                        _copy(target, w[at : at + n])
                    delta = sums[i % BLOCK_ROWS, shift : shift + n]
                    if num_directions == 1:
                        signs = right[0, shift : shift + n]
                        if _is_float(w):
                            _add_products_in_place(target, left[0, i], signs, decay)
                            continue
                        for j in range(n):
                            delta[j] = left[0, i] * signs[j]
                    if stochastic:
                        draw_rounding_bits(draws, words, start, n, seed, step, tensor)
                    if _is_float(w):
                        _finish_in_place(target, delta, decay)
                    else:
                        # LLVM vectorises only where source and target do not overlap.
                        _finish(result[:n], target, delta, draws[:n], decay, stochastic)
                        _copy(target, result)


@numba.njit
def _combine(w, out, begin, end, tensor, offset, in_place, plan):
    """Compute elements begin .. end − 1 of out: w after one update for each step of the plan.

    Update t is w ← round(decays[t] · w + Σ_k coefficients[t, k] v_k[steps[t]]). A chunk takes all
    updates before it is written, so w is read once and out is written once. The result equals
    that of one update at a time.
    """
    coefficients, decays, steps, seed, purpose, direction_0, stochastic = plan
    delta = np.empty(CHUNK, coefficients.dtype)
    # Whole blocks are drawn, which may reach beyond both ends of a chunk.
    values = np.empty(CHUNK + 8, np.float32)
    words = np.empty(CHUNK + 8, np.uint32)
    draws = np.empty(CHUNK, np.uint32)
    # Two buffers alternate, because LLVM vectorises only where source and target do not overlap.
    here, there = np.empty(CHUNK, w.dtype), np.empty(CHUNK, w.dtype)
    use_signs = purpose == _RADEMACHER and coefficients.shape[1] == 1
    at = begin  # position in w; `start` below is the position in the whole tensor
    while at < end:
        start = offset + at
        # A chunk ends on a multiple of CHUNK within the tensor, so it uses whole blocks of words.
        n = min(CHUNK - (start & (CHUNK - 1)), end - at)
        source, target = w[at : at + n], out[at : at + n]
        is_written = False
        for t in range(steps.size):
            step, decay, c = steps[t], decays[t], coefficients[t, 0]
            if stochastic:
                draw_rounding_bits(draws, words, start, n, seed, step, tensor)
            if use_signs:
                # The common case, one direction of signs, adds to w directly.
                first_block, num_blocks = start >> 7, ((start + n - 1) >> 7) + 1 - (start >> 7)
                first = np.uint64(direction_0)
                draw_words(words, first_block, num_blocks, seed, step, first, tensor, purpose)
                if _is_float(w):
                    # After the first step, the current values are in `target`.
                    if in_place or t > 0:
                        _add_signs_in_place(target, words, start, c, decay)
                    else:
                        _add_signs(target, source, words, draws, start, c, decay, False)
                    is_written = True
                # 16-bit weights are rounded after each step, in a buffer unless `out` can serve.
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


_pointer = conversion(
    numba.types.int64,
    numba.types.voidptr,
    lambda builder, address: builder.inttoptr(address, ir.IntType(8).as_pointer()),
)


@intrinsic
def _take_next(typing_context, call):
    """Add one to the counter of a call atomically, and return its value before."""

    def codegen(context, builder, signature, args):
        (array_type,) = signature.args
        view = context.make_array(array_type)(context, builder, args[0])
        place = context.get_constant(numba.types.intp, COUNTER)
        pointer = cgutils.get_item_pointer(context, builder, array_type, view, [place])
        one = context.get_constant(numba.types.int64, 1)
        return builder.atomic_rmw("add", pointer, one, "monotonic")

    return numba.types.int64(call), codegen


# The fields of the int64 tables. An address points to an array that the caller keeps alive.
JOBS, NUM_JOBS, NUM_TASKS, PLAN, COUNTER, TASK_SIZE, CALL_SIZE = range(7)
"""A call: its jobs, its plan, the number of tasks that threads have taken, elements in a task."""

COEFFICIENTS, DECAYS, STEPS, NUM_STEPS, NUM_DIRECTIONS, SEED, PURPOSE, DIRECTION_0, STOCHASTIC = (
    range(9)
)
PLAN_SIZE = 9
"""A plan: the updates that each tensor takes."""

WEIGHT, OUT, FIRST, SIZE, TENSOR, OFFSET, WIDTH, JOB_SIZE = range(8)
"""A job: one tensor. FIRST is the number of elements in all jobs before it, WIDTH that of a row."""


@lru_cache(maxsize=1)
def _checksum():
    """A checksum of the sources that the compiled functions depend on.

    Numba compiles again when this file changes, but it does not watch the files imported here. A
    value of the closure is part of the cache's key, so the compiled functions hold this one.
    """
    text = "".join(map(inspect.getsource, (kernel_draws, kernel_formats, kernel_products, philox)))
    return zlib.crc32(text.encode())


@lru_cache(maxsize=1)
def sign_filler():
    """The function that fills float32 [directions, size] with the signs of one side of a matrix."""
    sources = _checksum()

    @numba.njit("void(float32[:, ::1], uint64, uint64, int64, uint64, int64)", cache=can_cache())
    def fill(signs, seed, step, direction_0, tensor, purpose):
        _ = sources
        words = np.empty(signs.shape[1] // 32 + 8, np.uint32)
        for k in range(signs.shape[0]):
            direction = np.uint64(direction_0 + k)
            draw_signs(signs[k], words, 0, seed, step, direction, tensor, purpose)

    return fill


@lru_cache(maxsize=4)
def entry(stored, wide):
    """The address of `void (*)(void *call)`, which any number of threads may run on one call.

    The elements of all jobs, laid end to end, are cut into tasks of TASK_SIZE elements. Each thread
    takes the next task until none is left, so a thread on a busy core takes fewer.

    Args:
        stored: numpy dtype of the weights; uint16 stands for bfloat16, int16 for float16.
        wide: numpy dtype of the arithmetic.
    """
    sources = _checksum()

    @numba.cfunc(numba.types.void(numba.types.voidptr), cache=can_cache())
    def run(address):
        _ = sources  # makes it part of the closure
        call = numba.carray(address, (CALL_SIZE,), np.int64)
        jobs = numba.carray(_pointer(call[JOBS]), (call[NUM_JOBS], JOB_SIZE), np.int64)
        table = numba.carray(_pointer(call[PLAN]), (PLAN_SIZE,), np.int64)
        num_steps = table[NUM_STEPS]
        plan = (
            numba.carray(_pointer(table[COEFFICIENTS]), (num_steps, table[NUM_DIRECTIONS]), wide),
            numba.carray(_pointer(table[DECAYS]), (num_steps,), wide),
            numba.carray(_pointer(table[STEPS]), (num_steps,), np.uint64),
            np.uint64(table[SEED]),
            table[PURPOSE],
            table[DIRECTION_0],
            table[STOCHASTIC] != 0,
        )
        task = _take_next(call)
        while task < call[NUM_TASKS]:
            first, last = task * call[TASK_SIZE], (task + 1) * call[TASK_SIZE]
            # A binary search finds the last job that begins at or before the task.
            low, high = 0, jobs.shape[0] - 1
            while low < high:
                middle = (low + high + 1) >> 1
                if jobs[middle, FIRST] <= first:
                    low = middle
                else:
                    high = middle - 1
            # A task may span the end of one tensor and the beginning of others.
            for i in range(low, jobs.shape[0]):
                job = jobs[i]
                if job[FIRST] >= last:
                    break
                begin, end = max(first - job[FIRST], 0), min(last - job[FIRST], job[SIZE])
                if begin >= end:
                    continue
                w = numba.carray(_pointer(job[WEIGHT]), (job[SIZE],), stored)
                out = numba.carray(_pointer(job[OUT]), (job[SIZE],), stored)
                tensor, offset = np.uint64(job[TENSOR]), job[OFFSET]
                in_place = job[WEIGHT] == job[OUT]
                if table[PURPOSE] == _ROWS:
                    width = job[WIDTH]
                    _combine_matrix(w, out, begin, end, width, tensor, offset, in_place, plan)
                else:
                    _combine(w, out, begin, end, tensor, offset, in_place, plan)
            task = _take_next(call)

    return run.address
