"""From moments to the learning rate of a zeroth-order block and its progress: pure functions.

One step x ← x − η s v with s = v·g_B of a batch of b rows, E vvᵀ = I:

    E f(x⁺) − f = −η G + ½ η² A             G = ‖∇f‖²
    A = E[s² vᵀHv] = E‖g_B‖² · τ            τ = tr H + 2 κ,  κ = gᵀHg / ‖g‖²  (Gaussian)
    E‖g_B‖² = E s² = G + S / b              S = variance of a row's gradient, summed over weights

For random signs τ is smaller by 2 Σ H_ii g_i² / ‖g‖². With K directions A becomes A_K = E‖g_B‖²
τ_K, where τ_K = τ / K + (1 − 1/K) κ. The best rate for a single step is η = G / A_K.

If the rows of the batch share D directions in turn, each direction meets b / D rows only. More
directions then average the gradient over directions, and do not average the noise of the rows more:

    A = G τ_D + (S / b) τ

This is the form above with K = D, if the noise S / b is multiplied by τ / τ_D.

Over N steps at a constant rate, the gradient shrinks and the noise stays. We assume G ∝ f, the
worst case of a Polyak–Łojasiewicz function with minimum 0. The loss then follows

    f_N = f_∞ + (f_0 − f_∞) e^{−aN},   a = (η G − ½ η² G τ_K) / f_0,   f_∞ = ½ η² (S / b) τ_K / a

The advised η minimises f_N. It uses the upper end of the 80% one-sided interval of τ, so that an
uncertain or negative curvature does not lead to a large rate. It uses G = 0 unless the lower end of
the interval of G is positive. This is a model for choosing a number, not a theorem: the true
minimum is above 0.

The loss does not show which weights later training needs. The steps are a random walk of size η √(N
E s² / K) per weight. Relative to the size of the weights, this is the noise added to every layer.
It is kept below `FAR`, or below `NEAR` if no signal was found.

Stability is exact. On f = ½ xᵀHx with eigenvalues λ ≥ 0 and no noise, the second moments m_i = E
x_i² along the eigenvectors obey, for K Gaussian directions,

    m_i ← (1 − 2ηλ_i + (1 + 1/K) η²λ_i²) m_i + (η²/K) Σ_j λ_j² m_j

which is a diagonal matrix plus a matrix of rank one. All m with λ_i > 0, and so f, converge to 0 if
and only if every (K + 1) ηλ_i < 2K and

    Σ_i ηλ_i / (2K − (K + 1) ηλ_i) < 1

A sufficient condition is η (tr H / K + (1 + 1/K) λ_max) < 2; for K = 1, η (tr H + 2 λ_max) < 2. For
K = 1, random signs and a diagonal H, the exact condition is η tr H < 2. For random signs and any
other H the Gaussian condition suffices, because E vvᵀMvvᵀ = 2M + tr(M) I − 2 diag(M) lies below the
Gaussian value.

References:
    Nesterov and Spokoiny, "Random Gradient-Free Minimization of Convex Functions", 2017 (the second
    moment of the estimate). The recursion and its condition are derived here.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np

from zofo.advice.moments import CAUTION, Moments
from zofo.statistics.resampling import Interval, interval, quantile

HARMLESS: Final = 0.01
"""Share of the loss that noise may add over the run if no signal was found."""
FAR: Final = 0.5
"""A choice: how far pretrained weights may move over the run relative to their size, with a signal.
"""
NEAR: Final = 0.02
"""A choice: how far without a signal. One case led to it: MiniLM with a fresh head, which does not
use the features yet, so the loss does not show damage to them."""
_NUM_RATES: Final = 241
_DECADES: Final = 4


def bend(
    trace: float | np.ndarray,
    rayleigh: float | np.ndarray,
    num_directions: float | np.ndarray = 1,
) -> float | np.ndarray:
    """τ_K: the curvature that a step of K directions meets, relative to E‖g_B‖²."""
    share = 1 / num_directions
    return np.maximum((trace + 2 * rayleigh) * share + (1 - share) * rayleigh, 0.0)


def noise_per_step(
    row_noise: float | np.ndarray,
    batch_rows: int,
    *,
    trace: float | np.ndarray,
    rayleigh: float | np.ndarray,
    num_directions: int = 1,
    by_rows: bool = False,
) -> float | np.ndarray:
    """S / b, for directions that rows share multiplied by τ / τ_D.

    Args:
        row_noise: S.
        batch_rows: b.
        trace: tr H.
        rayleigh: κ.
        num_directions: K or D.
        by_rows: whether rows share the directions.
    """
    noise = row_noise / batch_rows
    if not by_rows or num_directions == 1:
        return noise
    shared = np.maximum(bend(trace, rayleigh, num_directions), 1e-30)
    return noise * np.maximum(bend(trace, rayleigh) / shared, 1.0)


def decrease(
    rate: float | np.ndarray,
    *,
    signal: float | np.ndarray,
    noise: float | np.ndarray,
    curvature: float | np.ndarray,
) -> float | np.ndarray:
    """Expected decrease of the loss by one step: η G − ½ η² (G + S/b) τ_K.

    Args:
        rate: η.
        signal: G.
        noise: S / b, from `noise_per_step`.
        curvature: τ_K.
    """
    return rate * signal - 0.5 * np.square(rate) * (np.maximum(signal, 0) + noise) * curvature


def loss_after(
    rate: float | np.ndarray,
    num_steps: int,
    *,
    loss: float,
    signal: float | np.ndarray,
    noise: float | np.ndarray,
    curvature: float | np.ndarray,
) -> np.ndarray:
    """f_N of the model in the module's docstring; the arguments of `decrease` broadcast.

    An unbiased estimate of a small signal may be negative. A negative signal counts as none.
    """
    signal = np.maximum(signal, 0.0)
    scale = max(loss, 1e-12)
    rise = 0.5 * np.square(rate) * noise * curvature
    pull = (rate * signal - 0.5 * np.square(rate) * signal * curvature) / scale
    exponent = np.clip(-pull * num_steps, -700, 50)  # keeps the exponential within float64
    with np.errstate(divide="ignore", invalid="ignore"):
        # Σ_{t<N} e^{−at}, as an integral: (1 − e^{−aN}) / a, and N for a = 0.
        gathered = np.where(np.abs(exponent) < 1e-9, num_steps, -np.expm1(exponent) / pull)
    return np.asarray(loss * np.exp(exponent) + rise * gathered)


def best_constant_rate(
    num_steps: int, *, loss: float, signal: float, noise: float, curvature: float
) -> float:
    """The constant rate that minimises f_N, at most the best rate for a single step.

    Args:
        num_steps: N ≥ 1.
        loss: f_0.
        signal: G. If it is 0, the result is the rate at which noise adds `HARMLESS` of the loss.
        noise: S / b.
        curvature: τ_K > 0.
    """
    if signal <= 0:
        return math.sqrt(2 * HARMLESS * max(loss, 1e-12) / (num_steps * noise * curvature))
    top = signal / ((signal + noise) * curvature)  # the best rate for one step
    rates = top * np.logspace(-_DECADES, 0, _NUM_RATES)
    after = loss_after(rates, num_steps, loss=loss, signal=signal, noise=noise, curvature=curvature)
    return float(rates[int(np.argmin(after))])


def is_stable(rate: float, eigenvalues: Sequence[float], num_directions: int = 1) -> bool:
    """Whether zeroth-order SGD with Gaussian directions contracts on ½ xᵀHx in mean square (exact).

    Args:
        rate: η.
        eigenvalues: eigenvalues of H, at least 0.
        num_directions: K.
    """
    step = rate * np.asarray(eigenvalues, dtype=float)
    room = 2 * num_directions - (num_directions + 1) * step
    return bool((room > 0).all() and (step / room).sum() < 1)


def stable_rate(trace: float, largest: float, num_directions: int = 1) -> float:
    """A rate below which `is_stable` holds: η (tr H / K + (1 + 1/K) λ_max) < 2."""
    share = 1 / num_directions
    bound = trace * share + (1 + share) * largest
    return 2 / bound if bound > 0 else math.inf


@dataclass(frozen=True)
class ZerothRate:
    """The learning rate of a zeroth-order block.

    Attributes:
        rate: the advised rate.
        one_step: best rate for one step; infinite if the curvature is not measurably positive.
        stable: half of the stable rate. It is halved because curvature may grow during training.
        reach: the rate at which the largest measured step leaves the measured range.
        drift: the rate at which the weights move as far as allowed; infinite for fresh weights.
        limited_by: "horizon", "stability", "reach", "drift", or "no signal".
        signal: the G that was used: 0 unless it is measurably positive.
        curvature: the τ_K that was used.
        noise: S / b.
        decrease: expected decrease of the loss by the first step.
        progress: expected decrease of the loss over the horizon.
        num_steps: the horizon.
        loss: the loss at the start of the horizon.
    """

    rate: float
    one_step: float
    stable: float
    reach: float
    drift: float
    limited_by: str
    signal: float
    curvature: float
    noise: float
    decrease: Interval
    progress: Interval
    num_steps: int
    loss: float


def zeroth_rate(
    found: Moments,
    *,
    batch_rows: int,
    num_steps: int,
    trusted_to: float,
    num_directions: int = 1,
    by_rows: bool = False,
    pretrained_scale: float = 0.0,
) -> ZerothRate:
    """The rate of a block from its moments.

    Args:
        found: the moments.
        batch_rows: b, the rows on which a step's difference is taken.
        num_steps: updates of the block in the run.
        trusted_to: distance along a direction up to which the loss was measured to be a parabola.
        num_directions: K, or D with `by_rows`.
        by_rows: whether the rows of a batch share the directions in turn.
        pretrained_scale: root mean square of pretrained weights; 0 for fresh weights.
    """
    replicates = found.replicates
    bends = np.asarray(bend(replicates[:, 2], replicates[:, 3], num_directions))
    signal = found.sure_signal
    noises = noise_per_step(
        replicates[:, 1],
        batch_rows,
        trace=replicates[:, 2],
        rayleigh=replicates[:, 3],
        num_directions=num_directions,
        by_rows=by_rows,
    )
    noise = float(np.asarray(noises)[0])
    # The upper end of the interval guards against a curvature that was underestimated.
    curvature = quantile(bends, CAUTION, found.num)
    curvature = max(curvature, float(bends[0]), 1e-30)
    stable = 0.5 * stable_rate(found.careful_trace, found.careful_largest, num_directions)
    reach = trusted_to / found.largest_slope if found.largest_slope > 0 else math.inf
    wanted = best_constant_rate(
        num_steps, loss=found.loss, signal=signal, noise=max(noise, 1e-30), curvature=curvature
    )
    size = max(found.signal, 0.0) + noise
    # Mean square of the estimate for one weight: E s² / K, or the mean of the rows' if they share.
    row_noise = found.row_noise / batch_rows
    square = max(found.signal, 0.0) / num_directions
    square += row_noise if by_rows else row_noise / num_directions
    drift = math.inf
    # After N steps of a random walk a weight has moved η √(N E ĝ²).
    if pretrained_scale > 0 and size > 0:
        allowed = (FAR if signal > 0 else NEAR) * pretrained_scale
        drift = allowed / math.sqrt(num_steps * square)
    if found.largest_slope == 0:  # no direction changes the loss, so no rate lowers it
        wanted = 0.0
    limits = {"no signal" if signal <= 0 else "horizon": wanted}
    limits |= {"stability": stable, "reach": reach, "drift": drift}
    limited_by = min(limits, key=lambda name: limits[name])
    rate = limits[limited_by]
    one_step = 0.0
    if size > 0 and found.signal > 0:
        one_step = found.signal / (size * curvature) if curvature > 1e-30 else math.inf
    by_replicate = {
        "signal": replicates[:, 0],
        "noise": noises,
        "curvature": bends,
    }
    gains = np.asarray(decrease(rate, **by_replicate))
    return ZerothRate(
        rate=rate,
        one_step=one_step,
        stable=stable,
        reach=reach,
        drift=drift,
        limited_by=limited_by,
        signal=signal,
        curvature=curvature,
        noise=noise,
        decrease=interval(float(gains[0]), gains, found.num),
        progress=progress_at(
            found,
            rate,
            batch_rows=batch_rows,
            num_steps=num_steps,
            num_directions=num_directions,
            by_rows=by_rows,
        ),
        num_steps=num_steps,
        loss=found.loss,
    )


def compromise(points: Sequence[tuple[Moments, ZerothRate]]) -> float:
    """One rate for a run that passes through several points.

    It minimises the mean of f_N / f_0 over the points, each with its own signal, noise and careful
    curvature. It exceeds neither a stable rate, reach or drift of any point, nor the largest of
    their own rates. Without signal at every point it is the smallest of these.

    Args:
        points: moments, each with the rate that follows from it.
    """
    ends = (min(z.stable, z.reach, z.drift) for _, z in points)
    top = min(max(z.rate for _, z in points), *ends)
    if all(z.signal <= 0 for _, z in points) or top <= 0:
        return min(top, *(z.rate for _, z in points))
    rates = top * np.logspace(-_DECADES, 0, _NUM_RATES)
    left = np.zeros_like(rates)
    for found, z in points:
        after = loss_after(
            rates,
            z.num_steps,
            loss=found.loss,
            signal=z.signal,
            noise=z.noise,
            curvature=z.curvature,
        )
        left += after / max(found.loss, 1e-12)
    return float(rates[int(np.argmin(left))])


def progress_at(
    found: Moments,
    rate: float,
    *,
    batch_rows: int,
    num_steps: int,
    num_directions: int = 1,
    by_rows: bool = False,
) -> Interval:
    """Expected decrease of the loss over a run at a given rate, with its interval."""
    replicates = found.replicates
    trace, rayleigh = replicates[:, 2], replicates[:, 3]
    after = loss_after(
        rate,
        num_steps,
        loss=found.loss,
        signal=replicates[:, 0],
        noise=noise_per_step(
            replicates[:, 1],
            batch_rows,
            trace=trace,
            rayleigh=rayleigh,
            num_directions=num_directions,
            by_rows=by_rows,
        ),
        curvature=bend(trace, rayleigh, num_directions),
    )
    values = found.loss - after  # [resamples]
    return interval(float(values[0]), values, found.num)
