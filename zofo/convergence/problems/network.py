"""A two-layer network with a low-rank adapter: the smallest problem shaped like LoRA.

    f_i(W, U, V) = ½ (⟨c, tanh((W + U Vᵀ) z_i)⟩ − t_i)² + (λ/2) ‖W‖² + (κ/4)(‖U‖² + ‖V‖²)²

The base is x = W and the adapter y = (U, V). The sum is not convex. Its smoothness is known, and
ℓ_y grows with the gradient. The derivation follows.

Let g_i be the loss as a function of M = W + U Vᵀ. Since |tanh| ≤ 1, the residual is at most R_i =
‖c‖₁ + |t_i|, so ‖∇g_i‖ ≤ G_i = R_i ‖c‖ ‖z_i‖. With |tanh''| ≤ 4 / 3√3, the absolute curvature is at
most H_i = ‖c‖² ‖z_i‖² + R_i ‖c‖_∞ ‖z_i‖² 4 / 3√3. Let G and H be the means of G_i and H_i, and r² =
‖U‖² + ‖V‖².

Curvature along (dW, dU, dV), with ‖d(U Vᵀ)‖ ≤ r ‖dy‖:
    H (‖dW‖ + r ‖dy‖)² + G ‖dy‖² + λ ‖dW‖² + 3 κ r² ‖dy‖²
      ≤ (2H + λ) ‖dW‖² + (G + (2H + 3κ) r²) ‖dy‖²
Radius from the gradient: ⟨∇_y f, y⟩ = 2 ⟨∇g, U Vᵀ⟩ + κ r⁴ ≥ κ r⁴ − G r², so κ r³ ≤ ‖∇f‖ + G r, and
    r² ≤ ρ²(u) = max(2G / κ, (2u / κ)^{2/3})
    ℓ_x(u) = 2H + λ,    ℓ_y(u) = G + (2H + 3κ) ρ²(u): of order u^{2/3}, sub-quadratic.

No σ² bounds the samples' gradients everywhere, because they grow with r. f* ≥ 0 is only a bound.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

from zofo.convergence.problems.base import NETWORK, Compiled, Constants, Problem, check_sizes
from zofo.errors import UserError

_TOP_TANH: float = 4 / (3 * math.sqrt(3))
"""The maximum of |tanh''|."""


class LowRankNetwork(Problem):
    """The network on random inputs, with noisy targets from a teacher.

    Args:
        hidden: hidden units.
        inputs: input features.
        rank: rank of the adapter.
        num_samples: n.
        input_scale: scale of the inputs.
        target_noise: standard deviation of the noise on the targets.
        ridge: λ, at least 0.
        quartic: κ, positive.
        adapter_scale: scale of the adapter's U at the start; V starts at zero, as LoRA's B does.
        seed: seed of all random numbers.

    Raises:
        UserError: for values outside their ranges.
    """

    def __init__(
        self,
        *,
        hidden: int = 4,
        inputs: int = 5,
        rank: int = 1,
        num_samples: int = 8,
        input_scale: float = 1.0,
        target_noise: float = 0.5,
        ridge: float = 0.05,
        quartic: float = 0.05,
        adapter_scale: float = 0.5,
        seed: int = 0,
    ) -> None:
        check_sizes(hidden=hidden, inputs=inputs, rank=rank, num_samples=num_samples)
        if not (ridge >= 0 and quartic > 0):
            raise UserError(
                f"ridge is {ridge} and quartic is {quartic}; the first must be at least 0, "
                "the second positive"
            )
        self.num_samples, self.hidden, self.inputs, self.rank = num_samples, hidden, inputs, rank
        self.d_x, self.d_y = hidden * inputs, rank * (hidden + inputs)
        self.ridge, self.quartic = ridge, quartic
        generator = torch.Generator().manual_seed(seed)

        def draw(*shape: int) -> Tensor:
            return torch.randn(*shape, dtype=torch.float64, generator=generator)

        self.z = input_scale * draw(num_samples, inputs) / math.sqrt(inputs)
        self.c = draw(hidden) / math.sqrt(hidden)
        teacher = draw(hidden, inputs)
        noise = target_noise * draw(num_samples)
        self.t = torch.tanh(self.z @ teacher.T) @ self.c + noise
        self._start = torch.cat(
            (
                0.5 * draw(hidden * inputs),
                adapter_scale * draw(hidden * rank),
                torch.zeros(inputs * rank, dtype=torch.float64),
            )
        )
        self.constants = self._constants()

    def _constants(self) -> Constants:
        residual = self.c.abs().sum() + self.t.abs()
        size = self.z.norm(dim=-1)
        g = float((residual * self.c.norm() * size).mean())
        bend = _TOP_TANH * residual * self.c.abs().max()
        h = float(((self.c.square().sum() + bend) * size.square()).mean())
        ridge, quartic = self.ridge, self.quartic

        def ell_y(u: float) -> float:
            radius2 = max(2 * g / quartic, (2 * u / quartic) ** (2 / 3))
            return g + (2 * h + 3 * quartic) * radius2

        return Constants(
            ell_x=lambda u: 2 * h + ridge, ell_y=ell_y, f_star=0.0, f_star_is_exact=False
        )

    def start(self) -> Tensor:
        """Random W and U, and V = 0, so that the adapter adds nothing at first."""
        return self._start

    def rows(self, samples: Tensor) -> tuple[Tensor, ...]:
        """Inputs and targets."""
        return self.z[samples], self.t[samples]

    def losses(self, w: Tensor, rows: tuple[Tensor, ...]) -> Tensor:
        """Half the squared residual, and both penalties."""
        x, y = self.split(w)
        _, _, residual = self._forward(x, y, rows)
        penalty = 0.5 * self.ridge * x.square().sum(-1)
        return 0.5 * residual.square() + penalty + 0.25 * self.quartic * y.square().sum(-1).square()

    def gradients(self, w: Tensor, rows: tuple[Tensor, ...]) -> Tensor:
        """Backpropagation written out, which the tests compare with autograd."""
        x, y = self.split(w)
        projected, activation, residual = self._forward(x, y, rows)
        z = rows[0]
        delta = residual.unsqueeze(-1) * self.c * (1 - activation.square())  # [..., hidden]
        u, _ = self._factors(y)
        g_w = delta.unsqueeze(-1) * z.unsqueeze(-2)  # [..., hidden, inputs]
        g_u = delta.unsqueeze(-1) * projected.unsqueeze(-2)  # [..., hidden, rank]
        back = (u * delta.unsqueeze(-1)).sum(-2)  # [..., rank]
        g_v = z.unsqueeze(-1) * back.unsqueeze(-2)  # [..., inputs, rank]
        pull = self.quartic * y.square().sum(-1, keepdim=True) * y
        penalties = torch.cat((self.ridge * x, pull), dim=-1)
        return torch.cat((g_w.flatten(-2), g_u.flatten(-2), g_v.flatten(-2)), dim=-1) + penalties

    def compiled(self) -> Compiled:
        """Sizes, penalties, output weights; inputs and targets."""
        sizes = (self.hidden, self.inputs, self.rank, self.ridge, self.quartic)
        data = torch.cat((self.z, self.t.unsqueeze(-1)), dim=-1)
        return NETWORK, np.array([*sizes, *self.c.tolist()]), data.numpy(), np.zeros(0)

    def _factors(self, y: Tensor) -> tuple[Tensor, Tensor]:
        cut = self.hidden * self.rank
        return (
            y[..., :cut].unflatten(-1, (self.hidden, self.rank)),
            y[..., cut:].unflatten(-1, (self.inputs, self.rank)),
        )

    def _forward(
        self, x: Tensor, y: Tensor, rows: tuple[Tensor, ...]
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Vᵀ z, activations, residuals."""
        z, target = rows
        matrix = x.unflatten(-1, (self.hidden, self.inputs))
        u, v = self._factors(y)
        projected = (v * z.unsqueeze(-1)).sum(-2)
        before = (matrix * z.unsqueeze(-2)).sum(-1) + (u * projected.unsqueeze(-2)).sum(-1)
        activation = torch.tanh(before)
        return projected, activation, (self.c * activation).sum(-1) - target
