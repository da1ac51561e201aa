"""Means with intervals, paired differences, ranks over tasks, costs to reach a loss.

What is random here is the seed: of the rows that are drawn, of their order, of the adapter, of the
directions. An interval says where the mean over more seeds would lie, on the same task.

Few seeds are the rule. One or two give no interval: two points say next to nothing of their
spread. Three to nineteen give Student's t, because a bootstrap of so few values is too narrow
(docs/guide/report.md has its coverage). Twenty and more give the bias-corrected and accelerated
bootstrap, which asks nothing of the distribution.

References:
    Efron, Better bootstrap confidence intervals, JASA 82, 1987.
    Welch, The generalization of Student's problem, Biometrika 34, 1947; Satterthwaite, Biometrics
    Bulletin 2, 1946.
    Liang, Zeger, Longitudinal data analysis using generalized linear models, Biometrika 73, 1986
    (the variance of a sum of dependent observations, by clusters).
    Demšar, Statistical comparisons of classifiers over multiple data sets, JMLR 7, 2006.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, Literal

import numpy as np

if TYPE_CHECKING:
    import pandas as pd

CONFIDENCE: Final = 0.95
MIN_FOR_INTERVAL: Final = 3
MIN_FOR_BOOTSTRAP: Final = 20
_NUM_RESAMPLES: Final = 9_999

Outcome = Literal["win", "tie", "loss", "undecided"]


@dataclass(frozen=True)
class Estimate:
    """A mean and how sure it is.

    Attributes:
        mean: of the values.
        low, high: 95% interval; None where there are too few values.
        num: values.
        how: "t", "bootstrap", or "none".
    """

    mean: float
    low: float | None
    high: float | None
    num: int
    how: Literal["t", "bootstrap", "none"]


@dataclass(frozen=True)
class Difference:
    """A paired comparison.

    Attributes:
        estimate: of the differences, first minus second.
        seeds: that both have, in order.
        outcome: "win" or "loss" of the first where the interval lies beside 0, "tie" where it holds
            0, "undecided" where there is none.
    """

    estimate: Estimate
    seeds: tuple[int, ...]
    outcome: Outcome


@dataclass(frozen=True)
class Ranks:
    """Friedman's test and Nemenyi's comparison of all pairs.

    Attributes:
        mean_ranks: treatment -> mean rank, 1 for the best, best first.
        num_blocks: tasks that the ranks are means over.
        statistic, p_value: of Friedman's test that all treatments are alike.
        critical_difference: of two mean ranks, at 95%.
        p_values: (treatment, treatment) -> Nemenyi's p-value.
    """

    mean_ranks: dict[str, float]
    num_blocks: int
    statistic: float
    p_value: float
    critical_difference: float
    p_values: dict[tuple[str, str], float]


def mean_interval(values: Sequence[float], *, seed: int = 0) -> Estimate:
    """Mean of some values with its 95% interval.

    Args:
        values: at least one; fewer than 3 get no interval, fewer than 20 Student's t, others the
            BCa bootstrap.
        seed: of the bootstrap.
    """
    sample = np.asarray(values, dtype=np.float64)
    mean, num = float(sample.mean()), len(sample)
    if num < MIN_FOR_INTERVAL:
        return Estimate(mean, None, None, num, "none")
    how: Literal["t", "bootstrap"] = "t" if num < MIN_FOR_BOOTSTRAP else "bootstrap"
    if np.ptp(sample) == 0:
        return Estimate(mean, mean, mean, num, how)
    if how == "t":
        half = _t_quantile(num - 1) * float(sample.std(ddof=1)) / math.sqrt(num)
        return Estimate(mean, mean - half, mean + half, num, how)
    from scipy.stats import bootstrap

    found = bootstrap(
        (sample,),
        np.mean,
        confidence_level=CONFIDENCE,
        n_resamples=_NUM_RESAMPLES,
        method="BCa",
        rng=np.random.default_rng(seed),
    ).confidence_interval
    return Estimate(mean, float(found.low), float(found.high), num, how)


def paired_difference(
    first: Mapping[int, float], second: Mapping[int, float], *, seed: int = 0
) -> Difference | None:
    """First minus second, over the seeds that both have; None if they share none.

    Pairing takes out what a seed does to both, such as the adapter's initial weights and the order
    of the rows.

    Args:
        first: seed -> score.
        second: likewise.
        seed: of the bootstrap.
    """
    seeds = tuple(sorted(first.keys() & second.keys()))
    if not seeds:
        return None
    estimate = mean_interval([first[s] - second[s] for s in seeds], seed=seed)
    return Difference(estimate, seeds, outcome_of(estimate))


def outcome_of(estimate: Estimate) -> Outcome:
    """What the interval of a difference says of it."""
    if estimate.low is None or estimate.high is None:
        return "undecided"
    if estimate.low <= 0 <= estimate.high:
        return "tie"
    return "win" if estimate.low > 0 else "loss"


def mean_over_pairs(
    differences: Sequence[Mapping[int, float]], blocks: Sequence[Hashable]
) -> Estimate:
    """Mean of the pairs' mean differences, each pair counting the same, with its 95% interval.

    Pairs of one block share their rows seed by seed, so their differences are not independent: a
    seed of a block is one observation, the sum of what its pairs say. Blocks are independent, and
    their variances are put together as Welch and Satterthwaite do. The interval speaks of these
    pairs, not of other tasks. One pair alone is `mean_interval`'s.

    Args:
        differences: of each pair, seed -> difference.
        blocks: of each pair, what it shares rows with: its task.

    Returns:
        The estimate; without an interval where a pair has a single seed, or all blocks together
        have fewer than two degrees of freedom.
    """
    if len(differences) == 1:
        return mean_interval(list(differences[0].values()))
    num = sum(len(pair) for pair in differences)
    means = [float(np.mean(list(pair.values()))) for pair in differences]
    mean = float(np.mean(means))
    said: dict[Hashable, dict[int, float]] = {}
    for pair, center, block in zip(differences, means, blocks, strict=True):
        of_block = said.setdefault(block, {})
        for seed, value in pair.items():
            of_block[seed] = of_block.get(seed, 0.0) + (value - center) / len(pair)
    freedom = [len(of_block) - 1 for of_block in said.values()]
    if min(map(len, differences)) < 2 or sum(freedom) < MIN_FOR_INTERVAL - 1:
        return Estimate(mean, None, None, num, "none")
    parts = [
        sum(value**2 for value in of_block.values()) * len(of_block) / (len(of_block) - 1)
        for of_block in said.values()
    ]
    if sum(parts) == 0:
        return Estimate(mean, mean, mean, num, "t")
    effective = sum(parts) ** 2 / sum(
        part**2 / free for part, free in zip(parts, freedom, strict=True)
    )
    half = _t_quantile(effective) * math.sqrt(sum(parts)) / len(differences)
    return Estimate(mean, mean - half, mean + half, num, "t")


def rank_treatments(scores: pd.DataFrame) -> Ranks:
    """Friedman's test over tasks, and Nemenyi's post hoc comparison.

    Two treatments differ where their mean ranks lie further apart than the critical difference
    q sqrt(k (k + 1) / 6N), q the 95% point of the studentized range over sqrt 2 (Demšar, 3.2.2).

    Args:
        scores: a row a block (a task), a column a treatment, higher is better, none missing; at
            least two rows and three columns.
    """
    from scipy.stats import friedmanchisquare, rankdata, studentized_range

    num_blocks, num = scores.shape
    assert num_blocks >= 2, "ranks of one task are no evidence"
    assert num >= 3, "two treatments are compared by their difference"
    ranks = rankdata(-scores.to_numpy(dtype=np.float64), axis=1).mean(axis=0)
    order = np.argsort(ranks, kind="stable")
    names = [str(scores.columns[i]) for i in order]
    ranks = ranks[order]
    if all(scores.nunique(axis=1) == 1):
        statistic, p_value = 0.0, 1.0  # every task a draw
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
    """What a run had spent when its dev loss was first at most `loss`; infinite if it never was.

    Nothing is interpolated: a run is known only where it was evaluated.

    Args:
        curve: of one run, with the columns `step`, `dev_loss` and `cost`.
        loss: to be reached.
        cost: "step", "forward_equivalents" or "elapsed_s".

    Returns:
        The cost; NaN if the run reached the loss but the log does not say at what cost.
    """
    reached = curve.sort_values("step")
    reached = reached[reached["dev_loss"] <= loss]
    return float(reached[cost].iloc[0]) if len(reached) else math.inf


def _t_quantile(freedom: float) -> float:
    from scipy.stats import t

    return float(t.ppf(0.5 + CONFIDENCE / 2, freedom))
