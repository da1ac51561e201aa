"""Directions and rounding bits on the CPU, drawn chunk by chunk into small buffers.

`zofo.noise.philox` is the readable reference. Without `fastmath`, LLVM neither fuses nor reorders
these operations, so Rademacher signs equal the reference bit for bit. The Gaussian's logarithm,
sine and cosine are series in plain float32 arithmetic, so every CPU computes the same bits. LLVM
vectorises these series; it cannot vectorise calls of the C library.
"""

# Numba infers the types of these functions from their arguments.
# mypy: disallow-untyped-defs=False, disallow-untyped-calls=False, check-untyped-defs=False
from __future__ import annotations

import math

import numba
import numpy as np

from zofo.noise import philox
from zofo.noise.kernel_formats import bits_of_float, float_of_bits

_M0, _M1 = np.uint64(philox.MULTIPLIER_0), np.uint64(philox.MULTIPLIER_1)
_W0, _W1 = np.uint64(philox.WEYL_0), np.uint64(philox.WEYL_1)
_MASK = np.uint64(philox.MASK32)
_S32 = np.uint64(32)
_ONE32 = np.float32(1)
SIGN = np.uint32(1 << 31)  # the highest bit of a word
_RADEMACHER, _GAUSSIAN, _ROUNDING = philox.RADEMACHER, philox.GAUSSIAN, philox.ROUNDING


@numba.njit(inline="always")
def _philox(block, seed, step, direction, tensor, purpose):
    # The words of the counter; `philox` shows which part of the address each holds.
    c0 = block & _MASK
    c1 = (block >> _S32) | (tensor << np.uint64(12))
    c2 = step
    c3 = (purpose << np.uint64(24)) | direction
    k0, k1 = seed & _MASK, seed >> _S32
    for _ in range(10):
        # Full 64-bit products, whose halves mix the words.
        p0, p1 = _M0 * c0, _M1 * c2
        c0, c1, c2, c3 = (p1 >> _S32) ^ c1 ^ k0, p1 & _MASK, (p0 >> _S32) ^ c3 ^ k1, p0 & _MASK
        k0, k1 = (k0 + _W0) & _MASK, (k1 + _W1) & _MASK
    return c0, c1, c2, c3


@numba.njit
def draw_words(words, first_block, num_blocks, seed, step, direction, tensor, purpose):
    """Write the four words of each block to words [4 · num_blocks], uint32, block after block."""
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
    first_block = start >> 7  # a block holds 128 signs
    num_blocks = ((stop - 1) >> 7) + 1 - first_block
    draw_words(words, first_block, num_blocks, seed, step, direction, tensor, _RADEMACHER)
    for j in range(4 * num_blocks):
        word = words[j]
        low = (first_block << 7) + (j << 5)  # element of the word's lowest bit
        if low >= start and low + 32 <= stop:
            # LLVM vectorises the loop only over a slice, whose indices need no check.
            part = delta[low - start : low - start + 32]
            for i in range(32):
                part[i] += -c if np.uint32(word << np.uint32(31 - i)) & SIGN else c
        else:
            # The first and the last word may reach beyond the chunk.
            for e in range(max(low, start), min(low + 32, stop)):
                bit = np.uint32(word << np.uint32(31 - (e - low))) & SIGN
                delta[e - start] += -c if bit else c


@numba.njit
def draw_signs(signs, words, start, seed, step, direction, tensor, purpose):
    """Write the signs ±1 of elements start .. start + signs.size − 1 to signs.

    `words` has room for whole blocks.
    """
    n = signs.size
    first_block = start >> 7
    num_blocks = ((start + n - 1) >> 7) + 1 - first_block
    draw_words(words, first_block, num_blocks, seed, step, direction, tensor, purpose)
    shift = start - (first_block << 7)
    # Whole words go through a slice, because LLVM vectorises only loops without index checks.
    at = 0
    while at < n:
        word, bit = words[(at + shift) >> 5], (at + shift) & 31
        m = min(32 - bit, n - at)
        part = signs[at : at + m]
        if m == 32:
            for i in range(32):
                part[i] = -1 if np.uint32(word << np.uint32(31 - i)) & SIGN else 1
        else:
            for i in range(m):
                part[i] = -1 if np.uint32(word << np.uint32(31 - (i + bit))) & SIGN else 1
        at += m


@numba.njit(inline="always")
def _normal_pair(word_1, word_2):
    """Two standard normals from two words (Box-Muller), float32."""
    # u in (0, 1], at least 2^-33.
    u = (np.float32(word_1) + np.float32(0.5)) * np.float32(2.0**-32)
    # ln u = e ln 2 + 2 artanh(s), m in [sqrt(1/2), sqrt 2), s = (m - 1)/(m + 1), |s| < 0.172
    # The bits of 1 less those of sqrt(1/2) are added, so the exponent e grows at sqrt(1/2), not 1.
    bits = np.uint32(bits_of_float(u) + np.uint32(0x3F800000 - 0x3F3504F3))
    e = np.float32(np.int32(np.int32(bits >> np.uint32(23)) - np.int32(127)))
    m = float_of_bits(np.uint32(np.uint32(bits & np.uint32(0x7FFFFF)) + np.uint32(0x3F3504F3)))
    s = (m - _ONE32) / (m + _ONE32)
    z = s * s
    series = np.float32(1 / 7) + z * np.float32(1 / 9)
    series = np.float32(1 / 3) + z * (np.float32(1 / 5) + z * series)
    log = e * np.float32(math.log(2)) + np.float32(2) * (s + s * z * series)
    # For u near 1, rounding may leave the logarithm slightly above zero.
    twice = np.float32(-2) * log
    radius = np.float32(math.sqrt(twice if twice > np.float32(0) else np.float32(0)))
    # The angle is its nearest quarter turn plus the rest, in [-1/8, 1/8) of a turn.
    quarter = np.uint32(np.uint32(word_2 + np.uint32(1 << 29)) >> np.uint32(30))
    rest = np.int32(np.uint32(word_2 - np.uint32(quarter << np.uint32(30))))
    t = np.float32(rest) * np.float32(2 * math.pi * 2.0**-32)
    t2 = t * t
    a = np.float32(-1 / 5040) + t2 * np.float32(1 / 362880)
    sine = t + t * t2 * (np.float32(-1 / 6) + t2 * (np.float32(1 / 120) + t2 * a))
    b = np.float32(1 / 40320) + t2 * np.float32(-1 / 3628800)
    b = np.float32(1 / 24) + t2 * (np.float32(-1 / 720) + t2 * b)
    cosine = _ONE32 + t2 * (np.float32(-1 / 2) + t2 * b)
    # A quarter turn maps (cos, sin) to (−sin, cos), so odd quarters swap the two.
    odd = np.uint32(quarter & np.uint32(1)) != np.uint32(0)
    x, y = (sine, cosine) if odd else (cosine, sine)
    x = -x if (quarter == np.uint32(1)) | (quarter == np.uint32(2)) else x
    y = -y if quarter >= np.uint32(2) else y
    return radius * x, radius * y


# Python's error model checks for a zero divisor, and LLVM does not vectorise that check.
@numba.njit(error_model="numpy")
def add_gaussian(delta, words, values, start, n, c, seed, step, direction, tensor):
    """Add c · v[start : start + n] to delta[:n]. `values` has room for whole blocks of four."""
    first_block = start >> 2  # a block holds 4 values
    num_blocks = ((start + n - 1) >> 2) + 1 - first_block
    draw_words(words, first_block, num_blocks, seed, step, direction, tensor, _GAUSSIAN)
    pairs, normals = words[: 4 * num_blocks], values[: 4 * num_blocks]
    for i in range(2 * num_blocks):
        normals[2 * i], normals[2 * i + 1] = _normal_pair(pairs[2 * i], pairs[2 * i + 1])
    shift = start - (first_block << 2)  # position of element `start` in its block
    part, drawn = delta[:n], values[shift : shift + n]
    for i in range(n):
        part[i] += c * drawn[i]


@numba.njit
def draw_rounding_bits(draws, words, start, n, seed, step, tensor):
    """Write the sixteen rounding bits of elements start .. start + n to draws[:n]."""
    first_block = start >> 3  # a block holds 8 draws
    num_blocks = ((start + n - 1) >> 3) + 1 - first_block
    zero = np.uint64(0)
    draw_words(words, first_block, num_blocks, seed, step, zero, tensor, _ROUNDING)
    # A little-endian CPU stores the low half of a word first: the draw of the even element.
    halves = words[: 4 * num_blocks].view(np.uint16)
    shift = start - (first_block << 3)
    part, drawn = draws[:n], halves[shift : shift + n]
    for i in range(n):
        part[i] = np.uint32(drawn[i])
