"""Directions as a pure function of their address: the readable integer reference.

    v[i] = g(Philox-4x32-10(key = seed, counter = (block(i), tensor, step, direction, purpose)))

Philox (Salmon et al., 2011) is a counter-based generator. It has no state, so any element can be
drawn alone, in any order, on any device. No two addresses have the same 128-bit counter:

    word 0   low 32 bits of the block          word 2   step
    word 1   tensor << 12 | high 12 bits       word 3   purpose << 24 | direction

One block of 128 bits holds 128 signs, 4 Gaussian values (Box-Muller) or 8 sixteen-bit rounding
draws. A rank-one direction v = a bᵀ of a matrix has one sign for each row (a, purpose ROWS) and one
for each column (b, purpose COLUMNS), so its block counts rows or columns instead of elements.

This file is written to be read. It runs on any device where torch has int64, and the tests compare
the fast kernels with it.

References:
    J. Salmon, M. Moraes, R. Dror, D. Shaw, "Parallel Random Numbers: As Easy as 1, 2, 3", SC 2011.
    G. Box, M. Muller, "A Note on the Generation of Random Normal Deviates", 1958.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Final

import torch
from torch import Tensor

NOISE_VERSION: Final = 1
"""Grows whenever an address gives another number. Every artefact records it."""

MULTIPLIER_0: Final = 0xD2511F53
MULTIPLIER_1: Final = 0xCD9E8D57
WEYL_0: Final = 0x9E3779B9
WEYL_1: Final = 0xBB67AE85
NUM_ROUNDS: Final = 10
MASK32: Final = 0xFFFFFFFF

# The use of a block. Two purposes never share random bits.
RADEMACHER: Final = 0
GAUSSIAN: Final = 1
ROUNDING: Final = 2
ROWS: Final = 3
COLUMNS: Final = 4

ELEMENTS_PER_BLOCK: Final = {RADEMACHER: 128, GAUSSIAN: 4, ROUNDING: 8, ROWS: 128, COLUMNS: 128}

MAX_STEP: Final = 2**32
MAX_TENSORS: Final = 2**20
MAX_DIRECTIONS: Final = 2**24
MAX_BLOCKS: Final = 2**44

CHUNK: Final = 1 << 20


def _multiply_high_low(multiplier: int, x: Tensor) -> tuple[Tensor, Tensor]:
    """The high and the low 32 bits of multiplier · x."""
    # The full product has 64 bits, too many for a signed int64, so half the multiplier at a time.
    high, low = multiplier >> 16, multiplier & 0xFFFF
    from_low = low * x  # < 2^48
    from_high = high * x + (from_low >> 16)  # < 2^49
    return from_high >> 16, ((from_high & 0xFFFF) << 16) | (from_low & 0xFFFF)


def philox(counter: tuple[Tensor, Tensor, Tensor, Tensor], seed: int) -> tuple[Tensor, ...]:
    """Philox-4x32-10.

    Args:
        counter: four int64 tensors of one shape, each with values in [0, 2^32).
        seed: the 64-bit key.

    Returns:
        Four int64 tensors of that shape with values in [0, 2^32).
    """
    c0, c1, c2, c3 = counter
    key_0, key_1 = seed & MASK32, (seed >> 32) & MASK32
    for _ in range(NUM_ROUNDS):
        high_0, low_0 = _multiply_high_low(MULTIPLIER_0, c0)
        high_1, low_1 = _multiply_high_low(MULTIPLIER_1, c2)
        c0, c1, c2, c3 = high_1 ^ c1 ^ key_0, low_1, high_0 ^ c3 ^ key_1, low_0
        key_0, key_1 = (key_0 + WEYL_0) & MASK32, (key_1 + WEYL_1) & MASK32
    return c0, c1, c2, c3


def words(
    elements: Tensor, *, seed: int, step: int, direction: int | Tensor, tensor: int, purpose: int
) -> Tensor:
    """The four random words of each element's block.

    Args:
        elements: int64, shape [n], element indices within the tensor.
        seed: seed of the run, in [0, 2^64).
        step: in [0, 2^32).
        direction: in [0, 2^24); an int64 tensor, [n], gives each element its own.
        tensor: in [0, 2^20).
        purpose: a key of ELEMENTS_PER_BLOCK.

    Returns:
        int64, shape [n, 4], values in [0, 2^32).
    """
    block = elements // ELEMENTS_PER_BLOCK[purpose]  # below 2^44
    counter = (
        block & MASK32,
        (block >> 32) | (tensor << 12),
        torch.full_like(block, step),
        torch.zeros_like(block) + ((purpose << 24) | direction),
    )
    return torch.stack(philox(counter, seed), dim=-1)


def rademacher(
    elements: Tensor,
    *,
    seed: int,
    step: int,
    direction: int | Tensor,
    tensor: int,
    purpose: int = RADEMACHER,
) -> Tensor:
    """Signs ±1 with equal probability: float32, shape of `elements`."""
    four = words(
        elements, seed=seed, step=step, direction=direction, tensor=tensor, purpose=purpose
    )
    # A word holds 32 signs: bits 5 and 6 of the index choose the word, bits 0 to 4 the sign.
    word = four.gather(-1, ((elements >> 5) & 3).unsqueeze(-1)).squeeze(-1)
    return (1 - 2 * ((word >> (elements & 31)) & 1)).float()


def rank_one(
    elements: Tensor, width: int, *, seed: int, step: int, direction: int, tensor: int
) -> Tensor:
    """Elements of a bᵀ for a matrix of `width` columns: ±1, float32, shape of `elements`."""
    address = {"seed": seed, "step": step, "direction": direction, "tensor": tensor}
    a = rademacher(elements // width, purpose=ROWS, **address)
    return a * rademacher(elements % width, purpose=COLUMNS, **address)


def gaussian(elements: Tensor, *, seed: int, step: int, direction: int, tensor: int) -> Tensor:
    """Standard normal values by Box-Muller, |v| < 6.8: float32, shape of `elements`.

    Words 0 and 1 of a block give elements 0 (cosine) and 1 (sine), words 2 and 3 the other two.
    """
    four = words(
        elements, seed=seed, step=step, direction=direction, tensor=tensor, purpose=GAUSSIAN
    )
    # MPS has no float64.
    wide = torch.float32 if elements.device.type == "mps" else torch.float64
    pair = (elements & 2).unsqueeze(-1)  # first word of the pair: 0 or 2
    # The half keeps u1 above 0, where the logarithm is finite.
    u1 = (four.gather(-1, pair).squeeze(-1).to(wide) + 0.5) * 2.0**-32
    angle = four.gather(-1, pair + 1).squeeze(-1).to(wide) * (2 * math.pi * 2.0**-32)
    radius = torch.sqrt(-2 * torch.log(u1))
    return (radius * torch.where((elements & 1) == 0, angle.cos(), angle.sin())).float()


def rounding_bits(elements: Tensor, *, seed: int, step: int, tensor: int, draw: int = 0) -> Tensor:
    """Sixteen uniform bits for each element: int64 in [0, 2^16), shape of `elements`.

    A step that rounds more than once has a `draw` for each; the kernels' is 0.
    """
    four = words(elements, seed=seed, step=step, direction=draw, tensor=tensor, purpose=ROUNDING)
    # A word holds two draws: bits 1 and 2 of the index choose the word, bit 0 the half.
    word = four.gather(-1, ((elements >> 1) & 3).unsqueeze(-1)).squeeze(-1)
    return (word >> (16 * (elements & 1))) & 0xFFFF


def round_stochastically(exact: Tensor, bits: Tensor, dtype: torch.dtype) -> Tensor:
    """Round float32 at random to one of its two neighbours in `dtype`.

    The probability of the neighbour away from zero is the fraction that truncation cuts off.

    Args:
        exact: float32, any shape.
        bits: int64 in [0, 2^16), same shape.
        dtype: torch.bfloat16 or torch.float16.

    Returns:
        A tensor of `dtype` whose expectation over `bits` is `exact`, up to 2^-16 of a spacing.
    """
    raw = exact.view(torch.int32)
    sign, magnitude = raw & -0x80000000, raw & 0x7FFFFFFF
    if dtype == torch.bfloat16:
        # bfloat16 is the upper half of a float32. The sum carries into it as often as it should.
        rounded = (magnitude + bits.int()) & -0x10000
        result = (rounded | sign).view(torch.float32)
    else:
        # float16 has 10 of the 23 bits of the mantissa, so 13 random bits decide.
        normal = ((magnitude + (bits.int() >> 3)) & -0x2000) | sign
        # Below 2^-14, the spacing of float16 is 2^-24 for all exponents.
        tiny = torch.floor(exact.abs() * 2.0**24 + bits.float() * 2.0**-16) * 2.0**-24
        result = torch.where(
            exact.abs() < 2.0**-14, torch.copysign(tiny, exact), normal.view(torch.float32)
        )
    return torch.where(torch.isfinite(exact), result, exact).to(dtype)


def combine(
    weight: Tensor,
    out: Tensor,
    coefficients: tuple[float, ...],
    *,
    decay: float,
    seed: int,
    step: int,
    tensor: int,
    offset: int,
    purpose: int,
    first_direction: int,
    stochastic: bool,
) -> None:
    """The reference of `zofo.noise.combine.combine`, whose docstring explains the arguments."""
    wide = torch.float64 if weight.dtype == torch.float64 else torch.float32
    if purpose == ROWS:
        draw: Callable[..., Tensor] = functools.partial(rank_one, width=weight.shape[-1])
    else:
        draw = rademacher if purpose == RADEMACHER else gaussian
    source, target = weight.reshape(-1), out.view(-1)
    # The temporaries have 8 bytes per element, so a chunk at a time bounds their memory.
    for start in range(0, weight.numel(), CHUNK):
        piece = source[start : start + CHUNK]
        elements = torch.arange(piece.numel(), device=piece.device) + (offset + start)
        delta = torch.zeros(piece.numel(), dtype=wide, device=piece.device)
        for k, c in enumerate(coefficients):
            v = draw(elements, seed=seed, step=step, direction=first_direction + k, tensor=tensor)
            delta = delta + v.to(wide) * torch.tensor(c, dtype=wide, device=piece.device)
        exact = piece.to(wide) * torch.tensor(decay, dtype=wide, device=piece.device) + delta
        if stochastic and weight.dtype in (torch.bfloat16, torch.float16):
            bits = rounding_bits(elements, seed=seed, step=step, tensor=tensor)
            target[start : start + CHUNK] = round_stochastically(exact, bits, weight.dtype)
        else:
            target[start : start + CHUNK] = exact.to(out.dtype)
