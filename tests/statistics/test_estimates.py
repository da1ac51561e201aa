"""Tests of the statistics against hand calculations, published tables, and simulation."""

import math

import numpy as np
import pandas as pd
import pytest
from scipy import stats

from zofo.statistics.estimates import (
    cost_to_reach,
    mean_interval,
    mean_over_pairs,
    outcome_of,
    paired_difference,
    rank_treatments,
    seeds_to_decide,
)


@pytest.mark.parametrize("values", [[0.5], [0.5, 0.7]])
def test_one_or_two_seeds_give_no_interval(values):
    estimate = mean_interval(values)
    assert math.isnan(estimate.low)
    assert math.isnan(estimate.high)
    assert estimate.how == "none"
    assert estimate.value == pytest.approx(sum(values) / len(values))


def test_three_seeds_give_students_interval_worked_out_by_hand():
    # The mean is 2, the standard error is 1 / sqrt 3, and the t quantile for two degrees of freedom
    # is 4.30265.
    estimate = mean_interval([1.0, 2.0, 3.0])
    assert estimate.low == pytest.approx(2 - 4.30265 / math.sqrt(3), abs=1e-4)
    assert estimate.high == pytest.approx(2 + 4.30265 / math.sqrt(3), abs=1e-4)
    assert estimate.how == "t"


def test_many_seeds_are_bootstrapped_reproducibly():
    values = np.random.default_rng(0).normal(size=30)
    first, second = mean_interval(values, seed=3), mean_interval(values, seed=3)
    assert first == second
    assert first.how == "bootstrap"
    normal = stats.t.interval(0.95, 29, values.mean(), stats.sem(values))
    assert (first.low, first.high) == pytest.approx(normal, abs=0.1)


@pytest.mark.parametrize("num", [3, 25])
def test_equal_values_have_an_interval_without_width(num):
    estimate = mean_interval([0.25] * num)
    assert (estimate.low, estimate.value, estimate.high) == (0.25, 0.25, 0.25)


def test_intervals_of_few_seeds_cover_what_they_claim():
    generator = np.random.default_rng(1)
    for num in (3, 5):
        found = [mean_interval(generator.normal(size=num)) for _ in range(400)]
        covered = sum(e.low <= 0 <= e.high for e in found)
        # In 400 trials at 95%, the standard deviation of the number of hits is 4.4.
        assert 362 <= covered <= 398


def test_pairing_uses_the_seeds_that_both_have():
    found = paired_difference({0: 0.7, 1: 0.8, 2: 0.75, 9: 1.0}, {2: 0.7, 1: 0.7, 0: 0.65, 5: 0.1})
    assert found.seeds == (0, 1, 2)
    expected = stats.ttest_rel([0.7, 0.8, 0.75], [0.65, 0.7, 0.7]).confidence_interval(0.95)
    assert (found.estimate.low, found.estimate.high) == pytest.approx(tuple(expected))
    assert paired_difference({0: 1.0}, {1: 1.0}) is None


@pytest.mark.parametrize(("effect", "num"), [(0.2, 199), (0.5, 34), (0.8, 15), (1.0, 10)])
def test_the_number_of_seeds_is_that_of_published_power_tables(effect, num):
    # Sizes for a two-sided one-sample t-test at 5% with a power of 80% (G*Power 3.1).
    values = np.array([-1.0, 0.0, 1.0]) + effect  # standard deviation 1
    assert seeds_to_decide(values) == num
    assert seeds_to_decide(-7 * values) == num
    assert paired_difference(dict(enumerate(values)), dict.fromkeys(range(3), 0)).seeds_to_decide


def test_that_many_seeds_decide_four_of_five_times():
    generator = np.random.default_rng(0)
    num = seeds_to_decide([0.0, 1.0, 2.0])
    decided = sum(
        outcome_of(mean_interval(generator.normal(1.0, 1.0, size=num))) == "win" for _ in range(500)
    )
    # In 500 trials at 80%, the standard deviation of the number is 9.
    assert 365 <= decided <= 435


@pytest.mark.parametrize(
    "values", [[0.1, 0.3], [0.2, 0.2, 0.2], [-1.0, 0.0, 1.0], [-1.0, 0.0, 1.01]]
)
def test_no_number_of_seeds_is_named_without_a_spread_a_mean_or_an_end(values):
    assert seeds_to_decide(values) is None


@pytest.mark.filterwarnings("error")
def test_differences_that_are_equal_but_for_rounding_need_the_fewest_seeds():
    assert seeds_to_decide([0.8 - 0.7, 0.7 - 0.6, 0.6 - 0.5]) == 3


@pytest.mark.parametrize(
    ("differences", "outcome"),
    [
        ([0.1, 0.11, 0.12], "win"),
        ([-0.1, -0.11, -0.12], "loss"),
        ([0.1, -0.1, 0.05], "tie"),
        ([0.0, 0.0, 0.0], "tie"),
        ([0.1, 0.2], "undecided"),
        ([0.0], "undecided"),
    ],
)
def test_outcomes(differences, outcome):
    assert outcome_of(mean_interval(differences)) == outcome
    swapped = {"win": "loss", "loss": "win"}.get(outcome, outcome)
    assert outcome_of(mean_interval([-d for d in differences])) == swapped


def by_seed(*values):
    return dict(enumerate(values))


def test_the_mean_over_two_tasks_is_welchs_interval():
    a, b = [0.1, 0.2, 0.4, 0.1], [-0.3, -0.1, -0.2]
    # The mean of a and b is half of a − (−b).
    welch = stats.ttest_ind(a, [-x for x in b], equal_var=False).confidence_interval(0.95)
    found = mean_over_pairs([by_seed(*a), by_seed(*b)], ["sst2", "cb"])
    assert found.value == pytest.approx((np.mean(a) + np.mean(b)) / 2)
    assert (found.low, found.high) == pytest.approx((welch.low / 2, welch.high / 2))


def test_pairs_of_one_task_are_one_observation_a_seed():
    pair = by_seed(0.1, 0.2, 0.4)
    alone = mean_interval([0.1, 0.2, 0.4])
    for copies in (2, 5):  # Repeating a pair makes the mean no more certain.
        found = mean_over_pairs([pair] * copies, ["cb"] * copies)
        assert (found.value, found.low, found.high) == pytest.approx(
            (alone.value, alone.low, alone.high)
        )
    other = {2: -0.3, 0: 0.0, 1: 0.3}  # Pairs are matched by seed and not by position.
    found = mean_over_pairs([pair, other], ["cb", "cb"])
    means = mean_interval([0.05, 0.25, 0.05])
    assert (found.low, found.high) == pytest.approx((means.low, means.high))


def test_the_interval_holds_the_mean_where_pairs_share_their_seeds():
    generator = np.random.default_rng(0)
    held = 0
    for _ in range(600):
        # All adapters share this noise of a task's seeds.
        shared = generator.normal(0, 0.02, (2, 4))
        pairs = [by_seed(*(shared[task] + generator.normal(0, 0.01, 4))) for task in (0, 0, 0, 1)]
        found = mean_over_pairs(pairs, [0, 0, 0, 1])
        held += found.low <= 0 <= found.high
    assert 0.92 <= held / 600 <= 0.98


def test_pairs_without_spread_or_with_single_seeds():
    assert mean_over_pairs([by_seed(0.1, 0.2, 0.3)], ["a"]) == mean_interval([0.1, 0.2, 0.3])
    assert math.isnan(mean_over_pairs([by_seed(0.1), by_seed(0.2, 0.3)], ["a", "b"]).low)
    # A single seed shows no spread, even if another pair of its task has more seeds.
    assert math.isnan(mean_over_pairs([by_seed(0.1), by_seed(0.2, 0.3, 0.5)], ["a", "a"]).low)
    two = [by_seed(0.1, 0.2), by_seed(0.2, 0.3)]
    # This case has two degrees of freedom.
    assert not math.isnan(mean_over_pairs(two, ["a", "b"]).low)
    assert math.isnan(mean_over_pairs(two, ["a", "a"]).low)  # This case has only one.
    still = mean_over_pairs([by_seed(0.1, 0.1), by_seed(0.3, 0.3)], ["a", "b"])
    assert (still.low, still.high) == (pytest.approx(0.2), pytest.approx(0.2))


def test_friedman_worked_out_by_hand():
    scores = pd.DataFrame({"a": [9, 8, 9, 7], "b": [5, 6, 8, 9], "c": [1, 2, 3, 4]})
    # The ranks are a 1 1 1 2, b 2 2 2 1, c 3 3 3 3, so the means are 1.25, 1.75 and 3.
    # The statistic is 12·4/(3·4) (1.25² + 1.75² + 3² − 3·4²/4) = 6.5, and its tail is exp(−6.5/2).
    found = rank_treatments(scores)
    assert found.mean_ranks == {"a": 1.25, "b": 1.75, "c": 3.0}
    assert found.statistic == pytest.approx(6.5)
    assert found.p_value == pytest.approx(math.exp(-3.25))
    assert found.num_blocks == 4


# The values of q come from Demšar 2006, table 5(a).
@pytest.mark.parametrize(("num", "q"), [(3, 2.343), (4, 2.569), (5, 2.728)])
def test_nemenyis_critical_difference_is_the_published_one(num, q):
    generator = np.random.default_rng(num)
    scores = pd.DataFrame(generator.random((14, num)), columns=list("abcde")[:num])
    found = rank_treatments(scores)
    assert found.critical_difference == pytest.approx(
        q * math.sqrt(num * (num + 1) / (6 * 14)), rel=5e-4
    )
    for (a, b), p_value in found.p_values.items():
        apart = abs(found.mean_ranks[a] - found.mean_ranks[b]) > found.critical_difference
        assert apart == (p_value < 0.05)


def test_ranks_of_ties():
    draws = rank_treatments(pd.DataFrame({"a": [1, 2], "b": [1, 2], "c": [1, 2]}))
    assert draws.p_value == 1
    assert set(draws.mean_ranks.values()) == {2.0}
    halves = rank_treatments(pd.DataFrame({"a": [1, 2], "b": [1, 3], "c": [0, 1]}))
    assert halves.mean_ranks == {"b": 1.25, "a": 1.75, "c": 3.0}


def test_cost_to_reach_a_loss():
    curve = pd.DataFrame(
        {"step": [30, 10, 20], "dev_loss": [0.4, 0.9, 0.5], "elapsed_s": [3.0, 1.0, math.nan]}
    )
    assert cost_to_reach(curve, 0.5, "step") == 20
    assert cost_to_reach(curve, 0.45, "elapsed_s") == 3.0
    assert math.isnan(cost_to_reach(curve, 0.5, "elapsed_s"))
    assert cost_to_reach(curve, 0.1, "step") == math.inf
