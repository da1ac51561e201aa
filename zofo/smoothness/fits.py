"""How smoothness grows with the gradient: ℓ(u) = L0 + L1 u, ℓ(u) = c uᵖ, and whether p < 2.

Both are fitted to pairs (u_i, ℓ_i) = (‖∇f‖, local constant) along a path, in the logarithm, because
constants spread by factors:

    linear   min_{L0, L1 ≥ 0} Σ (log ℓ_i − log(L0 + L1 u_i))²
    power    min_{c, p} Σ (log ℓ_i − log c − p log u_i)²

With ū the geometric mean of u, L0 + L1 u = A (1 − s + s u/ū), s in [0, 1]: A has a closed form and
s is found on a grid, so the bounds L0 = 0 and L1 = 0 are reached exactly.

The points of one path follow each other, so the intervals are of a moving-block bootstrap: blocks
of b neighbours, b from the residuals' autocorrelation ρ (Carlstein 1986). Percentiles of the
resampled fits are moved away from the estimate by a factor (`widening`), for what blocks of b miss
of an AR(1) of that ρ, and for the few independent points that it leaves. Coverage by simulation is
in the tests and in docs/explain/smoothness.md. They say how well this path determines the fit, not
how another seed, task or model would turn out.

The theorem's ℓ is a bound, not a trend: `envelope` is the line L0 + L1 u of least area above all
points, by linear programming. A sub-quadratic trend with bounded scatter has a sub-quadratic bound.

References:
    Zhang, He, Sra, Jadbabaie, 2020, arXiv 1905.11881: (L0, L1)-smoothness, and measuring it along a
    path. Li et al., 2023, arXiv 2306.01264: sub-quadratic ℓ. Künsch, 1989: the moving-block
    bootstrap.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Final, Literal

import numpy as np

Verdict = Literal["confirmed", "refuted", "undecided at this scale"]
Array = np.ndarray
MIN_POINTS: Final = 8
"""Fewer points leave fits without an interval: a block bootstrap of them says nothing."""
MIN_SPREAD: Final = 2.0
"""A path along which ‖∇f‖ changes by a smaller factor says nothing of an exponent; by choice."""
_CONFIDENCE: Final = 0.95
_SHARES: Final = np.concatenate(
    [[0.0], np.geomspace(1e-4, 0.5, 50), 1 - np.geomspace(0.5, 1e-4, 50)[1:], [1.0]]
)


@dataclass(frozen=True)
class Quantity:
    """A fitted number.

    Attributes:
        value: of all points.
        low, high: 95% interval (moving-block bootstrap, widened); None with too few points.
    """

    value: float
    low: float | None
    high: float | None


@dataclass(frozen=True)
class LinearFit:
    """ℓ(u) = L0 + L1 u.

    Attributes:
        constant: L0.
        slope: L1.
        growth: share s of the growing part at the mean gradient norm, in [0, 1].
        error: root mean square of the residuals of log ℓ.
        num_points: pairs.
        block_length: of the bootstrap.
    """

    constant: Quantity
    slope: Quantity
    growth: Quantity
    error: float
    num_points: int
    block_length: int

    def __call__(self, u: float) -> float:
        """ℓ(u)."""
        return self.constant.value + self.slope.value * u


@dataclass(frozen=True)
class PowerFit:
    """ℓ(u) = c uᵖ.

    Attributes:
        factor: c.
        exponent: p.
        error: root mean square of the residuals of log ℓ.
        num_points: pairs.
        block_length: of the bootstrap.
    """

    factor: Quantity
    exponent: Quantity
    error: float
    num_points: int
    block_length: int

    def __call__(self, u: float) -> float:
        """ℓ(u)."""
        return float(self.factor.value * u**self.exponent.value)


@dataclass(frozen=True)
class Growth:
    """Everything fitted to one series.

    Attributes:
        linear, power: fits.
        level: geometric mean of ℓ.
        spread: largest u over smallest; below `MIN_SPREAD` it decides nothing.
        envelope: (L0, L1) of the lowest line above all points.
    """

    linear: LinearFit
    power: PowerFit
    level: Quantity
    spread: float
    envelope: tuple[float, float]

    @property
    def grows(self) -> Verdict:
        """Whether ℓ grows with u: the exponent's interval lies above 0, over a wide enough path."""
        found = self._below(0.0)
        return {"confirmed": "refuted", "refuted": "confirmed"}.get(found, found)  # type: ignore[return-value]

    @property
    def is_subquadratic(self) -> Verdict:
        """Whether p < 2, by the exponent's interval, over a wide enough path."""
        return self._below(2.0)

    def _below(self, bound: float) -> Verdict:
        is_wide = self.spread >= MIN_SPREAD
        return below(self.power.exponent, bound) if is_wide else "undecided at this scale"


def below(quantity: Quantity, bound: float) -> Verdict:
    """Whether a quantity lies below a bound, by its interval."""
    if quantity.low is None or quantity.high is None:
        return "undecided at this scale"
    if quantity.high < bound:
        return "confirmed"
    return "refuted" if quantity.low > bound else "undecided at this scale"


def fit_growth(
    u: Sequence[float], constants: Sequence[float], *, num_resamples: int = 2000, seed: int = 0
) -> Growth:
    """Fit both laws to a path.

    Args:
        u: gradient norms, positive, in the order of the path, [n].
        constants: local constants, positive, [n].
        num_resamples: of the bootstrap.
        seed: of the bootstrap.

    Raises:
        ValueError: for fewer than two points, or values that are not positive and finite.
    """
    x, z = np.asarray(u, dtype=np.float64), np.asarray(constants, dtype=np.float64)
    if len(x) < 2 or len(x) != len(z):
        raise ValueError(f"{len(x)} gradient norms and {len(z)} constants; give 2 or more pairs")
    if not (np.all(np.isfinite(x) & (x > 0)) and np.all(np.isfinite(z) & (z > 0))):
        raise ValueError("gradient norms and constants must be positive and finite")
    x, z = np.log(x), np.log(z)
    whole = np.ones((1, len(x)))

    factor, exponent = _power(x, z, whole)
    residuals = z - factor[0] - exponent[0] * x
    length, factor_of = _dependence(residuals)
    counts = _block_counts(len(x), length, num_resamples, seed) if len(x) >= MIN_POINTS else None
    factors, exponents = (None, None) if counts is None else _power(x, z, counts)
    power = PowerFit(
        _exponential(_quantity(float(factor[0]), factors, factor_of)),
        _quantity(float(exponent[0]), exponents, factor_of),
        float(np.sqrt(np.mean(residuals**2))),
        len(x),
        length,
    )

    centre = x.mean()
    level, share, error = _linear(x - centre, z, whole)
    resamples = None if counts is None else _linear(x - centre, z, counts)[:2]

    def of(formula: Callable[[Any, Any], Any], high: float = math.inf) -> Quantity:
        resampled = None if resamples is None else formula(*resamples)
        return _clipped(_quantity(float(formula(level, share)[0]), resampled, factor_of), 0.0, high)

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
        _exponential(_quantity(float(z.mean()), means, factor_of)),
        float(np.exp(x.max() - x.min())),
        envelope(u, constants),
    )


def ratio(
    first: Sequence[float], second: Sequence[float], *, num_resamples: int = 2000, seed: int = 0
) -> Quantity:
    """Geometric mean of first / second over a path, with its interval."""
    z = np.log(np.asarray(first, dtype=np.float64)) - np.log(np.asarray(second, dtype=np.float64))
    if len(z) < MIN_POINTS:
        return Quantity(math.exp(z.mean()), None, None)
    length, factor = _dependence(z - z.mean())
    counts = _block_counts(len(z), length, num_resamples, seed)
    means = counts @ z / counts.sum(axis=1)
    return _exponential(_quantity(float(z.mean()), means, factor))


def envelope(u: Sequence[float], constants: Sequence[float]) -> tuple[float, float]:
    """(L0, L1) ≥ 0 with L0 + L1 u_i ≥ ℓ_i for all i and the least Σ (L0 + L1 u_i)."""
    from scipy.optimize import linprog

    x, z = np.asarray(u, dtype=np.float64), np.asarray(constants, dtype=np.float64)
    # In units of the means, so that the solver's tolerances are relative.
    a, b = x / x.mean(), z / z.mean()
    found = linprog(
        [len(a), a.sum()],
        A_ub=np.column_stack([-np.ones_like(a), -a]),
        b_ub=-b,
        bounds=[(0, None), (0, None)],
        method="highs",
    )
    constant, slope = np.asarray(found.x)
    # What the solver's tolerance left below a point.
    excess = max(1.0, float(np.max(b / (constant + slope * a))))
    return (
        float(excess * constant * z.mean()),
        float(excess * slope * z.mean() / x.mean()),
    )


def autocorrelation(residuals: Array) -> float:
    """First autocorrelation ρ of some residuals, in [0, 0.95], with the bias of a fit taken off.

    Residuals of a line look less dependent than the noise is, by about (2 + 4ρ) / n.
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
    """Factor of the percentiles' distance from the estimate.

    The square root of an AR(1)'s long-run variance (1 + ρ) / (1 − ρ) over the part of it that
    blocks of b see, 1 + 2 Σ_{k<b} (1 − k/b) ρᵏ; times Student's over the normal quantile, with the
    n (1 − ρ) / (1 + ρ) − 2 degrees of freedom that are left.
    """
    from scipy.stats import norm, t

    lags = np.arange(1, length)
    seen = 1 + 2 * float(np.sum((1 - lags / length) * rho**lags))
    whole = (1 + rho) / (1 - rho)
    freedom = max(2.0, num / whole - 2)
    tail = 0.5 + _CONFIDENCE / 2
    return math.sqrt(whole / seen) * float(t.ppf(tail, freedom) / norm.ppf(tail))


def _dependence(residuals: Array) -> tuple[int, float]:
    rho, num = autocorrelation(residuals), len(residuals)
    length = block_length(rho, num)
    return length, widening(rho, num, length)


def _block_counts(num: int, length: int, num_resamples: int, seed: int) -> Array:
    """How often each point is in each resample, [resamples, n]."""
    rng = np.random.default_rng(seed)
    starts = rng.integers(0, num - length + 1, size=(num_resamples, -(-num // length)))
    drawn = (starts[:, :, None] + np.arange(length)).reshape(num_resamples, -1)[:, :num]
    places = drawn + num * np.arange(num_resamples)[:, None]
    counts = np.bincount(places.ravel(), minlength=num * num_resamples)
    return counts.reshape(num_resamples, num).astype(np.float64)


def _power(x: Array, z: Array, counts: Array) -> tuple[Array, Array]:
    """Weighted least squares of z = a + p x; arrays of one entry a row of counts."""
    weight = counts.sum(axis=1)
    mean_x, mean_z = counts @ x / weight, counts @ z / weight
    covariance = counts @ (x * z) / weight - mean_x * mean_z
    variance = counts @ (x * x) / weight - mean_x**2
    slope = np.divide(covariance, variance, out=np.zeros_like(variance), where=variance > 1e-24)
    return mean_z - slope * mean_x, slope


def _linear(x: Array, z: Array, counts: Array) -> tuple[Array, Array, Array]:
    """Log A, s and error of z = log A + log(1 − s + s eˣ), one entry a row of counts."""
    shape = np.log((1 - _SHARES)[:, None] + _SHARES[:, None] * np.exp(x))  # [shares, n]
    rest = z - shape
    weight = counts.sum(axis=1, keepdims=True)
    mean, square = counts @ rest.T / weight, counts @ (rest**2).T / weight
    variance = square - mean**2
    best = np.argmin(variance, axis=1)
    share = _refined(variance, best)
    row = np.arange(len(best))
    # A belongs to the refined share; its value on the grid's neighbours is interpolated.
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
    """The minimum of a parabola through the best share and its neighbours; bounds stay."""
    share = _SHARES[best].copy()
    inner = (best > 0) & (best < len(_SHARES) - 1)
    rows = np.flatnonzero(inner)
    if not len(rows):
        return share
    i = best[rows]
    a, b, c = _SHARES[i - 1], _SHARES[i], _SHARES[i + 1]
    fa, fb, fc = variance[rows, i - 1], variance[rows, i], variance[rows, i + 1]
    upper = (b - a) ** 2 * (fb - fc) - (b - c) ** 2 * (fb - fa)
    lower = (b - a) * (fb - fc) - (b - c) * (fb - fa)
    moved = np.divide(upper, 2 * lower, out=np.zeros_like(upper), where=np.abs(lower) > 1e-300)
    share[rows] = np.clip(b - moved, a, c)
    return share


def _quantity(value: float, resampled: Array | None, factor: float) -> Quantity:
    if resampled is None:
        return Quantity(value, None, None)
    tail = (1 - _CONFIDENCE) / 2
    low, high = np.quantile(resampled, [tail, 1 - tail])
    return Quantity(
        value,
        min(value, value - factor * (value - float(low))),
        max(value, value + factor * (float(high) - value)),
    )


def _exponential(quantity: Quantity) -> Quantity:
    """Of a number whose logarithm was fitted."""
    low, high = quantity.low, quantity.high
    return Quantity(
        math.exp(quantity.value),
        None if low is None else math.exp(max(low, -700.0)),  # e^±700 is as far as floats go
        None if high is None else math.exp(min(high, 700.0)),
    )


def _clipped(quantity: Quantity, low: float, high: float) -> Quantity:
    if quantity.low is None or quantity.high is None:
        return quantity
    return Quantity(quantity.value, max(low, quantity.low), min(high, quantity.high))
