"""Sums whose curvature grows with the gradient, in each block by its own law.

    f_i(x, y) = Σ_j φ(x_j) + Σ_j ψ(y_j) + ⟨a_i, x⟩ + ⟨e_i, y⟩            Σ a_i = 0, Σ e_i = 0

The Hessian is diagonal, and φ''(x_j) = ℓ(|φ'(x_j)|) ≤ ℓ(‖∇f‖) because ℓ is non-decreasing. So ℓ_x
is the law of φ and ℓ_y that of ψ. The bound is attained if one coordinate has the whole gradient.

    law           φ''                                 ℓ(u)
    linear        L0 e^{L1 |z|}                       L0 + L1 u: (L0, L1)-smooth, exact
    exponential   L0 cosh(L1 z)                       √(L0² + L1² u²)              exact
    polynomial    L0 + a (p − 1) |z|^{p−2}            L0 + (p − 1) a^{1/(p−1)} u^{(p−2)/(p−1)}

All three are sub-quadratic. The last is exact for L0 = 0 and an upper bound otherwise.

References:
    Zhang, He, Sra, Jadbabaie, arXiv 1905.11881: (L0, L1)-smoothness.
    Li, Qian, Tian, Rakhlin, Jadbabaie, arXiv 2306.01264: general ℓ.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from zofo.convergence.problems.base import (
    GROWING,
    Compiled,
    Constants,
    Problem,
    centred_rows,
    check_sizes,
)
from zofo.errors import UserError


class Law(ABC):
    """A convex even function of one variable with the minimum 0 at 0."""

    @abstractmethod
    def value(self, z: Tensor) -> Tensor:
        """φ."""

    @abstractmethod
    def slope(self, z: Tensor) -> Tensor:
        """φ'."""

    @abstractmethod
    def ell(self, u: float) -> float:
        """ℓ(u), an upper bound of φ'' where |φ'| ≤ u."""

    def numbers(self) -> tuple[float, float, float, float]:
        """Index in `LAWS`, L0, L1 or a, and p, for the compiled engine."""
        known = vars(self)
        place = [*LAWS.values()].index(type(self))
        return float(place), known["l0"], known.get("l1", known.get("a", 1.0)), known.get("p", 0.0)


@dataclass(frozen=True)
class _OfTwo(Law):
    """A law with L0 and L1, both positive."""

    l0: float = 1.0
    l1: float = 1.0


class Linear(_OfTwo):
    """φ = (L0 / L1²)(e^{L1 |z|} − L1 |z| − 1)."""

    def value(self, z: Tensor) -> Tensor:
        """φ."""
        t = self.l1 * z.abs()
        return self.l0 / self.l1**2 * (torch.expm1(t) - t)

    def slope(self, z: Tensor) -> Tensor:
        """φ'."""
        return self.l0 / self.l1 * torch.sign(z) * torch.expm1(self.l1 * z.abs())

    def ell(self, u: float) -> float:
        """L0 + L1 u."""
        return self.l0 + self.l1 * u


class Exponential(_OfTwo):
    """φ = (L0 / L1²)(cosh(L1 z) − 1) = (2 L0 / L1²) sinh²(L1 z / 2)."""

    def value(self, z: Tensor) -> Tensor:
        """φ."""
        return 2 * self.l0 / self.l1**2 * torch.sinh(self.l1 * z / 2).square()

    def slope(self, z: Tensor) -> Tensor:
        """φ'."""
        return self.l0 / self.l1 * torch.sinh(self.l1 * z)

    def ell(self, u: float) -> float:
        """√(L0² + L1² u²)."""
        return (self.l0**2 + (self.l1 * u) ** 2) ** 0.5


@dataclass(frozen=True)
class Polynomial(Law):
    """φ = L0 z² / 2 + a |z|^p / p.

    Attributes:
        l0: not negative.
        a: positive.
        p: at least 2.
    """

    l0: float = 0.0
    a: float = 1.0
    p: float = 4.0

    def value(self, z: Tensor) -> Tensor:
        """φ."""
        return 0.5 * self.l0 * z.square() + self.a / self.p * z.abs() ** self.p

    def slope(self, z: Tensor) -> Tensor:
        """φ'."""
        return self.l0 * z + self.a * torch.sign(z) * z.abs() ** (self.p - 1)

    def ell(self, u: float) -> float:
        """L0 + (p − 1) a^{1/(p−1)} u^{(p−2)/(p−1)}."""
        p = self.p
        return self.l0 + (p - 1) * self.a ** (1 / (p - 1)) * u ** ((p - 2) / (p - 1))


LAWS: dict[str, type[Law]] = {
    "linear": Linear,
    "exponential": Exponential,
    "polynomial": Polynomial,
}


def law(kind: str, **parameters: float) -> Law:
    """Make a law by name.

    Raises:
        UserError: for an unknown name, or parameters outside their ranges.
    """
    if kind not in LAWS:
        raise UserError(f"law is {kind!r}; choose one of {', '.join(LAWS)}")
    found: Law = LAWS[kind](**parameters)
    wrong = [
        f"{name} is {value}; it must be {'at least 2' if name == 'p' else 'positive'}"
        for name, value in vars(found).items()
        if not (value >= 2 if name == "p" else value > 0 or (name, kind) == ("l0", "polynomial"))
    ]
    if wrong:
        raise UserError("; ".join(wrong))
    return found


class Growing(Problem):
    """A separable finite sum with a law of growth in each block.

    Args:
        law_x: law of the base.
        law_y: law of the adapter.
        d_x: dimensions of the base.
        d_y: dimensions of the adapter.
        num_samples: n.
        noise_x: (1/n) Σ ‖a_i‖².
        noise_y: (1/n) Σ ‖e_i‖².
        start_x: value of every coordinate of the base at the start.
        start_y: value of every coordinate of the adapter at the start.
        seed: seed of the linear terms.

    Raises:
        UserError: for sizes below one.
    """

    def __init__(
        self,
        law_x: Law,
        law_y: Law,
        *,
        d_x: int = 4,
        d_y: int = 2,
        num_samples: int = 8,
        noise_x: float = 1.0,
        noise_y: float = 1.0,
        start_x: float = 2.0,
        start_y: float = 2.0,
        seed: int = 0,
    ) -> None:
        check_sizes(num_samples=num_samples, d_x=d_x, d_y=d_y)
        self.num_samples, self.d_x, self.d_y = num_samples, d_x, d_y
        self.law_x, self.law_y = law_x, law_y
        self.linear = torch.cat(
            (
                centred_rows(num_samples, d_x, noise_x, seed),
                centred_rows(num_samples, d_y, noise_y, seed + 1),
            ),
            dim=-1,
        )
        self._start = start_x, start_y
        self.constants = Constants(
            ell_x=law_x.ell,
            ell_y=law_y.ell,
            f_star=0.0,
            sigma2=float(self.linear.square().sum(-1).mean()),
            effective_rank_x=float(d_x) if law_x.ell(0.0) > 0 else None,
        )

    def start(self) -> Tensor:
        """Equal coordinates in each block."""
        x, y = self._start
        return torch.tensor([x] * self.d_x + [y] * self.d_y, dtype=torch.float64)

    def value(self, w: Tensor) -> Tensor:
        """Σ φ(x_j) + Σ ψ(y_j)."""
        x, y = self.split(w)
        return self.law_x.value(x).sum(-1) + self.law_y.value(y).sum(-1)

    def gradient(self, w: Tensor) -> Tensor:
        """φ' and ψ'."""
        x, y = self.split(w)
        return torch.cat((self.law_x.slope(x), self.law_y.slope(y)), dim=-1)

    def rows(self, samples: Tensor) -> tuple[Tensor, ...]:
        """Linear terms."""
        return (self.linear[samples],)

    def losses(self, w: Tensor, rows: tuple[Tensor, ...]) -> Tensor:
        """The value plus the linear terms."""
        return self.value(w) + (rows[0] * w).sum(-1)

    def gradients(self, w: Tensor, rows: tuple[Tensor, ...]) -> Tensor:
        """φ' + a_i and ψ' + e_i."""
        return self.gradient(w) + rows[0]

    def compiled(self) -> Compiled:
        """The two laws; linear terms."""
        params = np.array([*self.law_x.numbers(), *self.law_y.numbers()])
        return GROWING, params, self.linear.numpy(), np.zeros(self.d_x + self.d_y)
