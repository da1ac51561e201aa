"""Slopes and curvatures along the estimator's own directions, and along an update.

For a direction v and each row r of its batch:

    s_r = (f_r(x + h v) − f_r(x − h v)) / 2h                         vᵀ∇f_r
    c_r = (f_r(x + h v) + f_r(x − h v) − 2 f_r(x)) / h²              vᵀ∇²f_r v

A direction takes three forward passes for a model of any size. Each row has its own s_r, so one
batch separates signal from noise: the product of the slopes of two different rows has the mean
(v·∇f)², because their noise is independent.

Along an update u of the first-order block, two gradients give

    κ(u) = uᵀ(∇f(y + h u) − ∇f(y − h u)) / (2h ‖u‖²)
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
    """Measurements along directions of a block.

    Attributes:
        slopes: slope of each row, [directions, rows].
        curvatures: mean over the rows of a direction, [directions].
        losses: mean loss at x over the rows of a direction, [directions].
        num_weights: d, the number of weights of the block.
        radius: h.
    """

    slopes: np.ndarray
    curvatures: np.ndarray
    losses: np.ndarray
    num_weights: int
    radius: float


def measure_directions(
    probe: Probe,
    view: Perturbation,
    *,
    radius: float,
    num_directions: int,
    first: int = 0,
    num_rows: int | None = None,
) -> Directions:
    """Measure slopes and curvatures. Each direction uses a batch of its own.

    Args:
        probe: supplies rows and losses.
        view: the perturbed view of the block.
        radius: h. The upper end of the plateau of ε separates second differences best from
            rounding.
        num_directions: number of directions; each takes three forward passes.
        first: number of the first direction, so that no direction is measured twice.
        num_rows: rows of a direction, at least 2; the default is the probe's batch size.
    """
    num_rows = max(2, probe.batch_size if num_rows is None else num_rows)
    slopes, curvatures, losses = [], [], []
    for k in range(first, first + num_directions):
        # The same rows and dropout masks at all three points, so that their noise cancels.
        rows, masks = probe.draw(num_rows), probe.masks(k)
        at, ahead, behind = (
            probe.losses_at(view, scale, rows, direction=k, masks=masks)[1]
            for scale in (0.0, radius, -radius)
        )
        slopes.append((ahead - behind) / (2 * radius))  # [rows]
        curvatures.append(float((ahead + behind - 2 * at).mean()) / radius**2)
        losses.append(float(at.mean()))
    return Directions(
        np.array(slopes), np.array(curvatures), np.array(losses), view.num_weights, radius
    )


@dataclass(frozen=True)
class AlongUpdate:
    """The loss along an update u of a first-order block.

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
        """uᵀ∇²f u / ‖u‖². If positive, it is a lower bound of the block's smoothness constant."""
        return self.curvature / self.square if self.square else math.nan

    @property
    def best_rate(self) -> float:
        """The rate that minimises the parabola along −u; infinite without positive curvature."""
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
    """Measure the curvature along the gradient, or along its signs (the first step of Adam).

    Args:
        parameters: the parameters of the block. They are written, then restored bit for bit.
        gradient: fills `grad` of the parameters, always for the same rows and dropout masks.
        is_sign: whether u = sign(∇f), as in the first step of Adam; otherwise u = ∇f.
        reach: h ‖u‖ relative to the norm of the parameters.
    """
    before = [p.detach().clone() for p in parameters]  # a step back would leave rounding
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
    for p in parameters:  # backward adds to an existing gradient
        p.grad = None
    gradient()
    found = [torch.zeros_like(p) if p.grad is None else p.grad.detach().clone() for p in parameters]
    for p in parameters:
        p.grad = None
    return found


def _dot(a: Sequence[Tensor], b: Sequence[Tensor]) -> float:
    return math.fsum(float((x.double() * y.double()).sum()) for x, y in zip(a, b, strict=True))
