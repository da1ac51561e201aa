r"""The theorem's caps on both rates, beside what was measured.

    η_x ≤ min{ c / (L_x n d_x), c / (√(T n) L_x) }        η_y ≤ min{ c / (L_y n), c / (√(T n) L_y) }

n: samples of an epoch, here its batches, each of which is one term of the sum; T: epochs. One
source prints √T·n where √(T n) stands; both readings are computed. The constants c are not known: 1
is taken. L_x and L_y are not known either: what forwards give are lower bounds, so the true caps
are lower still. The caps hold for the worst function of the class, and their d_x is a worst case of
tr H / λ_max: with few large eigenvalues, L_x d_x overstates tr H, which the best rate follows.

    T ≥ C (ε⁻² / δ + ε⁻⁴ / n)

epochs to an expected mean squared gradient norm of ε², with probability 1 − δ; C = 1 is taken.

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
    """A block's cap.

    Attributes:
        rate: the smaller of the two.
        first: c / (L n d), without d for a first-order block.
        second: c / (√(T n) L), or with √T·n.
        reading: which of the two printed forms.
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
    """The cap of a block.

    Args:
        smoothness: L; infinite caps where it is not positive.
        batches: n.
        epochs: T.
        num_weights: d_x of a zeroth-order block; None: first order.
        reading: of the second term.
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
