"""Epochs to a target, which decide between the two forms of the second cap, √(T n) and √T n."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Final

import numpy as np

from zofo.convergence.fits import at_rates, exponent, interval
from zofo.convergence.measures import Measured, Study, series_of, values_of
from zofo.statistics.resampling import Interval

_SHARE: Final = 0.25
"""A choice: c belongs to this share of the best rate."""


def epochs_to(x: np.ndarray, log_values: np.ndarray, log_target: np.ndarray | float) -> np.ndarray:
    """Logarithm of the T at which values first fall to a target, interpolated: [resamples].

    Args:
        x: T, ascending.
        log_values: [T, resamples].
        log_target: logarithm of ε², one for all or one per resample.

    Returns:
        log T; NaN if the target is not reached, or is reached before the first T.
    """
    log_x = np.log(x.astype(np.float64))
    out = np.full(log_values.shape[1], np.nan)
    targets = np.broadcast_to(log_target, out.shape)
    for b in range(len(out)):
        column = log_values[:, b]
        below = np.flatnonzero(column <= targets[b])
        # Interpolate logarithms between the first T below the target and the one before it.
        if len(below) and below[0] > 0:
            i = below[0]
            share = (column[i - 1] - targets[b]) / (column[i - 1] - column[i])
            out[b] = log_x[i - 1] + share * (log_x[i] - log_x[i - 1])
    return out


def epochs_under_cap(
    study: Study,
    *,
    experiment: str,
    where: Mapping[str, Any],
    power: float,
    calibrated: int = -3,
    target: int = -2,
    name: str,
) -> Measured:
    """Exponent in n of the epochs to ε, with rates c / (√T n^power).

    `power` is 1/2 for the form √(T n) and 1 for √T n. c is a quarter of the best value for the
    smallest n at the checkpoint `calibrated`. At such rates the distance to go decides, and neither
    form of the cap is at a disadvantage. ε² is what the smallest n reaches at the checkpoint
    `target`.
    """
    results = study.find(experiment, where)
    smallest = results[0]
    num_0 = float(smallest.cell.labels["n"])
    rate_0 = float(np.exp(study.tuned(smallest, "all").log_rate[calibrated, 0]))
    c = _SHARE * rate_0 * float(smallest.checkpoints[calibrated]) ** 0.5 * num_0**power
    rows, xs, log_target = [], [], None
    for result in results:
        num, x = float(result.cell.labels["n"]), result.checkpoints
        log_values = at_rates(
            values_of(result, "all"),
            result.arrays["rates"][:, 0],
            c / (x**0.5 * num**power),
            study.weights(result),
        )
        if log_target is None:  # the smallest n comes first and sets the target
            log_target = float(log_values[target, 0])
        rows.append(epochs_to(x, log_values, log_target))
        xs.append(num)
    log_y = np.stack(rows)
    return Measured(exponent(xs, log_y), [series_of(name, xs, log_y)], "samples n", "epochs to ε")


def predicted_epochs(
    study: Study,
    *,
    experiment: str,
    where: Mapping[str, Any],
    constant: Callable[[Mapping[str, Any]], float],
) -> Measured:
    """Measured epochs to ε divided by the prediction T = C / (n ε⁴), for every n and ε.

    `constant` gives C from a cell's options. ε² is the tuned value at the last T, so the last T is
    the measured number of epochs. The interval covers those of all cells.
    """
    xs, rows = [], []
    for result in study.find(experiment, where):
        num = float(result.cell.labels["n"])
        tuned = study.tuned(result, "all")
        predicted = np.log(constant(result.cell.options)) - np.log(num) - 2 * tuned.log_value[-1]
        xs.append(num)
        rows.append(np.log(result.checkpoints[-1]) - predicted)
    ends = [interval(np.exp(row)) for row in rows]
    middle = float(np.exp(np.mean([row[0] for row in rows])))
    found = Interval(middle, min(e.low for e in ends), max(e.high for e in ends))
    return Measured(
        found,
        [series_of("measured over predicted", xs, np.stack(rows))],
        "samples n",
        "epochs to ε, measured over predicted",
        is_power=False,
    )
