"""Numbers computed from finished cells: exponents, caps and ratios.

Every measure takes the study, the name of an experiment and the labels that its cells must have
(`where`). It returns one `Measured`: a number with its interval, and the points of its figure.
`value` is the tuned (1/T) Σ ‖∇f‖², `rate` is the rate that gives it, and `cap` is the largest rate
at which runs do not diverge. `part` is the part of the gradient: "all", "x", "y", or "last" for the
whole gradient at the end. `name` is the name in the legend, `x_title` the title of the abscissa.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Final

import numpy as np

from zofo.convergence.cells import Result
from zofo.convergence.fits import Tuned, exponent, interval, means, resamples, tune
from zofo.statistics.resampling import Interval

_DIVERGED: Final = 10.0
"""A run counts as diverged if its mean ‖∇f‖² exceeds this many times that of the start."""
AT_EDGE: Final = "the best rate lies at the end of the grid"


@dataclass(frozen=True)
class Series:
    """Points of a figure.

    Attributes:
        name: name in the legend.
        x, y: points.
        low, high: their 95% intervals.
    """

    name: str
    x: list[float]
    y: list[float]
    low: list[float]
    high: list[float]


@dataclass(frozen=True)
class Measured:
    """A number and the points that it was computed from.

    Attributes:
        interval: the number with its interval.
        series: the points.
        x_title, y_title: titles of the axes.
        is_power: whether the number is the slope of the first series on logarithmic axes.
    """

    interval: Interval
    series: list[Series]
    x_title: str
    y_title: str
    is_power: bool = True


@dataclass
class Study:
    """The finished cells of a study."""

    results: list[Result]
    _weights: dict[int, np.ndarray] = field(default_factory=dict)

    def find(self, experiment: str, where: Mapping[str, Any]) -> list[Result]:
        """Cells of an experiment with these labels, in the order of the table."""
        return [
            r
            for r in self.results
            if r.cell.experiment == experiment
            and all(r.cell.labels.get(key) == value for key, value in where.items())
        ]

    def one(self, experiment: str, where: Mapping[str, Any]) -> Result:
        """The only cell of an experiment with these labels."""
        found = self.find(experiment, where)
        assert len(found) == 1, f"{experiment} {dict(where)}: {len(found)} cells"
        return found[0]

    def weights(self, result: Result) -> np.ndarray:
        """Resamples of the seeds. Cells with equally many seeds share them."""
        num = result.cell.num_seeds
        if num not in self._weights:
            self._weights[num] = resamples(num)
        return self._weights[num]

    def tuned(self, result: Result, part: str) -> Tuned:
        """Tuned values of a cell whose rates form one line."""
        key = ("tuned", part)
        if key not in result.cache:
            rates = result.arrays["rates"]
            column = 1 if part == "y" else 0
            result.cache[key] = tune(
                values_of(result, part), rates[:, column], self.weights(result)
            )
        return result.cache[key]


def values_of(result: Result, part: str) -> np.ndarray:
    """[T, rates, seeds] of "all", "x", "y" (running means) or "last"."""
    if part == "all":
        return np.asarray(result.arrays["mean_x"] + result.arrays["mean_y"])
    return result.arrays["last" if part == "last" else f"mean_{part}"]


def series_of(name: str, x: Sequence[float] | np.ndarray, log_y: np.ndarray) -> Series:
    """Points with intervals from log_y, [points, resamples]."""
    ends = [interval(row) for row in np.exp(log_y)]
    return Series(
        name,
        [float(v) for v in x],
        [e.value for e in ends],
        [e.low for e in ends],
        [e.high for e in ends],
    )


_TITLES: Final = {
    "value": "(1/T) Σ ‖∇f‖², best rate",
    "rate": "best rate",
    "cap": "largest rate that does not diverge",
}


def in_epochs(
    study: Study,
    *,
    experiment: str,
    where: Mapping[str, Any],
    of: str = "value",
    part: str = "all",
    last: int = 6,
) -> Measured:
    """Exponent in T of the best value or rate of one cell, over its last checkpoints."""
    result = study.one(experiment, where)
    tuned = study.tuned(result, part)
    window = slice(-last, None)
    log_y = tuned.log_value if of == "value" else tuned.log_rate
    note = "" if tuned.is_inside[window].all() else AT_EDGE
    x = result.checkpoints
    return Measured(
        exponent(x[window], log_y[window], note),
        [series_of("measured", x, log_y)],
        "epochs T",
        "‖∇f‖² after T epochs, best rate" if part == "last" else _TITLES[of],
    )


def across(
    study: Study,
    *,
    experiment: str,
    where: Mapping[str, Any],
    label: str,
    of: str = "value",
    part: str = "all",
    per: Callable[[float], float] | None = None,
    x_title: str = "",
) -> Measured:
    """Exponent in a label (n, d_x, ...) of the tuned value, rate or cap (`of`) at the last T.

    `per` gives the abscissa as a function of the label. The interval of a cap's exponent is widened
    by the spacing of the grid.
    """
    rows, xs, inside = [], [], True
    for result in study.find(experiment, where):
        label_value = float(result.cell.labels[label])
        xs.append(per(label_value) if per is not None else label_value)
        if of == "cap":
            rows.append(log_cap(result, study.weights(result), part))
            inside &= bool(np.isfinite(rows[-1]).all())
        else:
            tuned = study.tuned(result, part)
            rows.append((tuned.log_value if of == "value" else tuned.log_rate)[-1])
            inside &= bool(tuned.is_inside[-1])
    log_y = np.stack(rows)
    found = exponent(xs, log_y, "" if inside else AT_EDGE)
    if of == "cap":
        # The grid limits the precision of each cap to half a step, even if all seeds agree.
        step = float(np.diff(np.log(result.arrays["rates"][:2, 0]))[0])
        slack = step / abs(np.log(xs[-1] / xs[0]))
        found = replace(found, low=found.low - slack, high=found.high + slack)
    return Measured(found, [series_of("measured", xs, log_y)], x_title or label, _TITLES[of])


def log_cap(result: Result, weights: np.ndarray, part: str = "x") -> np.ndarray:
    """Logarithm of the largest rate at which runs do not diverge, mean over seeds: [resamples].

    The cap of a seed is the geometric mean of the first diverging rate and the rate before it. It
    is NaN if none or all of the rates diverge.
    """
    start = result.arrays["start"]
    reference = start[0] if part == "x" else start[1] if part == "y" else start.sum()
    # `not <` counts NaN as diverged too, [rates, seeds].
    is_lost = ~(values_of(result, part)[-1] < _DIVERGED * reference)
    log_rates = np.log(result.arrays["rates"][:, 1 if part == "y" else 0])
    # `argmax` finds the first True: the first diverging rate, [seeds].
    first = np.where(is_lost.any(0), is_lost.argmax(0), 0)
    middle = np.where(first > 0, 0.5 * (log_rates[first] + log_rates[first - 1]), np.nan)
    return np.asarray(middle @ weights)


def ratio(
    study: Study,
    *,
    experiment: str,
    first: Mapping[str, Any],
    second: Mapping[str, Any],
    part: str = "all",
    name: str = "measured",
) -> Measured:
    """Tuned value of one cell divided by that of another, at the last T."""
    results = [study.one(experiment, where) for where in (first, second)]
    tuned = [study.tuned(result, part) for result in results]  # both share the resamples
    logs = tuned[0].log_value - tuned[1].log_value
    inside = all(t.is_inside[-1] for t in tuned)
    return Measured(
        interval(np.exp(logs[-1]), "" if inside else AT_EDGE),
        [series_of(name, results[0].checkpoints, logs)],
        "epochs T",
        "ratio of tuned values",
        is_power=False,
    )


def one_rate(study: Study, *, experiment: str, where: Mapping[str, Any]) -> Measured:
    """Best value with η_x = η_y divided by the best value with two rates, on one grid of pairs."""
    result = study.one(experiment, where)
    rates = result.arrays["rates"]
    logs = np.log(means(values_of(result, "all"), study.weights(result)))
    is_one = np.isclose(rates[:, 0], rates[:, 1])
    gain = logs[:, is_one].min(1) - logs.min(1)  # [T, resamples]
    best = rates[logs[-1, :, 0].argmin()]  # the best pair at the last T, by the mean over all seeds
    on_edge = bool(((best == rates.min(0)) | (best == rates.max(0))).any())
    return Measured(
        interval(np.exp(gain[-1]), AT_EDGE if on_edge else ""),
        [series_of("one rate over two", result.checkpoints, gain)],
        "epochs T",
        "value with one rate / value with two",
        is_power=False,
    )


def lost_with_one_rate(study: Study, *, experiment: str, where: Mapping[str, Any]) -> Measured:
    """Share of seeds that diverge if both blocks take the adapter's best rate."""
    result = study.one(experiment, where)
    rates, weights = result.arrays["rates"], study.weights(result)
    logs = np.log(means(values_of(result, "all")[-1], weights))
    best_y = rates[logs[:, 0].argmin(), 1]
    pair = int(np.flatnonzero(np.isclose(rates, best_y).all(1))[0])
    start = result.arrays["start"].sum()
    # `not <` also counts NaN as diverged.
    is_lost = ~(values_of(result, "all")[-1, pair] < _DIVERGED * start)  # [seeds]
    share = interval(is_lost.astype(np.float64) @ weights)
    return Measured(
        share,
        [Series("share", [float(best_y)], [share.value], [share.low], [share.high])],
        "the adapter's best rate, taken for both blocks",
        "share of seeds that diverge",
        is_power=False,
    )
