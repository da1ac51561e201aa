"""Intervals of what is computed from few measurements: resampled, and widened for small samples.

A percentile interval of n resampled values is too narrow for small n: its spread lacks the factor
√(n / (n − 1)), and its quantiles are the normal's where Student's are needed. Both are mended by
taking percentiles farther out: Φ(√(n / (n − 1)) t_{α, n−1}) instead of α.

References:
    Hesterberg, "What Teachers Should Know About the Bootstrap", The American Statistician 69, 2015,
    section 5.3 (expanded percentiles).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Final

import numpy as np

NUM_RESAMPLES: Final = 999
CONFIDENCE: Final = 0.95


@dataclass(frozen=True)
class Interval:
    """A value with its 95% interval.

    Attributes:
        value: from the whole sample.
        low, high: the interval.
        note: what keeps it from being trusted; empty: nothing.
    """

    value: float
    low: float
    high: float
    note: str = ""

    def as_dict(self) -> dict[str, float]:
        """For JSON."""
        return {"value": self.value, "low": self.low, "high": self.high}

    def __format__(self, spec: str) -> str:
        """Such as 0.12 [0.1, 0.2]; the specification is that of each number."""
        return f"{self.value:{spec}} [{self.low:{spec}}, {self.high:{spec}}]"


def resamples(num: int, *, seed: int = 0) -> np.ndarray:
    """Indices drawn with replacement: int64, shape [NUM_RESAMPLES, num]; row 0 is the sample."""
    generator = np.random.default_rng(seed)
    drawn = generator.integers(num, size=(NUM_RESAMPLES, num))
    drawn[0] = np.arange(num)
    return drawn


def quantile(replicates: np.ndarray, level: float, num: int) -> float:
    """An expanded percentile.

    Args:
        replicates: of the statistic, [resamples]; what is not finite is left out.
        level: in (0, 1), such as 0.025.
        num: size of the sample that was resampled, at least 2.

    Returns:
        The percentile; NaN without a finite replicate.
    """
    from scipy.stats import norm, t

    finite = replicates[np.isfinite(replicates)]
    if not len(finite):
        return math.nan
    expanded = float(norm.cdf(math.sqrt(num / (num - 1)) * t.ppf(level, num - 1)))
    return float(np.quantile(finite, expanded))


def interval(value: float, replicates: np.ndarray, num: int) -> Interval:
    """The 95% interval of a statistic.

    Args:
        value: of the sample.
        replicates: of the statistic, [resamples].
        num: size of the sample.
    """
    tail = (1 - CONFIDENCE) / 2
    low, high = (quantile(replicates, level, num) for level in (tail, 1 - tail))
    return Interval(value, low, high)
