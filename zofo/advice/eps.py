r"""The smoothing radius: on the plateau between rounding and curvature.

    forward   s(ε) = v·∇f + ε vᵀHv / 2 + (rounding of two losses) / ε
    central   s(ε) = v·∇f + ε² ∇³f[v,v,v] / 6 + (rounding of two losses) / 2ε

Measured on a ladder of ε along a few directions, the error of s relative to its size is

    e(ε) = a / ε + b ε^p        p = 1 (forward), 2 (central)

The plateau is where both terms stay below a tolerance: a / tol ≤ ε ≤ (tol / b)^{1/p}. Its middle
in logarithms is taken; for the forward difference that is √(a / b), where e is least. In 16 bits
w + ε v is rounded to what the dtype holds, too: part of what is measured at small ε.

The bias of the forward difference has mean zero over directions (E v vᵀHv = 0 for symmetric v): it
is noise of the estimate, and a tenth of s adds a hundredth to its variance.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np

from zofo.advice.probe import Probe
from zofo.optim.estimator import Estimator
from zofo.perturb.view import Perturbation

TOLERANCE: Final = 0.1
"""Choice: a hundredth of the estimate's variance."""
_RATIO: Final = 10 ** (2 / 3)
_MAX_STEPS_OUT: Final = 3
_NUM_RUNGS: Final = 6
_NUM_DIRECTIONS: Final = 3
MOST_FORWARDS: Final = _NUM_DIRECTIONS * (1 + 2 * (_NUM_RUNGS + _MAX_STEPS_OUT))
"""Of a ladder."""
"""Rungs that the ladder grows at an end where the error is still falling."""


@dataclass(frozen=True)
class Ladder:
    """Losses along directions.

    Attributes:
        eps: ascending, [rungs].
        ahead, behind: f(x + ε v), f(x − ε v): [rungs, directions].
        at: f(x) of each direction's rows, [directions].
    """

    eps: np.ndarray
    ahead: np.ndarray
    behind: np.ndarray
    at: np.ndarray

    def slopes(self, estimator: Estimator) -> np.ndarray:
        """The scalars s as a step would have them: [rungs, directions]."""
        if estimator == "forward":
            return (self.ahead - self.at) / self.eps[:, None]
        return (self.ahead - self.behind) / (2 * self.eps[:, None])

    def curvatures(self) -> np.ndarray:
        """Second differences, vᵀHv up to their errors: [rungs, directions]."""
        return (self.ahead + self.behind - 2 * self.at) / self.eps[:, None] ** 2


@dataclass(frozen=True)
class Plateau:
    """Where the smoothing radius may lie.

    Attributes:
        eps: the advised one.
        low, high: ends of the plateau; low > high where there is none.
        error: expected error of s at `eps` over its size.
        rungs: (ε, measured error over the size of s) of the ladder.
        is_open_low, is_open_high: whether no error was met down or up to the ladder's end, so that
            the end stands for the plateau's.
        quadratic_to: largest rung up to which the loss along directions is a parabola within half.
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
    num_rungs: int = _NUM_RUNGS,
    is_16_bit: bool = False,
) -> Ladder:
    """Evaluate the loss on a ladder of ε; it grows where the least error is at one of its ends.

    Args:
        probe: rows and losses; each direction has a batch of its own.
        view: the perturbed view of the block.
        scale: typical size of a weight: the ladder lies around a hundredth of it (a tenth in 16
            bits); 0: 1e-3.
        estimator: whose error decides.
        num_directions: directions, at least 2.
        num_rungs: to begin with.
        is_16_bit: of the weights.
    """
    centre = (0.1 if is_16_bit else 0.01) * scale or 1e-3
    exponents = list(range(-(num_rungs // 2), num_rungs - num_rungs // 2))
    batches = [probe.draw() for _ in range(num_directions)]
    found: dict[int, tuple[list[float], list[float]]] = {}

    def loss(sign: int, exponent: int, k: int) -> float:
        eps = sign * centre * _RATIO**exponent
        masks = probe.masks(k)
        return probe.losses_at(view, eps, batches[k], direction=k, masks=masks)[0]

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
    """The plateau of a ladder.

    Args:
        ladder: at least three rungs.
        estimator: whose error decides.
        tol: largest error of s over its size.
    """
    errors, eps = _errors(ladder, estimator), ladder.eps
    if not np.isfinite(errors).any():
        return _no_plateau(eps)
    power = 1 if estimator == "forward" else 2
    best = int(np.argmin(errors))
    # Where a loss overflowed there is no error to fit, only an end.
    finite = np.isfinite(errors)
    first, last = (int(i) for i in np.flatnonzero(finite)[[0, -1]])
    rungs = np.arange(len(eps))
    below, above = finite & (rungs < best), finite & (rungs > best)
    # The least error bounds both terms; other rungs belong to the term that they are dominated by.
    a = float(np.median(errors[below] * eps[below])) if below.any() else 0.0
    b = float(np.median(errors[above] / eps[above] ** power)) if above.any() else 0.0
    low = a / tol if a > 0 else float(eps[first])
    high = (tol / b) ** (1 / power) if b > 0 else float(eps[last])
    middle = math.sqrt(low * high)
    if low > high and a > 0 and b > 0:
        middle = (a / (power * b)) ** (1 / (power + 1))
    # What was not measured is not advised.
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
    """Of a loss that no direction moves."""
    return Plateau(
        eps=math.sqrt(float(eps[0]) * float(eps[-1])),
        low=math.inf,
        high=0.0,
        error=math.inf,
        rungs=tuple((value, math.inf) for value in eps.tolist()),
        is_open_low=False,
        is_open_high=False,
        quadratic_to=float(eps[-1]),
    )


def weight_scale(weights: Sequence[object]) -> float:
    """Root mean square of weights: tensors of any shape."""
    import torch

    total, num = 0.0, 0
    for weight in weights:
        assert isinstance(weight, torch.Tensor)
        total += float(weight.detach().float().square().sum())
        num += weight.numel()
    return math.sqrt(total / max(1, num))


@np.errstate(invalid="ignore", over="ignore")
def _errors(ladder: Ladder, estimator: Estimator) -> np.ndarray:
    """Error of s over its size, by rung, against the central difference where that is steadiest."""
    central, eps = ladder.slopes("central"), ladder.eps
    size = np.sqrt((central**2).mean(axis=1))
    steps = np.sqrt((np.diff(central, axis=0) ** 2).mean(axis=1))
    with np.errstate(divide="ignore", invalid="ignore"):
        unsteady = steps / np.maximum(size[1:], size[:-1])
    # Weights that rounding leaves where they are make no difference at all, the same at each rung.
    unsteady[~np.isfinite(unsteady) | ~_is_above_rounding(ladder)] = np.inf
    if not np.isfinite(unsteady).any():
        return np.full(len(eps), np.inf) if not size.any() else 1 / eps
    steadiest = int(np.argmin(unsteady))
    reference = central[steadiest : steadiest + 2].mean(axis=0)
    deviation = np.sqrt(((ladder.slopes(estimator) - reference) ** 2).mean(axis=1))
    errors = deviation / math.sqrt(float((reference**2).mean()))
    return np.where(np.isfinite(errors), np.maximum(errors, 1e-12), np.inf)


def _is_above_rounding(ladder: Ladder) -> np.ndarray:
    """Whether both rungs of a step have differences that are mostly not 0: [rungs − 1]."""
    moved = (ladder.ahead != ladder.behind).mean(axis=1) > 0.5
    return moved[1:] & moved[:-1]


def _quadratic_to(ladder: Ladder, best: int) -> float:
    """The last rung whose losses the parabola through the rung before predicts within half."""
    slopes, curvatures, eps = ladder.slopes("central"), ladder.curvatures(), ladder.eps
    reach = float(eps[best])
    for i in range(best + 1, len(eps)):
        odd = eps[i] * slopes[i - 1]
        even = eps[i] ** 2 * curvatures[i - 1] / 2
        changes = np.stack((ladder.ahead[i], ladder.behind[i])) - ladder.at
        missed = changes - np.stack((even + odd, even - odd))
        if not math.sqrt(float((missed**2).mean())) <= 0.5 * math.sqrt(float((changes**2).mean())):
            break
        reach = float(eps[i])
    return reach
