"""Is diag(ℓ_x I, ℓ_y I) ± ∇²f positive semi-definite?

The theorem's hybrid smoothness asks for two numbers that bound the Hessian of both blocks at once:

    D ± H ⪰ 0, D = diag(ℓ_x I, ℓ_y I)   ⇔   κ = ‖D^{-1/2} H D^{-1/2}‖ ≤ 1

Bounds of the blocks alone do not give it: with ℓ_x ≥ ‖H_xx‖ and ℓ_y ≥ ‖H_yy‖ the cross term H_xy
remains, and κ ≤ 1 + ‖H_xy‖ / √(ℓ_x ℓ_y), reached. For a convex f the Schur complement makes that at
most 2; otherwise it has no bound. (H = [[0, c], [c, 0]]: both blocks vanish, no D of zeros does.)
κ · D always does. So κ of the blocks' own norms is the factor by which two step sizes chosen block
by block have to shrink.

Random vectors see the bulk of H and nearly always pass; the extreme ones are found by Lanczos on
the scaled Hessian, where κ is its largest Ritz value in size: a lower estimate with an error bound.

Reference:
    arXiv 2604.09940, the hybrid generalised smoothness assumption.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from zofo.smoothness.spectrum import lanczos, signs


@dataclass(frozen=True)
class MajoriserTest:
    """What a test of D said.

    Attributes:
        constants: ℓ of each block.
        kappa: largest |Ritz value| of D^{-1/2} H D^{-1/2}.
        residual: an eigenvalue lies within this of it.
        sampled: |vᵀHv| / vᵀDv of every sampled vector, [samples].
        num_products: products with H.
    """

    constants: dict[str, float]
    kappa: float
    residual: float
    sampled: tuple[float, ...]
    num_products: int

    @property
    def verdict(self) -> str:
        """Whether D majorises the Hessian, both signs, at this point.

        "refuted" is certain of this D: a vector with |vᵀHv| > vᵀDv is at hand, as Ritz values are
        quotients of vectors. "confirmed" says that Lanczos found none up to its own error.
        """
        if self.kappa > 1.0 + 1e-6:
            return "refuted"
        return "confirmed" if self.kappa + self.residual <= 1.0 else "undecided at this scale"


def check_majoriser(
    operator: Any,
    sizes: Mapping[str, int],
    constants: Mapping[str, float],
    like: Tensor,
    *,
    num_steps: int = 20,
    num_samples: int = 4,
    vectors: Sequence[Tensor] = (),
    seed: int = 0,
    memory_bytes: int = 4 << 30,
    on_product: Callable[[], None] | None = None,
) -> MajoriserTest:
    """Test D = diag(ℓ_b I) against a Hessian, on sampled and on extreme vectors.

    Args:
        operator: the Hessian over all blocks in the order of `sizes`, with `shape` and `@`.
        sizes: block -> numbers in it.
        constants: block -> ℓ_b > 0.
        like: a tensor of the dtype and device of the operator's vectors.
        num_steps: of Lanczos.
        num_samples: random vectors: signs, scaled so that each block counts the same in vᵀDv.
        vectors: further vectors to test, [n] each, such as a step.
        seed: of the random ones.
        memory_bytes: up to which Lanczos keeps its vectors.
        on_product: called after each product.

    Raises:
        ValueError: for a constant that is not positive.
    """
    wrong = [b for b in sizes if not (constants[b] > 0 and math.isfinite(constants[b]))]
    if wrong:
        raise ValueError(f"constants of {', '.join(wrong)} are not positive; D must be invertible")
    scale = torch.cat(
        [
            torch.full((n,), constants[b] ** -0.5, dtype=like.dtype, device=like.device)
            for b, n in sizes.items()
        ]
    )
    balance = torch.cat(
        [
            torch.full((n,), max(n, 1) ** -0.5, dtype=like.dtype, device=like.device)
            for n in sizes.values()
        ]
    )
    num = len(scale)
    generator = torch.Generator().manual_seed(seed)
    keeps = num * like.element_size() * min(num_steps, num) <= memory_bytes
    scaled = _Scaled(operator, scale)
    start = signs(num, generator, like) * balance
    found = lanczos(scaled, start, num_steps, keeps_vectors=keeps, on_product=on_product)
    worst = int(np.argmax(np.abs(found.values)))
    sampled = []
    given = [v / scale for v in vectors]
    drawn = (signs(num, generator, like) * balance for _ in range(num_samples))
    for vector in (*given, *drawn):
        image = scaled @ vector
        if on_product is not None:
            on_product()
        sampled.append(abs(_dot(vector, image)) / max(_dot(vector, vector), 1e-300))
    return MajoriserTest(
        {b: float(constants[b]) for b in sizes},
        float(abs(found.values[worst])),
        float(found.residuals[worst]),
        tuple(sampled),
        len(found.values) + len(sampled),
    )


class _Scaled:
    """D^{-1/2} H D^{-1/2}."""

    def __init__(self, operator: Any, scale: Tensor) -> None:
        self.operator, self.scale, self.shape = operator, scale, operator.shape

    def __matmul__(self, vector: Tensor) -> Tensor:
        image: Tensor = self.scale * (self.operator @ (self.scale * vector)).detach()
        return image


def _dot(a: Tensor, b: Tensor) -> float:
    return float((a.double() * b.double()).sum())
