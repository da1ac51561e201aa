"""Tuned values, exponents and ratios, with intervals from resampled seeds.

A cell has values [T, rates, seeds]. A resample of the seeds gives mean values [T, rates]. For every
T, the rate with the smallest mean is the tuned one. A parabola through it and its neighbours
refines it on logarithmic scales. Each resample is tuned anew, so the intervals include the
uncertainty of tuning. All cells resample the same seeds together, so what a seed shares between
cells (orders, directions) stays paired.

An exponent is a least-squares slope on logarithmic scales. Power laws hold only in the limit.
Therefore two fits are made, over the whole window and over its upper half, and the reported
interval covers both 95% intervals. It widens if the local exponent drifts.

References:
    Efron, Tibshirani, An Introduction to the Bootstrap, 1993: percentile intervals.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np

from zofo.statistics.resampling import Interval

NUM_RESAMPLES: Final = 1_000
LEVEL: Final = 0.95
_HUGE: Final = 1e200
"""Replaces infinity in means, which would otherwise become NaN."""


def resamples(num_seeds: int, num: int = NUM_RESAMPLES) -> np.ndarray:
    """Weights of the seeds: [seeds, 1 + num]. The first column weights all seeds equally."""
    generator = np.random.default_rng(20240406)
    picks = generator.integers(num_seeds, size=(num, num_seeds))
    counts = np.stack([np.bincount(row, minlength=num_seeds) for row in picks], axis=1)
    return np.concatenate((np.ones((num_seeds, 1)), counts), axis=1) / num_seeds


def means(values: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Weighted means over the seeds: [..., seeds] -> [..., resamples]."""
    return np.where(np.isfinite(values), values, _HUGE) @ weights


@dataclass(frozen=True)
class Tuned:
    """The best result over the rates.

    Attributes:
        log_value: logarithm of the tuned value, [T, resamples].
        log_rate: logarithm of its rate, [T, resamples].
        is_inside: whether the best rate of the mean over all seeds lies inside the grid, [T].
    """

    log_value: np.ndarray
    log_rate: np.ndarray
    is_inside: np.ndarray


def tune(values: np.ndarray, rates: np.ndarray, weights: np.ndarray) -> Tuned:
    """Find the best result over a grid of rates.

    Args:
        values: [T, rates, seeds].
        rates: [rates], ascending, evenly spaced in logarithm.
        weights: as from `resamples`.
    """
    logs = np.log(means(values, weights))  # [T, rates, resamples]
    num = logs.shape[1]
    best = logs.argmin(axis=1)
    inside = np.clip(best, 1, num - 2)  # so that both neighbours exist, [T, resamples]
    below, here, above = (
        np.take_along_axis(logs, (inside + k)[:, None], axis=1)[:, 0] for k in (-1, 0, 1)
    )
    # The vertex of the parabola through three neighbouring rates, if the best rate is inside the
    # grid and the parabola opens upwards.
    bend = below - 2 * here + above
    usable = (bend > 1e-12) & (best == inside) & (above < np.log(_HUGE) / 2)
    shift = np.where(usable, 0.5 * (below - above) / np.where(usable, bend, 1.0), 0.0)
    shift = np.clip(shift, -0.5, 0.5)
    refined = here - 0.25 * (below - above) * shift  # the height of the parabola at its vertex
    log_rates = np.log(rates)
    spacing = log_rates[1] - log_rates[0]
    coarse = np.take_along_axis(logs, best[:, None], axis=1)[:, 0]
    return Tuned(
        np.where(usable, refined, coarse),
        log_rates[best] + np.where(usable, shift, 0.0) * spacing,
        (best[:, 0] > 0) & (best[:, 0] < num - 1),
    )


def at_rates(
    values: np.ndarray, rates: np.ndarray, wanted: np.ndarray, weights: np.ndarray
) -> np.ndarray:
    """Log values at given rates, interpolated on the grid: [T, resamples].

    Args:
        values: [T, rates, seeds].
        rates: [rates].
        wanted: one rate per T; a rate outside the grid gives NaN.
        weights: as from `resamples`.
    """
    logs, log_rates = np.log(means(values, weights)), np.log(rates)
    out = np.full((len(values), weights.shape[1]), np.nan)
    for t, rate in enumerate(np.log(wanted)):
        place = (rate - log_rates[0]) / (log_rates[1] - log_rates[0])
        if -1e-9 <= place <= len(rates) - 1 + 1e-9:  # rounding may move an end of the grid out
            i = int(np.clip(np.floor(place), 0, len(rates) - 2))
            share = place - i
            out[t] = (1 - share) * logs[t, i] + share * logs[t, i + 1]
    return out


def slopes(log_x: np.ndarray, log_y: np.ndarray) -> np.ndarray:
    """Least-squares slopes: log_x [points], log_y [points, resamples] -> [resamples]."""
    centred = log_x - log_x.mean()
    return np.asarray(centred @ (log_y - log_y.mean(0)) / (centred @ centred))


def interval(samples: np.ndarray, note: str = "") -> Interval:
    """The interval of resampled values. The first value is that of the sample itself."""
    tail = 50 * (1 - LEVEL)
    low, high = np.percentile(samples[1:], (tail, 100 - tail))
    return Interval(float(samples[0]), float(low), float(high), note)


def exponent(x: Sequence[float] | np.ndarray, log_y: np.ndarray, note: str = "") -> Interval:
    """The exponent of a power law, over the window and over its upper half.

    Args:
        x: abscissae, ascending, at least three.
        log_y: [points, resamples].
        note: the note of the resulting interval.
    """
    log_x = np.log(np.asarray(x, dtype=np.float64))
    whole = interval(slopes(log_x, log_y))
    # A slope needs two points, so a short window has the last two as its upper half.
    half = len(log_x) // 2 if len(log_x) >= 5 else len(log_x) - 2
    upper = interval(slopes(log_x[half:], log_y[half:]))
    if not np.isfinite([whole.low, whole.high, upper.low, upper.high]).all():
        return Interval(float("nan"), -np.inf, np.inf, note or "not measured within the grid")
    return Interval(whole.value, min(whole.low, upper.low), max(whole.high, upper.high), note)
