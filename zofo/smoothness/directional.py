"""Curvature along the estimator's own directions, from forwards alone.

    c_k = vᵀ_k H v_k ≈ (f(w + εv_k) − 2 f(w) + f(w − εv_k)) / ε²
    s_k = vᵀ_k ∇f   ≈ (f(w + εv_k) − f(w − εv_k)) / 2ε

The directions are those that `HybridOptimizer` draws at a step (`zofo.noise`). The model is
perturbed as in training (`zofo.perturb.view`). So this works wherever zofo trains, at any size and
in any dtype, with the scratch memory of one layer and without gradients. Random signs and normal
directions both have E[vvᵀ] = I. Therefore the mean of c_k estimates tr H of the block, and the mean
of s_k² estimates its squared gradient norm.

A step of learning rate η along −s_k v_k changes the loss by −η s_k² + η² s_k² c_k / 2 to second
order. The loss falls if η < 2 / c_k.

Rounding: each loss has an error of about u |f|, with u the unit roundoff of the dtype that computes
it. So the error of c_k is up to 4 u |f| / ε². Truncation: c_k has an error of ε² v⁗/12, with v⁗ the
fourth derivative along v. The same directions at ε / 2 measure it.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from zofo.optim.generators import GeneratorState
from zofo.perturb.view import Perturbation
from zofo.statistics.estimates import Estimate, mean_interval


@dataclass(frozen=True)
class DirectionalCurvature:
    """Curvatures and slopes along directions.

    Attributes:
        curvatures: vᵀHv of each direction.
        projections: vᵀ∇f of each direction.
        loss: f(w).
        eps: smoothing radius ε.
        num_parameters: number of weights in the block; it equals ‖v‖² for random signs.
        rounding: largest error of a curvature by rounding, 4 u |f| / ε².
        truncation: median |c(ε) − c(ε/2)| over the directions that were measured twice; NaN if
            there are none. The error of c(ε) is about 4/3 of it if it exceeds the rounding.
        num_forwards: number of forward passes.
    """

    curvatures: tuple[float, ...]
    projections: tuple[float, ...]
    loss: float
    eps: float
    num_parameters: int
    rounding: float
    truncation: float
    num_forwards: int

    @property
    def trace(self) -> Estimate:
        """Tr H of the block, with a 95% interval over directions."""
        return mean_interval(self.curvatures)

    @property
    def squared_gradient(self) -> Estimate:
        """‖∇f‖² of the block, with a 95% interval over directions."""
        return mean_interval([s * s for s in self.projections])


@torch.no_grad()
def directional_curvature(
    closure: Callable[[], Tensor | float],
    perturbation: Perturbation,
    parameters: Sequence[Tensor],
    *,
    eps: float = 1e-3,
    step: int = 0,
    num_directions: int = 16,
    num_checked: int = 2,
) -> DirectionalCurvature:
    """vᵀHv and vᵀ∇f along directions 0, 1, ... of a step.

    Args:
        closure: returns f, a scalar. It must be repeatable, so it must not use dropout.
        perturbation: the view of the model at w + εv, with its block, seed and distribution.
        parameters: the parameters that `perturbation` changes.
        eps: smoothing radius ε; the default 1e-3 is that of training.
        step: optimizer step whose directions are used.
        num_directions: number of directions; 16 is our choice.
        num_checked: number of directions that are measured at ε / 2 too.

    Returns:
        The measurement; it takes 1 + 2 · (num_directions + num_checked) forward passes.
    """
    num_forwards = 0

    def evaluate(scale: float, direction: int) -> float:
        nonlocal num_forwards
        num_forwards += 1
        if not scale:
            return float(closure())
        return perturbation.value_at(
            lambda: float(closure()), scale, step=step, direction=direction
        )

    # A closure may draw random numbers. The training must draw the same as without this call.
    generators = GeneratorState.capture()
    try:
        loss = evaluate(0.0, 0)
        curvatures, projections, changes = [], [], []
        for k in range(num_directions):
            ahead, behind = evaluate(eps, k), evaluate(-eps, k)
            curvatures.append((ahead - 2 * loss + behind) / eps**2)
            projections.append((ahead - behind) / (2 * eps))
            if k < num_checked:  # the same direction at half the radius shows the truncation
                near = evaluate(eps / 2, k) - 2 * loss + evaluate(-eps / 2, k)
                changes.append(abs(curvatures[-1] - near / (eps / 2) ** 2))
    finally:
        generators.restore()
    # The dtype with the largest rounding decides, even if other parameters are perturbed.
    dtypes = {p.dtype for p in perturbation.model.parameters() if p.is_floating_point()}
    computed_in = max(dtypes, key=lambda d: torch.finfo(d).eps)
    return DirectionalCurvature(
        tuple(curvatures),
        tuple(projections),
        loss,
        eps,
        sum(p.numel() for p in parameters),
        4 * torch.finfo(computed_in).eps / 2 * abs(loss) / eps**2,  # u is half of torch's eps
        statistics.median(changes) if changes else float("nan"),
        num_forwards,
    )
