"""The smoothing radius ε: large enough for rounding, small enough for curvature.

    forward   s(ε) = v·∇f + ε vᵀHv / 2 + (rounding of two losses) / ε
    central   s(ε) = v·∇f + ε² ∇³f[v,v,v] / 6 + (rounding of two losses) / 2ε

The losses are measured on a ladder of ε along a few directions. The relative error of s is modelled
as

    e(ε) = a / ε + b ε^p        p = 1 (forward), 2 (central)

The plateau is the range in which both terms stay below a tolerance: a / tol ≤ ε ≤ (tol / b)^{1/p}.
The advised ε is its middle on a logarithmic scale. For the forward difference this is √(a / b),
which minimises e. With 16-bit weights, w + ε v is rounded as well, and this rounding is part of the
measured error at small ε.

The bias of the forward difference has mean zero over directions, since E[v vᵀHv] = 0 for symmetric
v. It only adds variance: an error of a tenth of s adds a hundredth to the variance of the estimate.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
from torch import Tensor

from zofo.advice.probe import Probe
from zofo.optim.estimator import Estimator
from zofo.perturb.view import Perturbation

TOLERANCE: Final = 0.1
"""A choice: this error adds a hundredth to the variance of the estimate."""
_RATIO: Final = 10 ** (2 / 3)
_MAX_STEPS_OUT: Final = 3
"""Rungs that the ladder may add at an end where the error still falls."""
_NUM_RUNGS: Final = 6
_NUM_DIRECTIONS: Final = 3
MOST_FORWARDS: Final = _NUM_DIRECTIONS * (1 + 2 * (_NUM_RUNGS + _MAX_STEPS_OUT))
"""Upper bound of the forward passes of a ladder."""


@dataclass(frozen=True)
class Ladder:
    """Losses along directions.

    Attributes:
        eps: radii, ascending, [rungs].
        ahead, behind: f(x + ε v) and f(x − ε v), [rungs, directions].
        at: f(x) on the batch of each direction, [directions].
    """

    eps: np.ndarray
    ahead: np.ndarray
    behind: np.ndarray
    at: np.ndarray

    def slopes(self, estimator: Estimator) -> np.ndarray:
        """The scalars s that a training step would compute: [rungs, directions]."""
        if estimator == "forward":
            return (self.ahead - self.at) / self.eps[:, None]
        return (self.ahead - self.behind) / (2 * self.eps[:, None])

    def curvatures(self) -> np.ndarray:
        """Second differences, which approximate vᵀHv: [rungs, directions]."""
        return (self.ahead + self.behind - 2 * self.at) / self.eps[:, None] ** 2


@dataclass(frozen=True)
class Plateau:
    """The range of suitable smoothing radii.

    Attributes:
        eps: the advised radius.
        low, high: ends of the plateau; low > high if there is no plateau.
        error: expected relative error of s at `eps`.
        rungs: pairs (ε, measured relative error of s).
        is_open_low, is_open_high: whether the error stays small down (up) to the ladder's end. That
            end then stands for the end of the plateau.
        quadratic_to: the largest rung up to which a parabola predicts the loss within half of its
            change.
    """

    eps: float
    low: float
    high: float
    error: float
    rungs: tuple[tuple[float, float], ...]
    is_open_low: bool
    is_open_high: bool
    quadratic_to: float

    @property
    def exists(self) -> bool:
        """Whether some radius keeps both errors below the tolerance."""
        return self.low <= self.high


def measure_ladder(
    probe: Probe,
    view: Perturbation,
    *,
    scale: float,
    estimator: Estimator = "forward",
    num_directions: int = _NUM_DIRECTIONS,
    is_16_bit: bool = False,
) -> Ladder:
    """Evaluate the loss on a ladder of ε. The ladder grows while the smallest error lies at an end.

    Args:
        probe: supplies rows and losses. Each direction has a batch of its own.
        view: the perturbed view of the block.
        scale: typical size of a weight. The ladder is centred at a hundredth of it, or at a tenth
            for 16-bit weights. If it is 0, the centre is 1e-3.
        estimator: the estimator whose error is measured.
        num_directions: number of directions, at least 2.
        is_16_bit: whether the weights have 16 bits.
    """
    centre = (0.1 if is_16_bit else 0.01) * scale or 1e-3
    exponents = list(range(-(_NUM_RUNGS // 2), _NUM_RUNGS - _NUM_RUNGS // 2))
    batches = [probe.draw() for _ in range(num_directions)]
    found: dict[int, tuple[list[float], list[float]]] = {}

    def loss(sign: int, exponent: int, k: int) -> float:
        eps = sign * centre * _RATIO**exponent
        masks = probe.masks(k)
        return probe.losses_at(view, eps, batches[k], direction=k, masks=masks)[0]

    # Each direction keeps its rows and dropout masks on all rungs, so that only ε differs.
    at = [loss(0, 0, k) for k in range(num_directions)]
    steps_out = 0
    while True:
        for exponent in exponents:
            if exponent not in found:
                ahead = [loss(1, exponent, k) for k in range(num_directions)]
                behind = [loss(-1, exponent, k) for k in range(num_directions)]
                found[exponent] = ahead, behind
        ladder = Ladder(
            np.array([centre * _RATIO**e for e in exponents]),
            np.array([found[e][0] for e in exponents]),
            np.array([found[e][1] for e in exponents]),
            np.array(at),
        )
        best = int(np.argmin(_errors(ladder, estimator)))
        if steps_out == _MAX_STEPS_OUT or 0 < best < len(exponents) - 1:
            return ladder
        steps_out += 1
        outer = exponents[0] - 1 if best == 0 else exponents[-1] + 1
        exponents = sorted([*exponents, outer])


@np.errstate(invalid="ignore", over="ignore")  # losses may have overflowed
def plateau(ladder: Ladder, estimator: Estimator = "forward", tol: float = TOLERANCE) -> Plateau:
    """Find the plateau of a ladder.

    Args:
        ladder: losses on at least three rungs.
        estimator: the estimator whose error is measured.
        tol: the largest relative error of s that is accepted.
    """
    errors, eps = _errors(ladder, estimator), ladder.eps
    if not np.isfinite(errors).any():
        return _no_plateau(eps)
    power = 1 if estimator == "forward" else 2
    best = int(np.argmin(errors))
    # Rungs whose loss overflowed have no error to fit. They only end the usable range.
    finite = np.isfinite(errors)
    first, last = (int(i) for i in np.flatnonzero(finite)[[0, -1]])
    rungs = np.arange(len(eps))
    below, above = finite & (rungs < best), finite & (rungs > best)
    # Below the rung of least error the term a / ε dominates, above it the term b ε^p.
    a = float(np.median(errors[below] * eps[below])) if below.any() else 0.0
    b = float(np.median(errors[above] / eps[above] ** power)) if above.any() else 0.0
    low = a / tol if a > 0 else float(eps[first])
    high = (tol / b) ** (1 / power) if b > 0 else float(eps[last])
    middle = math.sqrt(low * high)
    if low > high and a > 0 and b > 0:  # no plateau: the minimum of e, where its derivative is 0
        middle = (a / (power * b)) ** (1 / (power + 1))
    # The advice stays within the measured rungs.
    middle = min(max(middle, float(eps[first])), float(eps[last]))
    error = max(a / middle + b * middle**power, float(errors[best]) if a == 0 or b == 0 else 0.0)
    return Plateau(
        eps=middle,
        low=low,
        high=high,
        error=error,
        rungs=tuple(zip(eps.tolist(), errors.tolist(), strict=True)),
        is_open_low=a == 0 and first == 0,
        is_open_high=b == 0 and last == len(eps) - 1,
        quadratic_to=_quadratic_to(ladder, best),
    )


def _no_plateau(eps: np.ndarray) -> Plateau:
    """The result if no direction changes the loss: the middle of the ladder, with low > high."""
    middle, rungs = math.sqrt(float(eps[0]) * float(eps[-1])), [(e, math.inf) for e in eps.tolist()]
    return Plateau(
        middle, math.inf, 0.0, math.inf, tuple(rungs), False, False, quadratic_to=float(eps[-1])
    )


def weight_scale(weights: Sequence[Tensor]) -> float:
    """Root mean square of weights: tensors of any shape."""
    total = sum(float(weight.detach().float().square().sum()) for weight in weights)
    return math.sqrt(total / max(1, sum(weight.numel() for weight in weights)))


@np.errstate(invalid="ignore", over="ignore")
def _errors(ladder: Ladder, estimator: Estimator) -> np.ndarray:
    """Relative error of s at each rung, [rungs].

    The reference is the central difference at the two rungs between which it changes least.
    """
    central, eps = ladder.slopes("central"), ladder.eps
    size = np.sqrt((central**2).mean(axis=1))
    steps = np.sqrt((np.diff(central, axis=0) ** 2).mean(axis=1))
    with np.errstate(divide="ignore", invalid="ignore"):
        unsteady = steps / np.maximum(size[1:], size[:-1])
    # If rounding leaves the weights unchanged, all differences are 0 and look steady. They are not
    # a valid reference.
    unsteady[~np.isfinite(unsteady) | ~_is_above_rounding(ladder)] = np.inf
    if not np.isfinite(unsteady).any():
        return np.full(len(eps), np.inf) if not size.any() else 1 / eps
    steadiest = int(np.argmin(unsteady))
    reference = central[steadiest : steadiest + 2].mean(axis=0)
    deviation = np.sqrt(((ladder.slopes(estimator) - reference) ** 2).mean(axis=1))
    errors = deviation / math.sqrt(float((reference**2).mean()))
    return np.where(np.isfinite(errors), np.maximum(errors, 1e-12), np.inf)


def _is_above_rounding(ladder: Ladder) -> np.ndarray:
    """Whether most differences of both neighbouring rungs are nonzero: [rungs − 1]."""
    moved = (ladder.ahead != ladder.behind).mean(axis=1) > 0.5
    return moved[1:] & moved[:-1]


def _quadratic_to(ladder: Ladder, best: int) -> float:
    """The last rung whose losses the parabola through the rung before predicts within half."""
    slopes, curvatures, eps = ladder.slopes("central"), ladder.curvatures(), ladder.eps
    reach = float(eps[best])
    for i in range(best + 1, len(eps)):
        # f(x ± ε v) − f(x) ≈ ± ε s + ε² c / 2, with s and c from the rung before.
        odd = eps[i] * slopes[i - 1]
        even = eps[i] ** 2 * curvatures[i - 1] / 2
        changes = np.stack((ladder.ahead[i], ladder.behind[i])) - ladder.at
        missed = changes - np.stack((even + odd, even - odd))
        # `not <=` also ends the loop at an overflowed loss.
        if not math.sqrt(float((missed**2).mean())) <= 0.5 * math.sqrt(float((changes**2).mean())):
            break
        reach = float(eps[i])
    return reach
