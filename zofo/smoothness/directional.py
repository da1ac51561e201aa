"""Curvature along the estimator's own directions, from forwards alone.

    c_k = vᵀ_k H v_k ≈ (f(w + εv_k) − 2 f(w) + f(w − εv_k)) / ε²
    s_k = vᵀ_k ∇f   ≈ (f(w + εv_k) − f(w − εv_k)) / 2ε

The directions are those that `HybridOptimizer` draws at a step (`zofo.noise`), and the model is
seen perturbed as in training (`zofo.perturb.view`), so this works wherever zofo trains, at any
size and in any dtype: no gradient, no second derivative, the scratch of one layer. Random signs
and normal directions both have E[vvᵀ] = I, so the mean of c_k estimates tr H of the block, and
s_k² its
squared gradient norm.

Along −s_k v_k a step of rate η changes the loss by −η s_k² + η² s_k² c_k / 2 to second order: it
falls for η < 2 / c_k.

Rounding: each loss is off by about u |f| (u the unit roundoff of what computes it), so c_k is off
by up to 4 u |f| / ε². Truncation: c_k is off by ε² v⁗/12 (fourth derivative along v); it is
measured, by the same directions at ε / 2.
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
    """Along some directions.

    Attributes:
        curvatures: vᵀHv, one a direction.
        projections: vᵀ∇f, likewise.
        loss: f(w).
        eps: ε.
        num_parameters: numbers in the block; ‖v‖² for random signs.
        rounding: what rounding may have added to a curvature: 4 u |f| / ε².
        truncation: median |c(ε) − c(ε/2)| over those directions that were measured twice; NaN if
            none was. The error of c(ε) is about 4/3 of it, where it is larger than the rounding.
        num_forwards: cost.
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
        """‖∇f‖² of the block, likewise."""
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
    on_forward: Callable[[], None] | None = None,
) -> DirectionalCurvature:
    """vᵀHv and vᵀ∇f along directions 0, 1, ... of a step.

    Args:
        closure: returns f, a scalar; the same value twice: no dropout.
        perturbation: the view of the model at w + εv; says which block, seed and distribution.
        parameters: what it perturbs.
        eps: ε; 1e-3 as in training.
        step: address of the directions.
        num_directions: how many; 16 by choice.
        num_checked: how many are measured at ε / 2 too.
        on_forward: called after each forward.

    Returns:
        What was measured; 1 + 2 · (num_directions + num_checked) forwards.
    """
    num_forwards = 0

    def evaluate(scale: float, direction: int) -> float:
        nonlocal num_forwards
        num_forwards += 1
        if scale:
            with perturbation.at(scale, step=step, direction=direction):
                value = float(closure())
        else:
            value = float(closure())
        if on_forward is not None:
            on_forward()
        return value

    generators = GeneratorState.capture()
    try:
        loss = evaluate(0.0, 0)
        curvatures, projections, changes = [], [], []
        for k in range(num_directions):
            ahead, behind = evaluate(eps, k), evaluate(-eps, k)
            curvatures.append((ahead - 2 * loss + behind) / eps**2)
            projections.append((ahead - behind) / (2 * eps))
            if k < num_checked:
                near = evaluate(eps / 2, k) - 2 * loss + evaluate(-eps / 2, k)
                changes.append(abs(curvatures[-1] - near / (eps / 2) ** 2))
    finally:
        generators.restore()
    # A loss rounds as the coarsest weights that it goes through, whichever are perturbed.
    dtypes = {p.dtype for p in perturbation.model.parameters() if p.is_floating_point()}
    computed_in = max(dtypes, key=lambda d: torch.finfo(d).eps)
    return DirectionalCurvature(
        tuple(curvatures),
        tuple(projections),
        loss,
        eps,
        sum(p.numel() for p in parameters),
        4 * torch.finfo(computed_in).eps / 2 * abs(loss) / eps**2,
        statistics.median(changes) if changes else float("nan"),
        num_forwards,
    )
