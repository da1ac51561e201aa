"""Finite sums f(x, y) = (1/n) Σ_i f_i(x, y) whose constants are known.

x is the base's block, y the adapter's. A problem evaluates any number of points at once, each on a
sample of its own, in float64, and states what the theorem asks for:

    diag(ℓ_x(‖∇f‖) I, ℓ_y(‖∇f‖) I) ± ∇²f(x, y) ⪰ 0             ‖∇f‖ of the whole gradient
    (1/n) Σ_i ‖∇f_i − ∇f‖² ≤ σ² + a ‖∇f‖²                     the theorem has a = 0

`Problem.majoriser_margin` measures the first with autograd's Hessian; the tests check every
statement of every problem that way, on sampled points and on extreme ones.

References:
    arXiv 2604.09940, hybrid generalised smoothness; assumption on the variance.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from zofo.errors import UserError


@dataclass(frozen=True)
class Constants:
    """What is known of a problem.

    Attributes:
        ell_x: ℓ_x, from ‖∇f‖ to the base's smoothness; non-decreasing.
        ell_y: ℓ_y, likewise of the adapter.
        f_star: infimum of f, or a lower bound of it.
        f_star_is_exact: which of the two.
        sigma2: σ² of the samples' gradients; None where no such bound holds everywhere.
        noise_growth: a, the share of ‖∇f‖² that is to be added to σ².
        effective_rank_x: tr H / ‖H‖ of the base's block of the Hessian at the minimiser; None
            where it has no closed form.
    """

    ell_x: Callable[[float], float]
    ell_y: Callable[[float], float]
    f_star: float
    f_star_is_exact: bool = True
    sigma2: float | None = None
    noise_growth: float = 0.0
    effective_rank_x: float | None = None

    @property
    def is_smooth(self) -> bool:
        """Whether ℓ_x and ℓ_y are constants: ordinary smoothness."""
        return all(ell(0.0) == ell(1e6) for ell in (self.ell_x, self.ell_y))

    @property
    def l_x(self) -> float:
        """L_x; infinite where ℓ_x grows."""
        return self.ell_x(0.0) if self.ell_x(0.0) == self.ell_x(1e6) else math.inf

    @property
    def l_y(self) -> float:
        """L_y; infinite where ℓ_y grows."""
        return self.ell_y(0.0) if self.ell_y(0.0) == self.ell_y(1e6) else math.inf


class Problem(ABC):
    """A finite sum.

    Points come in batches: x [..., d_x], y [..., d_y], samples [...], whose leading dimensions
    broadcast. Everything is float64.

    Attributes:
        num_samples: n.
        d_x: dimensions of the base.
        d_y: dimensions of the adapter.
        constants: what is known.
    """

    num_samples: int
    d_x: int
    d_y: int
    constants: Constants

    @abstractmethod
    def start(self) -> tuple[Tensor, Tensor]:
        """Where every run starts: x [d_x], y [d_y]."""

    @abstractmethod
    def losses(self, x: Tensor, y: Tensor, samples: Tensor) -> Tensor:
        """f_i(x, y).

        Args:
            x: float64, [..., d_x].
            y: float64, [..., d_y].
            samples: int64, [...]: i of each point.

        Returns:
            float64, [...].
        """

    def gradients(self, x: Tensor, y: Tensor, samples: Tensor) -> tuple[Tensor, Tensor]:
        """∇_x f_i and ∇_y f_i: [..., d_x] and [..., d_y]. By autograd, unless a problem knows."""
        with torch.enable_grad():
            x, y = x.detach().requires_grad_(), y.detach().requires_grad_()
            total = self.losses(x, y, samples).sum()
            return torch.autograd.grad(total, (x, y))  # type: ignore[return-value]

    def value(self, x: Tensor, y: Tensor) -> Tensor:
        """f(x, y): [...]."""
        every = torch.arange(self.num_samples)
        return self.losses(x.unsqueeze(-2), y.unsqueeze(-2), every).mean(-1)

    def gradient(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        """∇_x f and ∇_y f: [..., d_x] and [..., d_y]."""
        every = torch.arange(self.num_samples)
        lead = torch.broadcast_shapes(x.shape[:-1], y.shape[:-1])
        wide_x = x.expand(*lead, self.d_x).unsqueeze(-2).expand(*lead, self.num_samples, self.d_x)
        wide_y = y.expand(*lead, self.d_y).unsqueeze(-2).expand(*lead, self.num_samples, self.d_y)
        g_x, g_y = self.gradients(wide_x, wide_y, every)
        return g_x.mean(-2), g_y.mean(-2)

    def hessian(self, x: Tensor, y: Tensor) -> Tensor:
        """∇²f at one point by autograd: [d_x + d_y, d_x + d_y], the base first."""

        def value(point: Tensor) -> Tensor:
            return self.value(point[: self.d_x], point[self.d_x :])

        return torch.autograd.functional.hessian(value, torch.cat((x, y)))  # type: ignore[return-value]

    def majoriser_margin(self, x: Tensor, y: Tensor) -> float:
        """How far the diagonal majoriser holds at one point.

        Returns:
            The least eigenvalue of diag(ℓ_x I, ℓ_y I) ± ∇²f over both signs, over the larger of
            ℓ_x and ℓ_y; not negative where hybrid smoothness holds.
        """
        g_x, g_y = self.gradient(x, y)
        norm = float(torch.cat((g_x, g_y)).norm())
        ells = self.constants.ell_x(norm), self.constants.ell_y(norm)
        diagonal = torch.diag(
            torch.cat((torch.full_like(x, ells[0]), torch.full_like(y, ells[1])))
        )
        hessian = self.hessian(x, y)
        least = min(
            float(torch.linalg.eigvalsh(diagonal + sign * hessian)[0]) for sign in (1, -1)
        )
        return least / max(ells)

    def sample_variance(self, x: Tensor, y: Tensor) -> float:
        """(1/n) Σ_i ‖∇f_i − ∇f‖² at one point."""
        every = torch.arange(self.num_samples)
        num = self.num_samples
        both = torch.cat(self.gradients(x.expand(num, -1), y.expand(num, -1), every), dim=-1)
        return float((both - both.mean(0)).square().sum(-1).mean())

    def module(self) -> nn.Module:
        """The problem as a model: frozen parameter `x`, trainable `y`, loss of one sample."""
        return ProblemModule(self)


class ProblemModule(nn.Module):
    """A problem's point as parameters; calling it with a sample's index gives that sample's loss.

    Args:
        problem: the finite sum; the point is its start.
    """

    def __init__(self, problem: Problem) -> None:
        super().__init__()
        x, y = problem.start()
        self.problem = problem
        self.x = nn.Parameter(x.clone(), requires_grad=False)
        self.y = nn.Parameter(y.clone())

    def forward(self, sample: Tensor) -> Tensor:
        """Loss of a sample: int64 scalar -> float64 scalar."""
        return self.problem.losses(self.x, self.y, sample)


def centred_rows(num: int, width: int, power: float, seed: int) -> Tensor:
    """Random rows whose sum is zero and whose mean squared norm is `power`: [num, width]."""
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randn(num, width, dtype=torch.float64, generator=generator)
    rows = rows - rows.mean(0)
    size = rows.square().sum(-1).mean()
    return rows * torch.sqrt(power / size) if size > 0 else rows


def alternating_signs(num: int) -> Tensor:
    """+1 and −1 in turn, centred and with unit mean square: [num]."""
    signs = 1.0 - 2.0 * (torch.arange(num, dtype=torch.float64) % 2)
    signs = signs - signs.mean()
    size = signs.square().mean()
    return signs / size.sqrt() if size > 0 else signs


def check_sizes(**sizes: int) -> None:
    """Refuse sizes below one, all at once.

    Raises:
        UserError: for them.
    """
    wrong = [f"{name} is {value}; it must be at least 1" for name, value in sizes.items() if value < 1]
    if wrong:
        raise UserError("; ".join(wrong))
