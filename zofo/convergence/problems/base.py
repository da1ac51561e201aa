"""Finite sums f(x, y) = (1/n) Σ_i f_i(x, y) with known constants.

x is the base's block and y the adapter's. A problem evaluates many points at once in float64, each
on its own sample. It states the constants that the theorem needs:

    diag(ℓ_x(‖∇f‖) I, ℓ_y(‖∇f‖) I) ± ∇²f(x, y) ⪰ 0             ‖∇f‖ of the whole gradient
    (1/n) Σ_i ‖∇f_i − ∇f‖² ≤ σ² + a ‖∇f‖²                     the theorem has a = 0

`Problem.majoriser_margin` measures the first with autograd's Hessian. The tests check every
statement of every problem in this way, on random and on extreme points.

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
"""Kinds of problems that the compiled engine supports."""

Compiled = tuple[int, np.ndarray, np.ndarray, np.ndarray]
"""Kind; parameters; data, [n, width]; the row whose loss is f itself, or an empty row."""


@dataclass(frozen=True)
class Constants:
    """Known constants of a problem.

    Attributes:
        ell_x: ℓ_x, a non-decreasing function from ‖∇f‖ to the base's smoothness constant.
        ell_y: ℓ_y, the same for the adapter.
        f_star: the infimum of f, or a lower bound of it.
        f_star_is_exact: whether `f_star` is the infimum.
        sigma2: σ² of the samples' gradients; None if no such bound holds everywhere.
        noise_growth: a, the share of ‖∇f‖² that is added to σ².
        effective_rank_x: tr H / ‖H‖ of the base's block of the Hessian at the minimiser; None
            without a closed form.
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
        """L_x; infinite if ℓ_x grows."""
        # ℓ_x does not decrease, so it is constant if two far values are equal.
        return self.ell_x(0.0) if self.ell_x(0.0) == self.ell_x(1e6) else math.inf

    @property
    def l_y(self) -> float:
        """L_y; infinite if ℓ_y grows."""
        return self.ell_y(0.0) if self.ell_y(0.0) == self.ell_y(1e6) else math.inf


class Problem(ABC):
    """A finite sum.

    A point is w = (x, y), [..., d_x + d_y], with the base first. Points come in batches. Each point
    has the data of its own sample (`rows`), whose leading dimensions broadcast. All tensors are
    float64.

    Attributes:
        num_samples: n.
        d_x: dimensions of the base.
        d_y: dimensions of the adapter.
        constants: the known constants.
    """

    num_samples: int
    d_x: int
    d_y: int
    constants: Constants

    @abstractmethod
    def start(self) -> Tensor:
        """The start of every run: [d_x + d_y]."""

    @abstractmethod
    def rows(self, samples: Tensor) -> tuple[Tensor, ...]:
        """The data of some samples, as `losses` and `gradients` take it.

        Args:
            samples: int64, [...].

        Returns:
            Tensors with the leading dimensions of `samples`.
        """

    @abstractmethod
    def losses(self, w: Tensor, rows: tuple[Tensor, ...]) -> Tensor:
        """f_i(w), [...].

        Args:
            w: [..., d_x + d_y].
            rows: data of the samples i, [...].
        """

    def gradients(self, w: Tensor, rows: tuple[Tensor, ...]) -> Tensor:
        """∇f_i(w): [..., d_x + d_y], by autograd unless a problem overrides it."""
        with torch.enable_grad():
            w = w.detach().requires_grad_()
            # Points do not depend on each other, so the gradient of the sum holds one for each.
            return torch.autograd.grad(self.losses(w, rows).sum(), w)[0]

    def value(self, w: Tensor) -> Tensor:
        """f(w): [...]."""
        return self.losses(w.unsqueeze(-2), self._every).mean(-1)

    def gradient(self, w: Tensor) -> Tensor:
        """∇f(w): [..., d_x + d_y]."""
        # Every point with every sample: [..., n, d_x + d_y].
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
        """The margin by which the diagonal majoriser holds at one point.

        Returns:
            The smallest eigenvalue of diag(ℓ_x I, ℓ_y I) ± ∇²f over both signs, divided by the
            larger of ℓ_x and ℓ_y. It is at least 0 if hybrid smoothness holds.
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


class ProblemModule(nn.Module):
    """A problem's point as parameters, from the problem's start on: index of a sample -> its loss.

    `x` is frozen and `y` trainable, as in a hybrid run.
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
        """The current point: [d_x + d_y]."""
        return torch.cat((self.x, self.y))


def centred_rows(num: int, width: int, power: float, seed: int) -> Tensor:
    """Random rows with sum zero and mean squared norm `power`: [num, width]."""
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randn(num, width, dtype=torch.float64, generator=generator)
    rows = rows - rows.mean(0)
    size = rows.square().sum(-1).mean()
    return rows * torch.sqrt(power / size) if size > 0 else rows


def alternating_signs(num: int) -> Tensor:
    """Alternating signs, centred and with unit mean square: [num]."""
    signs = 1.0 - 2.0 * (torch.arange(num, dtype=torch.float64) % 2)
    signs = signs - signs.mean()
    size = signs.square().mean()
    return signs / size.sqrt() if size > 0 else signs


def check_sizes(**sizes: int) -> None:
    """Check that all sizes are at least one.

    Raises:
        UserError: with all sizes that are not.
    """
    wrong = [
        f"{name} is {value}; it must be at least 1" for name, value in sizes.items() if value < 1
    ]
    if wrong:
        raise UserError("; ".join(wrong))
