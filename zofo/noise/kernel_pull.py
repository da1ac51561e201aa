"""The CPU kernel of a pull of 16-bit weights: one pass over a weight and its origin.

It has the bits of the torch operations in `zofo.noise.pull`.
"""

# Numba infers the types of these functions from their arguments.
# mypy: disallow-untyped-defs=False, disallow-untyped-calls=False, check-untyped-defs=False
from __future__ import annotations

import inspect
import zlib
from functools import lru_cache

import numba
import numpy as np

from zofo.noise import kernel_draws, kernel_formats, philox
from zofo.noise.kernel_cache import can_cache
from zofo.noise.kernel_draws import draw_words
from zofo.noise.kernel_formats import round_stochastically, widen

_CHUNK = 2048
_EACH = philox.ELEMENTS_PER_BLOCK[philox.ROUNDING]
_ROUNDING = philox.ROUNDING


@lru_cache(maxsize=2)
def puller(stored):
    """The function (here, there, share, seed, step, draw, tensor) that moves `here`, in place.

    Args:
        stored: numpy dtype of the weights; uint16 stands for bfloat16, int16 for float16.
    """
    # A change of these files compiles the function again, because its closure holds their checksum.
    parts = map(inspect.getsource, (kernel_draws, kernel_formats, philox))
    sources = zlib.crc32("".join(parts).encode())
    kind = numba.from_dtype(np.dtype(stored))[::1]
    words_of_address = (numba.uint64,) * 4
    signature = numba.void(kind, kind, numba.float32, *words_of_address)

    @numba.njit(signature, cache=can_cache(), nogil=True)
    def pull(here, there, share, seed, step, draw, tensor):
        _ = sources
        words, result = np.empty(_CHUNK // 2, np.uint32), np.empty(_CHUNK, here.dtype)
        for start in range(0, here.size, _CHUNK):
            n = min(_CHUNK, here.size - start)
            now, goals, moved = here[start : start + n], there[start : start + n], result[:n]
            num_blocks = (n - 1) // _EACH + 1
            draw_words(words, start // _EACH, num_blocks, seed, step, draw, tensor, _ROUNDING)
            # A little-endian CPU stores the low half of a word first: the draw of the even element.
            draws = words.view(np.uint16)[:n]
            for i in range(n):
                x, goal = widen(now[i]), widen(goals[i])
                exact = x + (goal - x) * share
                rounded = round_stochastically(exact, np.uint32(draws[i]), now[i])
                moved[i] = rounded if x != goal else now[i]
            for i in range(n):
                now[i] = moved[i]

    return pull
