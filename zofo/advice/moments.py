"""Gradient signal, noise and curvature of a block, from slopes and curvatures along directions.

The notation is that of `zofo.advice.rates`: G = ‖∇f‖² is the signal, S the variance of a row's
gradient, H the Hessian, and κ = gᵀHg / ‖g‖² the curvature along the gradient. Directions v are
Gaussian even if the run uses random signs. Random signs would miss the diagonal of H: with them,
cov(s², vᵀHv) is 2 gᵀHg − 2 Σ H_ii g_i², and κ would be too small. It matters most for large K.

A run with rank-one directions is measured along them. Their cov(s², vᵀHv) has further terms, which
may be large: with v = a bᵀ one of them is ‖g‖² times a curvature along b alone. κ then stands for
half of this covariance over E s², so that tr H + 2 κ is what one direction meets.

The largest eigenvalue is bounded, not measured: λ_max ≤ tr H and λ_max ≤ ‖H‖_F, where Var(vᵀHv) = 2
‖H‖_F².
"""

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
"""One-sided confidence level of the bounds on curvature and signal."""
_RESAMPLED: Final = ("signal", "row_noise", "trace", "rayleigh", "spread")
"""The columns of `Moments.replicates`."""


@dataclass(frozen=True)
class Moments:
    """Signal, noise and curvature of a block, with resampled replicates.

    Attributes:
        loss: f.
        signal: G = ‖∇f‖².
        row_noise: S, the variance of one row's gradient, summed over the weights.
        trace: tr H, the mean of vᵀHv.
        rayleigh: κ, from the covariance of s² and vᵀHv. It lies in [0, trace] if no vᵀHv was
            negative, so that H may be positive semi-definite, and in [0, largest vᵀHv] otherwise.
        spread: ‖H‖_F, from the variance of vᵀHv; at least λ_max.
        least: smallest measured vᵀHv. If it is below 0, H has negative eigenvalues.
        replicates: of (signal, row_noise, trace, rayleigh, spread): [resamples, 5].
        num: number of directions.
        num_rows: rows of a direction.
        largest_slope: largest measured |s| of a batch.
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
        """G if the lower end of its 80% one-sided interval is positive, otherwise 0."""
        low = quantile(self.replicates[:, 0], 1 - CAUTION, self.num)
        return self.signal if low > 0 else 0.0

    @property
    def mean_square(self) -> float:
        """Mean s² of the measured batches: G + S / num_rows."""
        return self.signal + self.row_noise / self.num_rows

    @property
    def careful_trace(self) -> float:
        """Upper end of the trace's 80% one-sided interval."""
        return max(quantile(self.replicates[:, 2], CAUTION, self.num), self.trace, 0.0)

    @property
    def careful_largest(self) -> float:
        """An upper bound of λ_max at the 80% level.

        It is ‖H‖_F, or tr H if that is smaller and no vᵀHv was negative.
        """
        spread = max(quantile(self.replicates[:, 4], CAUTION, self.num), self.spread, self.rayleigh)
        return min(spread, self.careful_trace) if self.least >= 0 else spread

    def intervals(self) -> dict[str, Interval]:
        """95% intervals of signal, noise, trace and κ, from resampled, expanded percentiles."""
        return {
            name: interval(getattr(self, name), self.replicates[:, i], self.num)
            for i, name in enumerate(_RESAMPLED[:4])
        }


def moments(directions: Directions, *, seed: int = 0) -> Moments:
    """Compute the moments of a block.

    The signal is the mean over directions of products of different rows' slopes. It is an unbiased
    estimate of ‖∇f‖² of the population that the rows are drawn from. (For the loss of the N rows
    themselves it is too small by S / N.)

    Args:
        directions: at least two Gaussian directions with at least two rows each.
        seed: seed of the resampling.

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
    # The square of a mean contains the mean's variance, which is not signal.
    signals = means**2 - variances / num_rows
    drawn, least = resamples(len(means), seed=seed), float(curvatures.min())

    def statistics(index: np.ndarray) -> np.ndarray:  # [resamples, directions] -> [resamples, 5]
        signal, noise = signals[index].mean(axis=-1), variances[index].mean(axis=-1)
        bent = curvatures[index]
        trace = bent.mean(axis=-1)
        squares = means[index] ** 2
        size = squares.mean(axis=-1)
        shared = (squares * bent).mean(axis=-1) - size * trace
        unbiased = index.shape[-1] / (index.shape[-1] - 1)
        # For Gaussian v and s = gᵀv: cov(s², vᵀHv) = 2 gᵀHg, and E s² = ‖g‖².
        with np.errstate(divide="ignore", invalid="ignore"):
            rayleigh = np.where(size > 0, unbiased * shared / (2 * size), 0.0)
        largest = trace if least >= 0 else bent.max(axis=-1)
        rayleigh = np.clip(rayleigh, 0.0, np.maximum(largest, 0.0))
        spread = np.sqrt(unbiased * bent.var(axis=-1) / 2)
        return np.stack((signal, noise, trace, rayleigh, spread), axis=-1)

    replicates = statistics(drawn)
    return Moments(
        **dict(zip(_RESAMPLED, replicates[0].tolist(), strict=True)),
        loss=float(directions.losses.mean()),
        least=least,
        replicates=replicates,
        num=len(means),
        num_rows=num_rows,
        largest_slope=float(np.abs(means).max()),
        num_weights=directions.num_weights,
    )


def total(parts: Sequence[Moments]) -> Moments:
    """Moments of a block from those of its groups, each of which was perturbed alone.

    Signal, noise and trace add up. κ is the mean weighted by each group's share of E s², without
    the terms between groups. The spreads add up too, because λ_max of a positive semi-definite H is
    at most the sum of the groups' λ_max.
    """
    stacked = np.stack([part.replicates for part in parts])  # [groups, resamples, 5]
    summed = stacked.sum(axis=0)
    rows = np.array([part.num_rows for part in parts])[:, None]
    weights = np.maximum(stacked[:, :, 0], 0) + stacked[:, :, 1] / rows
    sizes = weights.sum(axis=0)
    with np.errstate(divide="ignore", invalid="ignore"):
        shares = np.where(sizes > 0, weights / sizes, 1 / len(parts))
    summed[:, 3] = (shares * stacked[:, :, 3]).sum(axis=0)
    return Moments(
        **dict(zip(_RESAMPLED, summed[0].tolist(), strict=True)),
        loss=float(np.mean([part.loss for part in parts])),
        least=min(part.least for part in parts),
        replicates=summed,
        # The group with the fewest directions sets how far the percentiles are expanded.
        num=min(part.num for part in parts),
        num_rows=min(part.num_rows for part in parts),
        largest_slope=math.sqrt(sum(part.largest_slope**2 for part in parts)),
        num_weights=sum(part.num_weights for part in parts),
    )
