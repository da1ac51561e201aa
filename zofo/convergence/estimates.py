"""Error, bias and size of a single estimate at a fixed point, without a run.

    s = (f(x + eps v, y) − f(x, y)) / eps          (or central),   g = s v

If v and −v are equally likely, forward and central differences have the same mean g: with
s_central(v) = (s_forward(v) + s_forward(−v)) / 2, E[s_forward(v) v] = E[s_central(v) v]. Only the
spread differs.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch

from zofo.convergence.cells import AnyCell
from zofo.convergence.problems import make_problem


@dataclass(frozen=True)
class EstimateCell(AnyCell):
    """Estimates of ∇_x f at one point of a problem, for several eps.

    Attributes:
        at_minimum: whether the point is the origin, where ∇f = 0 in these problems, or the start.
        estimator: "forward" or "central".
        distribution: "gaussian" or "rademacher".
        eps: smoothing radii.
        num_draws: directions per seed, a power of two.
        num_seeds: the seeds are 0, 1, ..., num_seeds − 1.
    """

    at_minimum: bool
    estimator: str
    distribution: str
    eps: tuple[float, ...]
    num_draws: int
    num_seeds: int

    @property
    def num_steps(self) -> int:
        """The amount of work, comparable with the steps of a run."""
        # Draws are evaluated together, which is cheaper than as many steps of a run.
        return self.num_draws // 32

    def run(
        self, engine_name: str, on_progress: Callable[[float], None] | None = None
    ) -> dict[str, np.ndarray]:
        """Draw directions and average.

        Returns:
            `error2` [eps, seeds]: mean of (s − ⟨v, ∇f⟩)²; `bias` [eps, seeds, d_x]: mean of (s −
            ⟨v, ∇f⟩) v, whose expectation is the bias of the estimate; `size2` [eps, seeds]: mean of
            ‖s v‖²; `eps`; `gradient2`: ‖∇_x f‖².
        """
        from zofo.convergence.kernels import draw_many

        problem = make_problem(self.problem, **self.options)
        w = problem.start()
        if self.at_minimum:
            w = torch.zeros_like(w)
        slope = problem.gradient(w)[: problem.d_x]
        shape = (len(self.eps), self.num_seeds)
        error2, size2 = np.zeros(shape), np.zeros(shape)
        bias = np.zeros((*shape, problem.d_x))
        is_gaussian = self.distribution == "gaussian"
        for seed in range(self.num_seeds):
            v = torch.from_numpy(
                draw_many(self.num_draws, problem.d_x, np.uint64(seed), is_gaussian)
            )
            wide = torch.nn.functional.pad(v, (0, problem.d_y))  # the adapter does not move
            exact, here = v @ slope, problem.value(w)
            for i, eps in enumerate(self.eps):
                ahead = problem.value(w + eps * wide)  # [draws]
                if self.estimator == "forward":
                    scalar = (ahead - here) / eps
                else:
                    scalar = (ahead - problem.value(w - eps * wide)) / (2 * eps)
                # The exact slope has no bias, and without it the mean below has less noise.
                error = scalar - exact
                error2[i, seed] = float(error.square().mean())
                bias[i, seed] = (error.unsqueeze(-1) * v).mean(0).numpy()
                size2[i, seed] = float((scalar.square() * v.square().sum(-1)).mean())
            if on_progress is not None:
                on_progress((seed + 1) / self.num_seeds)
        return {
            "error2": error2,
            "bias": bias,
            "size2": size2,
            "eps": np.array(self.eps),
            "gradient2": np.array([float(slope.square().sum())]),
        }
