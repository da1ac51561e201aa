"""How smoothness grows with the gradient: ℓ(u) = L0 + L1 u, ℓ(u) = c uᵖ, and whether p < 2.

Both laws are fitted to pairs (u_i, ℓ_i) = (‖∇f‖, local constant) along a path. The fit uses
logarithms because constants vary by factors:

    linear   min_{L0, L1 ≥ 0} Σ (log ℓ_i − log(L0 + L1 u_i))²
    power    min_{c, p} Σ (log ℓ_i − log c − p log u_i)²

With ū the geometric mean of u, L0 + L1 u = A (1 − s + s u/ū) for some s in [0, 1]. A has a closed
form, and a grid search finds s, so that fits with L0 = 0 or L1 = 0 are exact.

Successive points of a path depend on each other. Therefore the intervals come from a moving-block
bootstrap: it resamples blocks of b neighbours, with b from the autocorrelation ρ of the residuals
(Carlstein 1986). `widening` is the factor by which the percentiles of the resampled fits move away
from the estimate. It corrects for the dependence beyond a block, under an AR(1) model with this ρ,
and for the small number of independent points. The tests and docs/explain/smoothness.md give the
coverage by simulation. An interval says how well this path determines the fit. It says nothing
about another seed, task or model.

The ℓ of the theorem is a bound, not a trend. `envelope` is the line L0 + L1 u of least area above
all points, by linear programming. A sub-quadratic trend with bounded scatter has a sub-quadratic
bound.

References:
    Zhang, He, Sra, Jadbabaie, 2020, arXiv 1905.11881: (L0, L1)-smoothness, measured along a path.
    Li et al., 2023, arXiv 2306.01264: sub-quadratic ℓ. Künsch, 1989: the moving-block
    bootstrap.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Final, Literal

import numpy as np

from zofo.statistics.resampling import CONFIDENCE, Interval

Verdict = Literal["confirmed", "refuted", "undecided at this scale"]
Array = np.ndarray
MIN_POINTS: Final = 8
"""Fits of fewer points have no interval, because a block bootstrap needs several blocks."""
MIN_SPREAD: Final = 2.0
"""A verdict on the exponent needs a path on which ‖∇f‖ varies by this factor (our choice)."""
_SHARES: Final = np.concatenate(
    [[0.0], np.geomspace(1e-4, 0.5, 50), 1 - np.geomspace(0.5, 1e-4, 50)[1:], [1.0]]
)


@dataclass(frozen=True)
class LinearFit:
    """ℓ(u) = L0 + L1 u.

    Attributes:
        constant: L0.
        slope: L1.
        growth: share s of L1 u in ℓ at the mean gradient norm, in [0, 1].
        error: root mean square of the residuals of log ℓ.
        num_points: number of pairs.
        block_length: length b of the bootstrap's blocks.
    """

    constant: Interval
    slope: Interval
    growth: Interval
    error: float
    num_points: int
    block_length: int


@dataclass(frozen=True)
class PowerFit:
    """ℓ(u) = c uᵖ, with `factor` c and `exponent` p; the other attributes as in `LinearFit`."""

    factor: Interval
    exponent: Interval
    error: float
    num_points: int
    block_length: int

    def __call__(self, u: float) -> float:
        """ℓ(u)."""
        return float(self.factor.value * u**self.exponent.value)


@dataclass(frozen=True)
class Growth:
    """Everything that is fitted to one series.

    Attributes:
        linear, power: the two fits.
        level: geometric mean of ℓ.
        spread: the largest u divided by the smallest; no verdict is given below `MIN_SPREAD`.
        envelope: (L0, L1) of the lowest line above all points.
    """

    linear: LinearFit
    power: PowerFit
    level: Interval
    spread: float
    envelope: tuple[float, float]

    @property
    def grows(self) -> Verdict:
        """Whether ℓ grows with u: whether the interval of the exponent lies above 0."""
        exponent = self.power.exponent
        negated = Interval(-exponent.value, -exponent.high, -exponent.low)
        return below(negated, 0.0) if self.spread >= MIN_SPREAD else "undecided at this scale"

    @property
    def is_subquadratic(self) -> Verdict:
        """Whether p < 2, by the interval of the exponent."""
        exponent = self.power.exponent
        return below(exponent, 2.0) if self.spread >= MIN_SPREAD else "undecided at this scale"


def below(quantity: Interval, bound: float) -> Verdict:
    """Whether a quantity lies below a bound; undecided if its interval contains the bound."""
    if quantity.high < bound:  # comparisons with NaN are false, so no interval means undecided
        return "confirmed"
    return "refuted" if quantity.low > bound else "undecided at this scale"


def fit_growth(
    u: Sequence[float], constants: Sequence[float], *, num_resamples: int = 2000, seed: int = 0
) -> Growth:
    """Fit both laws to a path.

    Args:
        u: gradient norms in the order of the path, positive, [n].
        constants: local constants, positive, [n].
        num_resamples: number of bootstrap resamples.
        seed: seed of the bootstrap.

    Raises:
        ValueError: if there are fewer than two points, or if a value is not positive and finite.
    """
    x, z = np.asarray(u, dtype=np.float64), np.asarray(constants, dtype=np.float64)
    if len(x) < 2 or len(x) != len(z):
        raise ValueError(f"{len(x)} gradient norms and {len(z)} constants; give 2 or more pairs")
    if not (np.all(np.isfinite(x) & (x > 0)) and np.all(np.isfinite(z) & (z > 0))):
        raise ValueError("gradient norms and constants must be positive and finite")
    x, z = np.log(x), np.log(z)
    whole = np.ones((1, len(x)))  # one "resample" that has every point once

    factor, exponent = _power(x, z, whole)
    residuals = z - factor[0] - exponent[0] * x
    length, factor_of = _dependence(residuals)
    counts = _block_counts(len(x), length, num_resamples, seed) if len(x) >= MIN_POINTS else None
    factors, exponents = (None, None) if counts is None else _power(x, z, counts)
    power = PowerFit(
        _exponential(_interval(float(factor[0]), factors, factor_of)),
        _interval(float(exponent[0]), exponents, factor_of),
        float(np.sqrt(np.mean(residuals**2))),
        len(x),
        length,
    )

    centre = x.mean()  # log ū
    level, share, error = _linear(x - centre, z, whole)
    resamples = None if counts is None else _linear(x - centre, z, counts)[:2]

    # L0 = A (1 − s), L1 = A s / ū and s cannot be negative, so their intervals are cut off at 0.
    def of(formula: Callable[[Any, Any], Any], high: float = math.inf) -> Interval:
        resampled = None if resamples is None else formula(*resamples)
        found = _interval(float(formula(level, share)[0]), resampled, factor_of)
        return Interval(found.value, max(found.low, 0.0), min(found.high, high))

    linear = LinearFit(
        of(lambda a, s: np.exp(a) * (1 - s)),
        of(lambda a, s: np.exp(a - centre) * s),
        of(lambda a, s: s, 1.0),
        float(error[0]),
        len(x),
        length,
    )
    means = None if counts is None else counts @ z / counts.sum(axis=1)
    return Growth(
        linear,
        power,
        _exponential(_interval(float(z.mean()), means, factor_of)),
        float(np.exp(x.max() - x.min())),
        envelope(u, constants),
    )


def ratio(
    first: Sequence[float], second: Sequence[float], *, num_resamples: int = 2000, seed: int = 0
) -> Interval:
    """Geometric mean of first / second over a path, with its interval."""
    z = np.log(np.asarray(first, dtype=np.float64)) - np.log(np.asarray(second, dtype=np.float64))
    if len(z) < MIN_POINTS:
        return Interval(math.exp(z.mean()))
    length, factor = _dependence(z - z.mean())
    counts = _block_counts(len(z), length, num_resamples, seed)
    means = counts @ z / counts.sum(axis=1)
    return _exponential(_interval(float(z.mean()), means, factor))


def envelope(u: Sequence[float], constants: Sequence[float]) -> tuple[float, float]:
    """(L0, L1) ≥ 0 with L0 + L1 u_i ≥ ℓ_i for all i and the least Σ (L0 + L1 u_i)."""
    from scipy.optimize import linprog

    x, z = np.asarray(u, dtype=np.float64), np.asarray(constants, dtype=np.float64)
    # The solver's tolerances are absolute; units of the means make them relative.
    a, b = x / x.mean(), z / z.mean()
    found = linprog(
        [len(a), a.sum()],
        A_ub=np.column_stack([-np.ones_like(a), -a]),
        b_ub=-b,
        bounds=[(0, None), (0, None)],
        method="highs",
    )
    constant, slope = np.asarray(found.x)
    # The solver's tolerance may leave a point slightly above the line.
    excess = max(1.0, float(np.max(b / (constant + slope * a))))
    unit = excess * z.mean()
    return float(unit * constant), float(unit * slope / x.mean())


def autocorrelation(residuals: Array) -> float:
    """First autocorrelation ρ of residuals, in [0, 0.95], corrected for the bias of the fit.

    Residuals of a fitted line are less correlated than the noise, by about (2 + 4ρ) / n.
    """
    num, total = len(residuals), float(np.sum(residuals**2))
    if num < MIN_POINTS or total == 0:
        return 0.0
    rho = float(np.sum(residuals[1:] * residuals[:-1])) / total
    return min(0.95, max(0.0, rho + (2 + 4 * rho) / num))


def block_length(rho: float, num: int) -> int:
    """Length of the bootstrap's blocks: (2ρ / (1 − ρ²))^{2/3} n^{1/3}, from 1 to n / 4.

    Reference:
        Carlstein, The use of subseries values for estimating the variance of a general statistic
        from a stationary sequence, 1986.
    """
    length = (2 * rho / (1 - rho**2)) ** (2 / 3) * num ** (1 / 3)
    return int(max(1, min(round(length), num // 4)))


def widening(rho: float, num: int, length: int) -> float:
    """The factor that multiplies the distance of the percentiles from the estimate.

    The factor is a product of two. The first is the square root of a ratio of variances: the
    long-run variance of an AR(1), (1 + ρ) / (1 − ρ), over the variance within blocks of length b,
    1 + 2 Σ_{k<b} (1 − k/b) ρᵏ. The second is Student's quantile over the normal quantile, with
    n (1 − ρ) / (1 + ρ) − 2 degrees of freedom.
    """
    from scipy.stats import norm, t

    lags = np.arange(1, length)
    within = 1 + 2 * float(np.sum((1 - lags / length) * rho**lags))
    whole = (1 + rho) / (1 - rho)
    freedom = max(2.0, num / whole - 2)
    tail = 0.5 + CONFIDENCE / 2
    return math.sqrt(whole / within) * float(t.ppf(tail, freedom) / norm.ppf(tail))


def _dependence(residuals: Array) -> tuple[int, float]:
    rho, num = autocorrelation(residuals), len(residuals)
    length = block_length(rho, num)
    return length, widening(rho, num, length)


def _block_counts(num: int, length: int, num_resamples: int, seed: int) -> Array:
    """How often each point occurs in each resample, float64 [resamples, n]."""
    rng = np.random.default_rng(seed)
    # Enough blocks of neighbours to cover the path; what exceeds its length is cut off.
    starts = rng.integers(0, num - length + 1, size=(num_resamples, -(-num // length)))
    drawn = (starts[:, :, None] + np.arange(length)).reshape(num_resamples, -1)[:, :num]
    # One bincount counts all resamples: each has its own range of places.
    places = drawn + num * np.arange(num_resamples)[:, None]
    counts = np.bincount(places.ravel(), minlength=num * num_resamples)
    return counts.reshape(num_resamples, num).astype(np.float64)


def _power(x: Array, z: Array, counts: Array) -> tuple[Array, Array]:
    """Weighted least squares of z = a + p x for each row of counts: a and p, [resamples] each."""
    weight = counts.sum(axis=1)
    mean_x, mean_z = counts @ x / weight, counts @ z / weight
    covariance = counts @ (x * z) / weight - mean_x * mean_z
    variance = counts @ (x * x) / weight - mean_x**2
    slope = np.divide(covariance, variance, out=np.zeros_like(variance), where=variance > 1e-24)
    return mean_z - slope * mean_x, slope


def _linear(x: Array, z: Array, counts: Array) -> tuple[Array, Array, Array]:
    """Log A, s and error of z = log A + log(1 − s + s eˣ) for each row of counts, [resamples]."""
    shape = np.log((1 - _SHARES)[:, None] + _SHARES[:, None] * np.exp(x))  # [shares, n]
    # For a given share, the best log A is the mean of the rest, and the error its variance.
    rest = z - shape
    weight = counts.sum(axis=1, keepdims=True)
    mean, square = counts @ rest.T / weight, counts @ (rest**2).T / weight
    variance = square - mean**2
    best = np.argmin(variance, axis=1)
    share = _refined(variance, best)
    row = np.arange(len(best))
    # The refined share lies off the grid, so A and the error are computed again for it.
    level = mean[row, best]
    step = np.abs(share - _SHARES[best]) > 0
    if step.any():
        exact = np.log((1 - share)[:, None] + share[:, None] * np.exp(x))
        level = np.sum(counts * (z - exact), axis=1) / weight[:, 0]
        variance_at = np.sum(counts * (z - exact) ** 2, axis=1) / weight[:, 0] - level**2
    else:
        variance_at = variance[row, best]
    return level, share, np.sqrt(np.maximum(variance_at, 0.0))


def _refined(variance: Array, best: Array) -> Array:
    """The best share, refined by a parabola through its neighbours; 0 and 1 stay exact."""
    share = _SHARES[best].copy()
    inner = (best > 0) & (best < len(_SHARES) - 1)
    rows = np.flatnonzero(inner)
    if not len(rows):
        return share
    i = best[rows]
    # The vertex of a parabola through three points whose distances differ.
    a, b, c = _SHARES[i - 1], _SHARES[i], _SHARES[i + 1]
    fa, fb, fc = variance[rows, i - 1], variance[rows, i], variance[rows, i + 1]
    upper = (b - a) ** 2 * (fb - fc) - (b - c) ** 2 * (fb - fa)
    lower = (b - a) * (fb - fc) - (b - c) * (fb - fa)
    moved = np.divide(upper, 2 * lower, out=np.zeros_like(upper), where=np.abs(lower) > 1e-300)
    share[rows] = np.clip(b - moved, a, c)
    return share


def _interval(value: float, resampled: Array | None, factor: float) -> Interval:
    if resampled is None:
        return Interval(value)
    tail = (1 - CONFIDENCE) / 2
    low, high = np.quantile(resampled, [tail, 1 - tail])
    # Skewed resamples may lie on one side of the estimate; the interval still contains it.
    return Interval(
        value,
        min(value, value - factor * (value - float(low))),
        max(value, value + factor * (float(high) - value)),
    )


def _exponential(fitted: Interval) -> Interval:
    """The interval of a number whose logarithm was fitted."""
    # e^±700 is the range of float64. NaN comes first because min and max then return it.
    low, high = max(fitted.low, -700.0), min(fitted.high, 700.0)
    return Interval(math.exp(fitted.value), math.exp(low), math.exp(high))
