"""Means with confidence intervals, paired differences, ranks over tasks, costs to reach a loss.

The observations are runs that differ in their seed. The seed decides which rows are drawn, their
order, the adapter's initial weights and the directions. A confidence interval says where the mean
over more seeds of the same task would lie.

The number of observations decides the kind of interval:

    1 or 2         none: two points say almost nothing about their spread
    3 to 19        Student's t: a bootstrap of so few values is too narrow (docs/guide/report.md)
    20 and more    bias-corrected and accelerated (BCa) bootstrap: it assumes no distribution

References:
    Efron, Better bootstrap confidence intervals, JASA 82, 1987.
    Welch, The generalization of Student's problem, Biometrika 34, 1947; Satterthwaite, Biometrics
    Bulletin 2, 1946.
    Liang, Zeger, Longitudinal data analysis using generalized linear models, Biometrika 73, 1986
    (the variance of a sum of dependent observations, by clusters).
    Demšar, Statistical comparisons of classifiers over multiple data sets, JMLR 7, 2006.
    Cohen, Statistical power analysis for the behavioral sciences, 1988 (the number of seeds).
"""

from __future__ import annotations

import bisect
import math
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final, Literal

import numpy as np

from zofo.statistics.resampling import CONFIDENCE, Interval

if TYPE_CHECKING:
    import pandas as pd

MIN_FOR_INTERVAL: Final = 3
MIN_FOR_BOOTSTRAP: Final = 20
_NUM_RESAMPLES: Final = 9_999
POWER: Final = 0.8
"""Chance to decide a comparison, by which the number of seeds is planned (Cohen's convention)."""
_MAX_SEEDS: Final = 1_000

Outcome = Literal["win", "tie", "loss", "undecided"]


@dataclass(frozen=True)
class Estimate(Interval):
    """A mean of observations, with its interval; both ends are NaN if there are too few."""

    num: int = 1
    how: Literal["t", "bootstrap", "none"] = "none"

    def as_dict(self) -> dict[str, Any]:
        """The values for JSON."""
        ends = {"mean": self.value, "low": self.low, "high": self.high}
        return {**ends, "num": self.num, "how": self.how}


@dataclass(frozen=True)
class Difference:
    """A paired comparison.

    Attributes:
        estimate: mean of the differences, first minus second.
        seeds: the seeds that both have, ascending.
        outcome: "win" or "loss" of the first if the interval excludes 0, "tie" if the interval
            contains 0, "undecided" if there is no interval.
        seeds_to_decide: as `seeds_to_decide`, for these differences.
    """

    estimate: Estimate
    seeds: tuple[int, ...]
    outcome: Outcome
    seeds_to_decide: int | None


@dataclass(frozen=True)
class Ranks:
    """Friedman's test and Nemenyi's comparison of all pairs.

    Attributes:
        mean_ranks: treatment -> mean rank; 1 is the best, and the best comes first.
        num_blocks: number of tasks that the ranks are averaged over.
        statistic, p_value: Friedman's test of the hypothesis that all treatments are equal.
        critical_difference: two mean ranks that differ by more are different at the 95% level.
        p_values: (treatment, treatment) -> Nemenyi's p-value.
    """

    mean_ranks: dict[str, float]
    num_blocks: int
    statistic: float
    p_value: float
    critical_difference: float
    p_values: dict[tuple[str, str], float]


def mean_interval(values: Sequence[float], *, seed: int = 0) -> Estimate:
    """The mean of at least one value, with its 95% interval; `seed` is that of the bootstrap."""
    sample = np.asarray(values, dtype=np.float64)
    mean, num = float(sample.mean()), len(sample)
    if num < MIN_FOR_INTERVAL:
        return Estimate(mean, num=num)
    how: Literal["t", "bootstrap"] = "t" if num < MIN_FOR_BOOTSTRAP else "bootstrap"
    if np.ptp(sample) == 0:  # BCa is not defined for equal values
        return Estimate(mean, mean, mean, num=num, how=how)
    if how == "t":
        half = _t_quantile(num - 1) * float(sample.std(ddof=1)) / math.sqrt(num)
        return Estimate(mean, mean - half, mean + half, num=num, how=how)
    from scipy.stats import bootstrap

    found = bootstrap(
        (sample,),
        np.mean,
        confidence_level=CONFIDENCE,
        n_resamples=_NUM_RESAMPLES,
        method="BCa",
        rng=np.random.default_rng(seed),
    ).confidence_interval
    return Estimate(mean, float(found.low), float(found.high), num=num, how=how)


def paired_difference(
    first: Mapping[int, float], second: Mapping[int, float], *, seed: int = 0
) -> Difference | None:
    """First minus second, over the seeds that both have; None if they share no seed.

    Pairing removes what a seed does to both sides, such as the adapter's initial weights and the
    order of the rows.

    Args:
        first: seed -> score of the first.
        second: seed -> score of the second.
        seed: seed of the bootstrap.
    """
    seeds = tuple(sorted(first.keys() & second.keys()))
    if not seeds:
        return None
    values = [first[s] - second[s] for s in seeds]
    estimate = mean_interval(values, seed=seed)
    return Difference(estimate, seeds, outcome_of(estimate), seeds_to_decide(values))


def seeds_to_decide(values: Sequence[float]) -> int | None:
    """The number of seeds with which the interval of the mean would exclude 0 with 80% chance.

    It supposes that more seeds have the mean and the spread of these, which few seeds know only
    roughly. The power is that of a two-sided t-test, by the noncentral t distribution.

    Args:
        values: one difference per seed.

    Returns:
        The number, at least 3; None if `values` are fewer than 3, if their mean or their spread is
        0, or if more than 1,000 seeds would be needed.
    """
    from scipy.stats import nct

    sample = np.asarray(values, dtype=np.float64)
    if len(sample) < MIN_FOR_INTERVAL or np.ptp(sample) == 0 or sample.mean() == 0:
        return None
    effect = abs(float(sample.mean())) / float(sample.std(ddof=1))

    def power(num: int) -> float:
        shift = effect * math.sqrt(num)
        return float(nct.sf(_t_quantile(num - 1), num - 1, shift))

    candidates = range(MIN_FOR_INTERVAL, _MAX_SEEDS + 1)
    found = bisect.bisect_left(candidates, POWER, key=power)
    return candidates[found] if found < len(candidates) else None


def outcome_of(estimate: Estimate) -> Outcome:
    """The outcome of a comparison by the interval of the difference."""
    if math.isnan(estimate.low):
        return "undecided"
    if estimate.low <= 0 <= estimate.high:
        return "tie"
    return "win" if estimate.low > 0 else "loss"


def mean_over_pairs(
    differences: Sequence[Mapping[int, float]], blocks: Sequence[Hashable]
) -> Estimate:
    """Mean of the pairs' mean differences with its 95% interval; every pair has equal weight.

    For the same seed, pairs of one block use the same rows, so their differences depend on each
    other. Therefore one seed of a block is one observation: the sum over the block's pairs. Blocks
    are independent, and the formula of Welch and Satterthwaite combines their variances. The
    interval holds for these pairs, not for other tasks. A single pair gets `mean_interval`.

    Args:
        differences: seed -> difference, for each pair.
        blocks: the block (the task) of each pair.

    Returns:
        The estimate. It has no interval if a pair has a single seed, or if all blocks together have
        fewer than two degrees of freedom.
    """
    if len(differences) == 1:
        return mean_interval(list(differences[0].values()))
    num = sum(len(pair) for pair in differences)
    means = [float(np.mean(list(pair.values()))) for pair in differences]
    mean = float(np.mean(means))
    sums: dict[Hashable, dict[int, float]] = {}
    for pair, center, block in zip(differences, means, blocks, strict=True):
        of_block = sums.setdefault(block, {})
        for seed, value in pair.items():
            # Deviations from the pair's mean: a difference between pairs is no noise of the seeds.
            of_block[seed] = of_block.get(seed, 0.0) + (value - center) / len(pair)
    freedom = [len(of_block) - 1 for of_block in sums.values()]
    if min(map(len, differences)) < 2 or sum(freedom) < MIN_FOR_INTERVAL - 1:
        return Estimate(mean, num=num)
    # The variance of each block's part of the sum; m / (m − 1) makes it unbiased for m seeds.
    parts = [
        sum(value**2 for value in of_block.values()) * len(of_block) / (len(of_block) - 1)
        for of_block in sums.values()
    ]
    if sum(parts) == 0:
        return Estimate(mean, mean, mean, num=num, how="t")
    # Degrees of freedom by Satterthwaite's formula.
    effective = sum(parts) ** 2 / sum(
        part**2 / free for part, free in zip(parts, freedom, strict=True)
    )
    half = _t_quantile(effective) * math.sqrt(sum(parts)) / len(differences)
    return Estimate(mean, mean - half, mean + half, num=num, how="t")


def rank_treatments(scores: pd.DataFrame) -> Ranks:
    """Friedman's test over tasks, and Nemenyi's post hoc comparison.

    Two treatments differ if their mean ranks differ by more than the critical difference
    q sqrt(k (k + 1) / 6N), where q is the 95% point of the studentized range divided by sqrt 2
    (Demšar, 3.2.2).

    Args:
        scores: one row per block (task) and one column per treatment; higher is better. No value
            may be missing, and at least two rows and three columns are needed.
    """
    from scipy.stats import friedmanchisquare, rankdata, studentized_range

    num_blocks, num = scores.shape
    assert num_blocks >= 2, "ranks need at least two tasks"
    assert num >= 3, "ranks need at least three treatments"
    # Rank 1 is the best, hence the minus; ties share their mean rank.
    ranks = rankdata(-scores.to_numpy(dtype=np.float64), axis=1).mean(axis=0)
    order = np.argsort(ranks, kind="stable")
    names = [str(scores.columns[i]) for i in order]
    ranks = ranks[order]
    if all(scores.nunique(axis=1) == 1):
        statistic, p_value = 0.0, 1.0  # friedmanchisquare divides by 0 if every task is a draw
    else:
        test = friedmanchisquare(*(scores[column].to_numpy() for column in scores.columns))
        statistic, p_value = float(test.statistic), float(test.pvalue)
    unit = math.sqrt(num * (num + 1) / (6 * num_blocks))
    quantile = float(studentized_range.ppf(CONFIDENCE, num, np.inf)) / math.sqrt(2)
    p_values = {
        (names[i], names[j]): float(
            studentized_range.sf(abs(ranks[i] - ranks[j]) / unit * math.sqrt(2), num, np.inf)
        )
        for i in range(num)
        for j in range(i + 1, num)
    }
    return Ranks(
        dict(zip(names, map(float, ranks), strict=True)),
        num_blocks,
        statistic,
        p_value,
        quantile * unit,
        p_values,
    )


def cost_to_reach(curve: pd.DataFrame, loss: float, cost: str) -> float:
    """The cost of a run until its dev loss was first at most `loss`, without interpolation.

    Args:
        curve: evaluations of one run, with the columns `step`, `dev_loss` and `cost`.
        loss: the loss to reach.
        cost: "step", "forward_equivalents" or "elapsed_s".

    Returns:
        The cost; infinite if the run never reached the loss; NaN if the log lacks the cost.
    """
    reached = curve.sort_values("step")
    reached = reached[reached["dev_loss"] <= loss]
    return float(reached[cost].iloc[0]) if len(reached) else math.inf


def _t_quantile(freedom: float) -> float:
    from scipy.stats import t

    return float(t.ppf(0.5 + CONFIDENCE / 2, freedom))
