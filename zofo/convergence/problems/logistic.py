"""Logistic regression whose features are split between base and adapter.

    f_i(w) = log(1 + exp(−⟨z_i, w⟩)) + R(w)        w = (x, y); z_i contains the sign of the label
    R(w)   = (λ/2) ‖w‖²                            "ridge": strongly convex
    R(w)   = (λ/2) Σ_j w_j² / (1 + w_j²)           "nonconvex": bounded, curvature in [−λ/4, λ]

Constants. With the blocks of M = ZᵀZ / 4n, the Hessian of the losses lies between 0 and M. For any
t > 0, M ⪯ diag(L_x, L_y) with L_x = ‖M_xx‖ + ‖M_xy‖ t and L_y = ‖M_yy‖ + ‖M_xy‖ / t; we take t² =
‖M_xx‖ / ‖M_yy‖. R adds at most λ to each. The variance of the samples' gradients is at most (1/n) Σ
‖z_i‖², because all samples share R. For the ridge, Newton's method gives f* up to rounding. For the
other R, f* is the lower bound 0.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import softplus

from zofo.convergence.problems.base import LOGISTIC, Compiled, Constants, Problem, check_sizes
from zofo.errors import UserError

REGULARISERS = ("ridge", "nonconvex")


class Logistic(Problem):
    """Logistic regression on random features with random label noise.

    Args:
        d_x: features of the base.
        d_y: features of the adapter.
        num_samples: n.
        scale_x: scale of the base's features.
        scale_y: scale of the adapter's features.
        strength: λ, positive.
        regulariser: "ridge" or "nonconvex".
        seed: seed of features and labels.

    Raises:
        UserError: for values outside their ranges.
    """

    def __init__(
        self,
        *,
        d_x: int = 8,
        d_y: int = 4,
        num_samples: int = 16,
        scale_x: float = 1.0,
        scale_y: float = 1.0,
        strength: float = 0.1,
        regulariser: str = "ridge",
        seed: int = 0,
    ) -> None:
        check_sizes(num_samples=num_samples, d_x=d_x, d_y=d_y)
        if regulariser not in REGULARISERS or not strength > 0:
            raise UserError(
                f"regulariser is {regulariser!r} of strength {strength}; choose one of "
                f"{', '.join(REGULARISERS)} and a positive strength"
            )
        self.num_samples, self.d_x, self.d_y = num_samples, d_x, d_y
        self.strength, self.is_ridge = strength, regulariser == "ridge"
        generator = torch.Generator().manual_seed(seed)
        z = torch.randn(num_samples, d_x + d_y, dtype=torch.float64, generator=generator)
        z[:, :d_x] *= scale_x
        z[:, d_x:] *= scale_y
        teacher = torch.randn(d_x + d_y, dtype=torch.float64, generator=generator)
        chance = torch.rand(num_samples, dtype=torch.float64, generator=generator)
        labels = torch.where(torch.sigmoid(z @ teacher) > chance, 1.0, -1.0).double()
        self.z = z * labels.unsqueeze(-1)
        self.constants = self._constants(self.z)

    def _constants(self, z: Tensor) -> Constants:
        m = z.T @ z / (4 * self.num_samples)
        d = self.d_x
        norm_x, norm_y, cross = (
            float(torch.linalg.matrix_norm(block, 2)) for block in (m[:d, :d], m[d:, d:], m[:d, d:])
        )
        t = math.sqrt(norm_x / norm_y)
        l_x = norm_x + cross * t + self.strength
        l_y = norm_y + cross / t + self.strength
        return Constants(
            ell_x=lambda u: l_x,
            ell_y=lambda u: l_y,
            f_star=self._minimum(z) if self.is_ridge else 0.0,
            f_star_is_exact=self.is_ridge,
            sigma2=float(z.square().sum(-1).mean()),
        )

    def _minimum(self, z: Tensor) -> float:
        w = torch.zeros(self.d_x + self.d_y, dtype=torch.float64)
        eye = self.strength * torch.eye(len(w), dtype=torch.float64)
        for _ in range(100):  # Newton's method needs far fewer to reach rounding
            p = torch.sigmoid(-(z @ w))
            gradient = -(z.T @ p) / self.num_samples + self.strength * w
            hessian = (z.T * (p * (1 - p))) @ z / self.num_samples + eye
            w = w - torch.linalg.solve(hessian, gradient)
        return float(softplus(-(z @ w)).mean() + 0.5 * self.strength * w.square().sum())

    def start(self) -> Tensor:
        """All zeros."""
        return torch.zeros(self.d_x + self.d_y, dtype=torch.float64)

    def rows(self, samples: Tensor) -> tuple[Tensor, ...]:
        """Features times the label's sign."""
        return (self.z[samples],)

    def losses(self, w: Tensor, rows: tuple[Tensor, ...]) -> Tensor:
        """The sample's loss, and R."""
        square = w.square()
        penalty = (square if self.is_ridge else square / (1 + square)).sum(-1)
        return softplus(-(rows[0] * w).sum(-1)) + 0.5 * self.strength * penalty

    def gradients(self, w: Tensor, rows: tuple[Tensor, ...]) -> Tensor:
        """−σ(−margin) z_i + ∇R."""
        factor = -torch.sigmoid(-(rows[0] * w).sum(-1)).unsqueeze(-1)
        pull = w if self.is_ridge else w / (1 + w.square()).square()
        return torch.addcmul(self.strength * pull, factor, rows[0])

    def compiled(self) -> Compiled:
        """Strength and kind of R; features."""
        params = np.array([self.strength, float(self.is_ridge)])
        return LOGISTIC, params, self.z.numpy(), np.zeros(0)
