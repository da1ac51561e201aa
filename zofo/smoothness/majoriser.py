"""Is diag(ℓ_x I, ℓ_y I) ± ∇²f positive semi-definite?

The theorem's hybrid smoothness needs two numbers that bound the Hessian of both blocks at once:

    D ± H ⪰ 0, D = diag(ℓ_x I, ℓ_y I)   ⇔   κ = ‖D^{-1/2} H D^{-1/2}‖ ≤ 1

A bound for each block is not enough, because the cross term H_xy remains. If ℓ_x ≥ ‖H_xx‖ and
ℓ_y ≥ ‖H_yy‖, then κ ≤ 1 + ‖H_xy‖ / √(ℓ_x ℓ_y), and κ can reach this. For convex f the Schur
complement bounds it by 2; otherwise there is no bound: in H = [[0, c], [c, 0]] both blocks vanish.
κ · D always majorises H. So κ of the norms of the blocks is the factor by which two learning rates
that were chosen block by block must shrink.

Random vectors mostly see the many small eigenvalues of H and nearly always pass. Lanczos on the
scaled Hessian finds the extreme ones: κ is its Ritz value of largest size, a lower estimate with an
error bound.

Reference:
    arXiv 2604.09940, the hybrid generalised smoothness assumption.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from zofo.smoothness.spectrum import inner_product, lanczos, signs


@dataclass(frozen=True)
class MajoriserTest:
    """The result of a test of D.

    Attributes:
        constants: ℓ of each block.
        kappa: largest |Ritz value| of D^{-1/2} H D^{-1/2}.
        residual: distance of this Ritz value to an eigenvalue at most.
        sampled: |vᵀHv| / vᵀDv of every sampled vector, [samples].
        num_products: number of products with H.
    """

    constants: dict[str, float]
    kappa: float
    residual: float
    sampled: tuple[float, ...]
    num_products: int

    @property
    def verdict(self) -> str:
        """Whether D majorises H and −H at this point.

        "refuted" is certain, because a Ritz value is the quotient |vᵀHv| / vᵀDv of a vector that
        was computed. "confirmed" means that Lanczos found no such vector within its error bound.
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
) -> MajoriserTest:
    """Test D = diag(ℓ_b I) against a Hessian, on sampled and on extreme vectors.

    Args:
        operator: the Hessian over all blocks in the order of `sizes`, with `shape` and `@`.
        sizes: block -> number of weights.
        constants: block -> ℓ_b > 0.
        like: a tensor with the dtype and device of the operator's vectors.
        num_steps: number of Lanczos steps.
        num_samples: number of random sign vectors, scaled so that blocks weigh the same in vᵀDv.
        vectors: further vectors to test, [n] each, such as a step.
        seed: seed of the random vectors.
        memory_bytes: the memory up to which Lanczos keeps its vectors.

    Raises:
        ValueError: if a constant is not positive.
    """
    wrong = [b for b in sizes if not (constants[b] > 0 and math.isfinite(constants[b]))]
    if wrong:
        raise ValueError(f"constants of {', '.join(wrong)} are not positive; D must be invertible")

    def spread(values: Sequence[float]) -> Tensor:  # one value per block -> [n]
        pairs = zip(values, sizes.values(), strict=True)
        return torch.cat([like.new_full((size,), value) for value, size in pairs])

    scale = spread([constants[b] ** -0.5 for b in sizes])
    balance = spread([max(size, 1) ** -0.5 for size in sizes.values()])
    num = len(scale)
    generator = torch.Generator().manual_seed(seed)
    keeps = num * like.element_size() * min(num_steps, num) <= memory_bytes
    scaled = _Scaled(operator, scale)
    start = signs(num, generator, like) * balance
    found = lanczos(scaled, start, num_steps, keeps_vectors=keeps)
    worst = int(np.argmax(np.abs(found.values)))
    # In coordinates D^{1/2} v the quotient vᵀHv / vᵀDv is an ordinary Rayleigh quotient.
    sampled = []
    drawn = (signs(num, generator, like) * balance for _ in range(num_samples))
    for vector in (*(v / scale for v in vectors), *drawn):
        image = scaled @ vector
        sampled.append(
            abs(inner_product(vector, image)) / max(inner_product(vector, vector), 1e-300)
        )
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
