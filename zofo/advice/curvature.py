r"""Slopes and curvatures along the estimator's own directions, and along a gradient.

    for a direction v, with rows r of its own:
        s_r = (f_r(x + h v) − f_r(x − h v)) / 2h                         vᵀ∇f_r
        c_r = (f_r(x + h v) + f_r(x − h v) − 2 f_r(x)) / h²              vᵀ∇²f_r v

Three forwards a direction, at any size of model. Because every row has its own s_r, one batch tells
signal from noise: products of different rows have the mean (v·∇f)², whatever the rows' noise.

    κ(u) = uᵀ(∇f(y + h u) − ∇f(y − h u)) / (2h ‖u‖²)                     two gradients
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from zofo.advice.probe import Probe
from zofo.perturb.view import Perturbation


@dataclass(frozen=True)
class Directions:
    """What was measured along directions of a block.

    Attributes:
        slopes: of each row, [directions, rows].
        curvatures: mean over a direction's rows, [directions].
        losses: likewise of f, [directions].
        num_weights: d, of the block.
        radius: h.
    """

    slopes: np.ndarray
    curvatures: np.ndarray
    losses: np.ndarray
    num_weights: int
    radius: float

    def as_dict(self) -> dict[str, object]:
        """For JSON: means over rows, and the variance of a row's slope around them."""
        return {
            "num_weights": self.num_weights,
            "radius": self.radius,
            "slopes": self.slopes.mean(axis=1).tolist(),
            "row_variances": self.slopes.var(axis=1, ddof=1).tolist(),
            "curvatures": self.curvatures.tolist(),
            "losses": self.losses.tolist(),
        }


def measure_directions(
    probe: Probe,
    view: Perturbation,
    *,
    radius: float,
    num_directions: int,
    first: int = 0,
    num_rows: int | None = None,
) -> Directions:
    """Slopes of rows and curvatures along directions, each with rows of its own.

    Args:
        probe: rows and losses.
        view: the perturbed view of the block.
        radius: h; the upper end of the plateau of ε makes second differences stand out.
        num_directions: how many; three forwards each.
        first: number of the first direction: none should be measured twice.
        num_rows: of a direction, at least 2; default: the probe's batch.
    """
    num_rows = max(2, probe.batch_size if num_rows is None else num_rows)
    slopes, curvatures, losses = [], [], []
    for k in range(first, first + num_directions):
        rows, masks = probe.draw(num_rows), probe.masks(k)
        at, ahead, behind = (
            probe.losses_at(view, scale, rows, direction=k, masks=masks)[1]
            for scale in (0.0, radius, -radius)
        )
        slopes.append((ahead - behind) / (2 * radius))
        curvatures.append(float((ahead + behind - 2 * at).mean()) / radius**2)
        losses.append(float(at.mean()))
    return Directions(
        np.array(slopes), np.array(curvatures), np.array(losses), view.num_weights, radius
    )


@dataclass(frozen=True)
class AlongUpdate:
    """The loss along an update direction u of a first-order block.

    Attributes:
        slope: ⟨∇f, u⟩.
        curvature: uᵀ∇²f u.
        square: ‖u‖².
    """

    slope: float
    curvature: float
    square: float

    @property
    def rayleigh(self) -> float:
        """uᵀ∇²f u / ‖u‖²: a lower bound of the block's smoothness constant where positive."""
        return self.curvature / self.square if self.square else math.nan

    @property
    def best_rate(self) -> float:
        """Where the parabola along −u is least; infinite without positive curvature."""
        if self.curvature <= 0 or self.slope <= 0:
            return math.inf
        return self.slope / self.curvature


def along_update(
    parameters: Sequence[nn.Parameter],
    gradient: Callable[[], None],
    *,
    is_sign: bool,
    reach: float = 1e-2,
) -> AlongUpdate:
    """Curvature along the gradient, or along its signs: the first step of Adam.

    Args:
        parameters: of the block; written within, and put back bit for bit.
        gradient: fills their `grad`, always of the same rows under the same masks.
        is_sign: whether u = sign(∇f), which Adam's first step is; else u = ∇f.
        reach: h ‖u‖ over the norm of the parameters.
    """
    before = [p.detach().clone() for p in parameters]
    here = _gradient(parameters, gradient)
    update = [g.sign() if is_sign else g for g in here]
    square = _dot(update, update)
    norm = math.sqrt(_dot(before, before)) or 1.0
    if square == 0 or not math.isfinite(square):
        return AlongUpdate(0.0, 0.0, 0.0)
    h = reach * norm / math.sqrt(square)
    ends = []
    try:
        for sign in (1, -1):
            with torch.no_grad():
                for p, w, u in zip(parameters, before, update, strict=True):
                    p.copy_(w + sign * h * u)
            ends.append(_dot(_gradient(parameters, gradient), update))
    finally:
        with torch.no_grad():
            for p, w in zip(parameters, before, strict=True):
                p.copy_(w)
    return AlongUpdate(_dot(here, update), (ends[0] - ends[1]) / (2 * h), square)


def _gradient(parameters: Sequence[nn.Parameter], gradient: Callable[[], None]) -> list[Tensor]:
    for p in parameters:
        p.grad = None
    gradient()
    found = [torch.zeros_like(p) if p.grad is None else p.grad.detach().clone() for p in parameters]
    for p in parameters:
        p.grad = None
    return found


def _dot(a: Sequence[Tensor], b: Sequence[Tensor]) -> float:
    return math.fsum(float((x.double() * y.double()).sum()) for x, y in zip(a, b, strict=True))
