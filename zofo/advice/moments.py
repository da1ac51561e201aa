"""Moments."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np

from zofo.advice.curvature import Directions
from zofo.errors import UserError
from zofo.statistics.resampling import Interval, interval, quantile, resamples

CAUTION: Final = 0.8
"""One-sided level at which curvature is taken."""


@dataclass(frozen=True)
class Moments:
    """What the rate of a zeroth-order block follows from, with resampled replicates.

    Attributes:
        loss: f.
        signal: G = ‖∇f‖².
        row_noise: S: variance of the gradient of one row, summed over the weights.
        trace: mean vᵀHv: tr H.
        rayleigh: κ, from the covariance of s² and vᵀHv: within [0, trace] where no vᵀHv was
            negative, so that H may be positive semi-definite, else within [0, largest vᵀHv].
        spread: ‖H‖_F, from the variance of vᵀHv; at least λ_max.
        least: smallest vᵀHv that was seen; below 0, H has negative eigenvalues.
        replicates: of (signal, row_noise, trace, rayleigh, spread): [resamples, 5].
        num: directions.
        num_rows: of a direction.
        largest_slope: largest |s| of a batch that was seen.
        num_weights: d.
    """

    loss: float
    signal: float
    row_noise: float
    trace: float
    rayleigh: float
    spread: float
    least: float
    replicates: np.ndarray
    num: int
    num_rows: int
    largest_slope: float
    num_weights: int

    @property
    def sure_signal(self) -> float:
        """G where the lower end of its 80% one-sided interval is positive, else 0."""
        low = quantile(self.replicates[:, 0], 1 - CAUTION, self.num)
        return self.signal if low > 0 else 0.0

    @property
    def mean_square(self) -> float:
        """Mean s² of the measured batches: G + S / num_rows."""
        return self.signal + self.row_noise / self.num_rows

    @property
    def careful_trace(self) -> float:
        """The trace at the upper end of its 80% one-sided interval."""
        return max(quantile(self.replicates[:, 2], CAUTION, self.num), self.trace, 0.0)

    @property
    def careful_largest(self) -> float:
        """A bound of λ_max: ‖H‖_F, and tr H where no vᵀHv was negative, both at the upper end."""
        spread = max(quantile(self.replicates[:, 4], CAUTION, self.num), self.spread, self.rayleigh)
        return min(spread, self.careful_trace) if self.least >= 0 else spread

    def intervals(self) -> dict[str, Interval]:
        """Signal, noise, trace and κ with 95% intervals: resampled, expanded percentiles."""
        names = ("signal", "row_noise", "trace", "rayleigh")
        return {
            name: interval(getattr(self, name), self.replicates[:, i], self.num)
            for i, name in enumerate(names)
        }


def moments(directions: Directions, *, seed: int = 0) -> Moments:
    """Signal, noise and curvature of a block.

    Signal: the mean over directions of the products of different rows' slopes, unbiased for ‖∇f‖²
    of the population that the rows are from. (Of the N rows themselves it is too small by S / N.)

    Args:
        directions: at least two, Gaussian, of at least two rows.
        seed: of the resampling.

    Raises:
        UserError: if a loss was not finite.
    """
    slopes, curvatures = directions.slopes, directions.curvatures
    finite = np.isfinite(slopes).all(axis=1) & np.isfinite(curvatures)
    if not finite.all():
        raise UserError(
            f"the loss is not finite along {np.sum(~finite)} of {len(finite)} directions at "
            f"distance {directions.radius:.1e}, so no rate can be advised; give the rates as "
            "numbers, or use a dtype with more range (model.dtype=bfloat16 or float32)"
        )
    num_rows = slopes.shape[1]
    means, variances = slopes.mean(axis=1), slopes.var(axis=1, ddof=1)
    signals = means**2 - variances / num_rows
    drawn, least = resamples(len(means), seed=seed), float(curvatures.min())

    def statistics(index: np.ndarray) -> np.ndarray:
        signal, noise = signals[index].mean(axis=-1), variances[index].mean(axis=-1)
        trace = curvatures[index].mean(axis=-1)
        squares = means[index] ** 2
        size = squares.mean(axis=-1)
        shared = (squares * curvatures[index]).mean(axis=-1) - size * trace
        unbiased = index.shape[-1] / (index.shape[-1] - 1)
        with np.errstate(divide="ignore", invalid="ignore"):
            rayleigh = np.where(size > 0, unbiased * shared / (2 * size), 0.0)
        largest = trace if least >= 0 else curvatures[index].max(axis=-1)
        rayleigh = np.clip(rayleigh, 0.0, np.maximum(largest, 0.0))
        spread = np.sqrt(unbiased * curvatures[index].var(axis=-1) / 2)
        return np.stack((signal, noise, trace, rayleigh, spread), axis=-1)

    replicates = statistics(drawn)
    signal, noise, trace, rayleigh, spread = replicates[0].tolist()
    return Moments(
        loss=float(directions.losses.mean()),
        signal=signal,
        row_noise=noise,
        trace=trace,
        rayleigh=rayleigh,
        spread=spread,
        least=least,
        replicates=replicates,
        num=len(means),
        num_rows=num_rows,
        largest_slope=float(np.abs(means).max()),
        num_weights=directions.num_weights,
    )


def total(parts: Sequence[Moments]) -> Moments:
    """Moments of a block from those of its groups, each perturbed alone.

    Signal, noise and trace add up; κ is weighted by each group's share of E s², without the terms
    between groups. λ_max of a positive semi-definite H is at most the sum of the groups', and so
    the spreads add up too.
    """
    stacked = np.stack([part.replicates for part in parts])
    summed = stacked.sum(axis=0)
    rows = np.array([part.num_rows for part in parts])[:, None]
    weights = np.maximum(stacked[:, :, 0], 0) + stacked[:, :, 1] / rows
    sizes = weights.sum(axis=0)
    with np.errstate(divide="ignore", invalid="ignore"):
        shares = np.where(sizes > 0, weights / sizes, 1 / len(parts))
    summed[:, 3] = (shares * stacked[:, :, 3]).sum(axis=0)
    signal, noise, trace, rayleigh, spread = summed[0].tolist()
    return Moments(
        loss=float(np.mean([part.loss for part in parts])),
        signal=signal,
        row_noise=noise,
        trace=trace,
        rayleigh=rayleigh,
        spread=spread,
        least=min(part.least for part in parts),
        replicates=summed,
        # The smallest group decides how far the percentiles are expanded.
        num=min(part.num for part in parts),
        num_rows=min(part.num_rows for part in parts),
        largest_slope=math.sqrt(sum(part.largest_slope**2 for part in parts)),
        num_weights=sum(part.num_weights for part in parts),
    )
