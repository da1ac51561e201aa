"""The theorem's caps on both learning rates.

    η_x ≤ min{ c / (L_x n d_x), c / (√(T n) L_x) }        η_y ≤ min{ c / (L_y n), c / (√(T n) L_y) }

Here n is the number of samples of an epoch and T the number of epochs. Each batch counts as one
sample, because each batch is one term of the sum. One source prints √T·n in place of √(T n), so
both forms are computed. The constants c are unknown and set to 1. L_x and L_y are unknown too.
Forward passes give lower bounds of them, so the true caps are lower still. The caps hold for the
worst function of the class. Their d_x is the worst case of tr H / λ_max. If few eigenvalues are
large, L_x d_x exceeds tr H by far, and the best rate follows tr H.

    T ≥ C (ε⁻² / δ + ε⁻⁴ / n)

This many epochs give an expected mean squared gradient norm of ε² with probability 1 − δ. C is set
to 1.

References:
    arXiv 2604.09940, the convergence theorem of hybrid reshuffling SGD, as transcribed.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

Reading = Literal["sqrt(Tn)", "sqrt(T)n"]


@dataclass(frozen=True)
class Cap:
    """The cap on one block's rate.

    Attributes:
        rate: the smaller of `first` and `second`.
        first: c / (L n d), without d for a first-order block.
        second: c / (√(T n) L), or c / (√T n L).
        reading: which of the two printed forms `second` follows.
    """

    rate: float
    first: float
    second: float
    reading: Reading


def cap(
    smoothness: float,
    *,
    batches: int,
    epochs: float,
    num_weights: int | None = None,
    reading: Reading = "sqrt(Tn)",
    constant: float = 1.0,
) -> Cap:
    """Compute the cap on a block's rate.

    Args:
        smoothness: L. If it is not positive, the caps are infinite.
        batches: n.
        epochs: T.
        num_weights: d_x of a zeroth-order block; None for a first-order block.
        reading: the printed form of the second term.
        constant: c.
    """
    if not smoothness > 0:
        return Cap(math.inf, math.inf, math.inf, reading)
    first = constant / (smoothness * batches * (num_weights or 1))
    root = math.sqrt(epochs * batches) if reading == "sqrt(Tn)" else math.sqrt(epochs) * batches
    second = constant / (root * smoothness)
    return Cap(min(first, second), first, second, reading)


def epochs_to(target: float, *, batches: int, risk: float = 0.1, constant: float = 1.0) -> float:
    """Epochs after which the theorem promises a mean squared gradient norm of target².

    Args:
        target: ε.
        batches: n.
        risk: δ.
        constant: C.
    """
    return constant * (target**-2 / risk + target**-4 / batches)
