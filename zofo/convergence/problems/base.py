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
from functools import cached_property

import numpy as np
import torch
from torch import Tensor, nn

from zofo.errors import UserError

QUADRATIC, GROWING, LOGISTIC, NETWORK = range(4)
"""Kinds of problem that the compiled engine knows."""

Compiled = tuple[int, np.ndarray, np.ndarray, np.ndarray]
"""Kind; parameters; data, [n, width]; the row that gives f itself, or an empty one."""


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
    def l_x(self) -> float:
        """L_x; infinite where ℓ_x grows."""
        return self.ell_x(0.0) if self.ell_x(0.0) == self.ell_x(1e6) else math.inf

    @property
    def l_y(self) -> float:
        """L_y; infinite where ℓ_y grows."""
        return self.ell_y(0.0) if self.ell_y(0.0) == self.ell_y(1e6) else math.inf


class Problem(ABC):
    """A finite sum.

    A point is w = (x, y), [..., d_x + d_y], the base first; points come in batches, each with the
    data of a sample of its own (`rows`), whose leading dimensions broadcast. All is float64.

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
    def start(self) -> Tensor:
        """Where every run starts: [d_x + d_y]."""

    @abstractmethod
    def rows(self, samples: Tensor) -> tuple[Tensor, ...]:
        """The data of some samples, for `losses` and `gradients`.

        Args:
            samples: int64, [...].

        Returns:
            Tensors whose leading dimensions are those of `samples`.
        """

    @abstractmethod
    def losses(self, w: Tensor, rows: tuple[Tensor, ...]) -> Tensor:
        """f_i(w).

        Args:
            w: [..., d_x + d_y].
            rows: of the samples i, [...].

        Returns:
            [...].
        """

    def gradients(self, w: Tensor, rows: tuple[Tensor, ...]) -> Tensor:
        """∇f_i(w): [..., d_x + d_y]. By autograd, unless a problem knows."""
        with torch.enable_grad():
            w = w.detach().requires_grad_()
            return torch.autograd.grad(self.losses(w, rows).sum(), w)[0]

    def value(self, w: Tensor) -> Tensor:
        """f(w): [...]."""
        return self.losses(w.unsqueeze(-2), self._every).mean(-1)

    def gradient(self, w: Tensor) -> Tensor:
        """∇f(w): [..., d_x + d_y]."""
        wide = w.unsqueeze(-2).expand(*w.shape[:-1], self.num_samples, w.shape[-1])
        return self.gradients(wide, self._every).mean(-2)

    @abstractmethod
    def compiled(self) -> Compiled:
        """The problem as plain numbers, for `zofo.convergence.kernels`."""

    @cached_property
    def _every(self) -> tuple[Tensor, ...]:
        return self.rows(torch.arange(self.num_samples))

    def split(self, w: Tensor) -> tuple[Tensor, Tensor]:
        """The parts x and y of points."""
        return w[..., : self.d_x], w[..., self.d_x :]

    def hessian(self, w: Tensor) -> Tensor:
        """∇²f at one point by autograd: [d_x + d_y, d_x + d_y]."""
        return torch.autograd.functional.hessian(self.value, w)

    def majoriser_margin(self, w: Tensor) -> float:
        """How far the diagonal majoriser holds at one point.

        Returns:
            The least eigenvalue of diag(ℓ_x I, ℓ_y I) ± ∇²f over both signs, over the larger of
            ℓ_x and ℓ_y; not negative where hybrid smoothness holds.
        """
        norm = float(self.gradient(w).norm())
        ells = self.constants.ell_x(norm), self.constants.ell_y(norm)
        x, y = self.split(w)
        diagonal = torch.cat((torch.full_like(x, ells[0]), torch.full_like(y, ells[1]))).diag()
        hessian = self.hessian(w)
        least = min(float(torch.linalg.eigvalsh(diagonal + sign * hessian)[0]) for sign in (1, -1))
        return least / max(ells)

    def sample_variance(self, w: Tensor) -> float:
        """(1/n) Σ_i ‖∇f_i − ∇f‖² at one point."""
        every = self.gradients(w.expand(self.num_samples, -1), self._every)
        return float((every - every.mean(0)).square().sum(-1).mean())

    def module(self) -> ProblemModule:
        """The problem as a model: frozen parameter `x`, trainable `y`, loss of one sample."""
        return ProblemModule(self)


class ProblemModule(nn.Module):
    """A problem's point as parameters; calling it with a sample's index gives that sample's loss.

    Args:
        problem: the finite sum; the point is its start.
    """

    def __init__(self, problem: Problem) -> None:
        super().__init__()
        x, y = problem.split(problem.start())
        self.problem = problem
        self.x = nn.Parameter(x.clone(), requires_grad=False)
        self.y = nn.Parameter(y.clone())

    def forward(self, sample: Tensor) -> Tensor:
        """Loss of a sample: int64 scalar -> float64 scalar."""
        return self.problem.losses(self.point(), self.problem.rows(sample))

    def point(self) -> Tensor:
        """The present point: [d_x + d_y]."""
        return torch.cat((self.x, self.y))


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
    wrong = [
        f"{name} is {value}; it must be at least 1" for name, value in sizes.items() if value < 1
    ]
    if wrong:
        raise UserError("; ".join(wrong))
