"""Quadratics with a chosen spectrum in each block.

    q(x, y)   = ½ Σ_j h_j x_j² + ½ Σ_j k_j y_j² + Σ_{j < min(d_x, d_y)} b x_j y_j
    f_i(x, y) = (1 + ρ s_i) q(x, y) + ⟨a_i, x⟩ + ⟨e_i, y⟩          Σ s_i = 0, Σ a_i = 0, Σ e_i = 0

Hence f = q, f* = 0 at the origin, and ∇f_i − ∇f = ρ s_i ∇f + (a_i, e_i). With ρ = 0 the samples
differ only in their gradients. With ρ > 0 they also differ in curvature. If curvature and gradient
are correlated (`alignment`), an epoch of reshuffling has a bias of −(γ/2) E[∇²f_i (a_i, e_i)] in
∇f.

Constants. [[h, b], [b, k]] ⪯ diag(L_x, L_y) if and only if (L_x − h)(L_y − k) ≥ b² with both
factors ≥ 0. So L_x = max h + |b| √(max h / max k) and L_y = max k + |b| √(max k / max h). The same
matrix bounds −∇²f.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from zofo.convergence.problems.base import (
    QUADRATIC,
    Compiled,
    Constants,
    Problem,
    alternating_signs,
    centred_rows,
    check_sizes,
)
from zofo.errors import UserError


class Quadratic(Problem):
    """A finite sum of quadratics.

    Args:
        spectrum_x: h, positive curvatures of the base, [d_x].
        spectrum_y: k, positive curvatures of the adapter, [d_y].
        num_samples: n.
        coupling: b, below √(min h · min k) so that f is convex.
        noise_x: (1/n) Σ ‖a_i‖².
        noise_y: (1/n) Σ ‖e_i‖².
        curvature_spread: ρ in [0, 1).
        alignment: share in [0, 1] of the linear terms that has the sign s_i and the direction (1,
            …, 1). The rest is random.
        height_x: the base's part of f at the start, without the coupling.
        height_y: the adapter's part of f at the start, without the coupling.
        seed: seed of the random linear terms.

    Raises:
        UserError: for values outside their ranges.
    """

    def __init__(
        self,
        spectrum_x: Sequence[float],
        spectrum_y: Sequence[float],
        *,
        num_samples: int = 8,
        coupling: float = 0.0,
        noise_x: float = 1.0,
        noise_y: float = 1.0,
        curvature_spread: float = 0.0,
        alignment: float = 0.0,
        height_x: float = 1.0,
        height_y: float = 1.0,
        seed: int = 0,
    ) -> None:
        check_sizes(num_samples=num_samples, d_x=len(spectrum_x), d_y=len(spectrum_y))
        h = torch.tensor([*spectrum_x], dtype=torch.float64)
        k = torch.tensor([*spectrum_y], dtype=torch.float64)
        least, limit = float(min(h.min(), k.min())), float((h.min() * k.min()).clamp(min=0).sqrt())
        checks = (
            (least > 0, f"the least curvature is {least}; it must be positive"),
            (
                abs(coupling) < limit,
                f"coupling is {coupling}; it must stay below √(min h · min k) = {limit:.3g}",
            ),
            (
                0 <= curvature_spread < 1,
                f"curvature_spread is {curvature_spread}; it must lie in [0, 1)",
            ),
            (0 <= alignment <= 1, f"alignment is {alignment}; it must lie in [0, 1]"),
        )
        wrong = [message for holds, message in checks if not holds]
        if wrong:
            raise UserError("; ".join(wrong))
        self.num_samples, self.d_x, self.d_y = num_samples, len(h), len(k)
        self.h, self.k, self.coupling = h, k, coupling
        self.curvatures = torch.cat((h, k))
        signs = alternating_signs(num_samples)
        self.scale = 1 + curvature_spread * signs
        self.linear = torch.cat(
            (
                _linear_terms(self.d_x, noise_x, alignment, signs, seed),
                _linear_terms(self.d_y, noise_y, alignment, signs, seed + 1),
            ),
            dim=-1,
        )
        self._scaled = self.scale.unsqueeze(-1) * self.curvatures  # [n, d_x + d_y]
        self._heights = height_x, height_y
        self.constants = self._constants(curvature_spread)

    def _constants(self, spread: float) -> Constants:
        top_h, top_k, b = float(self.h.max()), float(self.k.max()), abs(self.coupling)
        l_x = top_h + b * math.sqrt(top_h / top_k)
        l_y = top_k + b * math.sqrt(top_k / top_h)
        linear = float(self.linear.square().sum(-1).mean())
        # ‖ρ s ∇f + a‖² ≤ 2 ρ² s² ‖∇f‖² + 2 ‖a‖², and the mean of s² is 1.
        return Constants(
            ell_x=lambda u: l_x,
            ell_y=lambda u: l_y,
            f_star=0.0,
            sigma2=linear if spread == 0 else 2 * linear,
            noise_growth=2 * spread**2,
            effective_rank_x=float(self.h.sum()) / top_h,
        )

    def start(self) -> Tensor:
        """Coordinates of equal size and alternating signs in each block, at the stated heights."""
        parts = []
        for spectrum, height in zip((self.h, self.k), self._heights, strict=True):
            size = torch.sqrt(2 * height / spectrum.sum())
            signs = 1.0 - 2.0 * (torch.arange(len(spectrum), dtype=torch.float64) % 2)
            parts.append(size * signs)
        return torch.cat(parts)

    def value(self, w: Tensor) -> Tensor:
        """q(x, y)."""
        total = 0.5 * (self.curvatures * w * w).sum(-1)
        return total + self._product(w) if self.coupling else total

    def gradient(self, w: Tensor) -> Tensor:
        """∇q."""
        gradient = self.curvatures * w
        return self._add_cross(gradient, w, 1.0) if self.coupling else gradient

    def rows(self, samples: Tensor) -> tuple[Tensor, ...]:
        """Curvatures, linear terms, 1 + ρ s_i."""
        return self._scaled[samples], self.linear[samples], self.scale[samples]

    def losses(self, w: Tensor, rows: tuple[Tensor, ...]) -> Tensor:
        """(1 + ρ s_i) q + ⟨a_i, x⟩ + ⟨e_i, y⟩."""
        curvatures, linear, scale = rows
        total = (torch.addcmul(linear, curvatures, w, value=0.5) * w).sum(-1)
        return total + scale * self._product(w) if self.coupling else total

    def gradients(self, w: Tensor, rows: tuple[Tensor, ...]) -> Tensor:
        """(1 + ρ s_i) ∇q + (a_i, e_i)."""
        curvatures, linear, scale = rows
        gradient = torch.addcmul(linear, curvatures, w)
        return self._add_cross(gradient, w, scale.unsqueeze(-1)) if self.coupling else gradient

    def compiled(self) -> Compiled:
        """Coupling and curvatures; scale and linear terms."""
        params = torch.cat((torch.tensor([self.coupling], dtype=torch.float64), self.curvatures))
        data = torch.cat((self.scale.unsqueeze(-1), self.linear), dim=-1)
        mean_row = np.zeros(data.shape[1])
        mean_row[0] = 1.0  # f has scale 1 and no linear terms
        return QUADRATIC, params.numpy(), data.numpy(), mean_row

    def _shared(self, w: Tensor) -> tuple[Tensor, Tensor]:
        """The coupled coordinates of x and of y."""
        num = min(self.d_x, self.d_y)
        return w[..., :num], w[..., self.d_x : self.d_x + num]

    def _product(self, w: Tensor) -> Tensor:
        x, y = self._shared(w)
        return self.coupling * (x * y).sum(-1)

    def _add_cross(self, gradient: Tensor, w: Tensor, scale: Tensor | float) -> Tensor:
        """Add the gradient of the coupling in place."""
        x, y = self._shared(w)
        g_x, g_y = self._shared(gradient)  # views, so that += changes `gradient`
        g_x += scale * self.coupling * y
        g_y += scale * self.coupling * x
        return gradient


def _linear_terms(width: int, power: float, alignment: float, signs: Tensor, seed: int) -> Tensor:
    """Rows with sum zero and mean squared norm `power`, partly along (1, …, 1): [n, width]."""
    along = torch.full((width,), width**-0.5, dtype=torch.float64)
    aligned = math.sqrt(power) * alignment * torch.outer(signs, along)
    rest = centred_rows(len(signs), width, power * (1 - alignment**2), seed)
    if alignment:  # make the random part orthogonal to the signs
        rest = rest - torch.outer(signs, signs @ rest) / len(signs)
        size = rest.square().sum(-1).mean()
        if size > 0:
            rest = rest * torch.sqrt(power * (1 - alignment**2) / size)
    return aligned + rest


def flat(num: int, curvature: float = 1.0) -> list[float]:
    """Equal curvatures: effective rank `num`."""
    return [curvature] * num


def low_rank(num: int, rank: float, curvature: float = 1.0, floor: float = 0.01) -> list[float]:
    """`rank` equal curvatures and a small tail, so that the effective rank hardly grows with `num`.

    The tail has the sum `floor · rank · curvature`, whatever its length.
    """
    whole = min(int(rank), num)
    tail = num - whole
    return [curvature] * whole + [floor * whole * curvature / max(tail, 1)] * tail


def power_law(num: int, exponent: float, curvature: float = 1.0) -> list[float]:
    """Curvature · j^(−exponent), j = 1 .. num."""
    return [curvature * j**-exponent for j in range(1, num + 1)]
