"""The interval type, and bootstrap intervals that are widened for small samples.

A percentile interval of n resampled values is too narrow for small n, for two reasons: its spread
lacks the factor √(n / (n − 1)), and it uses quantiles of the normal distribution instead of
Student's. Percentiles farther out correct both: Φ(√(n / (n − 1)) t_{α, n−1}) instead of α.

References:
    Hesterberg, "What Teachers Should Know About the Bootstrap", The American Statistician 69, 2015,
    section 5.3 (expanded percentiles).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Final

import numpy as np

NUM_RESAMPLES: Final = 999
CONFIDENCE: Final = 0.95


@dataclass(frozen=True)
class Interval:
    """A value with its 95% confidence interval.

    Attributes:
        value: the statistic of the whole sample.
        low, high: the ends of the interval; NaN if there is no interval.
        note: why the interval cannot be trusted; empty if it can.
    """

    value: float
    low: float = math.nan
    high: float = math.nan
    note: str = ""

    def as_dict(self) -> dict[str, Any]:
        """The values for JSON."""
        return {"value": self.value, "low": self.low, "high": self.high}

    def __format__(self, spec: str) -> str:
        """Text such as "0.12 [0.1, 0.2]"; `spec` applies to each number."""
        return f"{self.value:{spec}} [{self.low:{spec}}, {self.high:{spec}}]"


def resamples(num: int, *, seed: int = 0) -> np.ndarray:
    """Indices drawn with replacement, int64 [NUM_RESAMPLES, num]; row 0 is the sample itself."""
    generator = np.random.default_rng(seed)
    drawn = generator.integers(num, size=(NUM_RESAMPLES, num))
    drawn[0] = np.arange(num)
    return drawn


def quantile(replicates: np.ndarray, level: float, num: int) -> float:
    """An expanded percentile.

    Args:
        replicates: the statistic of each resample, [resamples]; only finite values count.
        level: probability in (0, 1), such as 0.025.
        num: size of the sample that was resampled, at least 2.

    Returns:
        The percentile; NaN if no replicate is finite.
    """
    from scipy.special import ndtr, stdtrit

    finite = replicates[np.isfinite(replicates)]
    if not len(finite):
        return math.nan
    # The level that this sample size needs, farther out than the nominal one.
    expanded = float(ndtr(math.sqrt(num / (num - 1)) * stdtrit(num - 1, level)))
    return float(np.quantile(finite, expanded))


def interval(value: float, replicates: np.ndarray, num: int) -> Interval:
    """The 95% interval of a statistic; the arguments are those of `Interval` and `quantile`."""
    tail = (1 - CONFIDENCE) / 2
    low, high = (quantile(replicates, level, num) for level in (tail, 1 - tail))
    return Interval(value, low, high)
