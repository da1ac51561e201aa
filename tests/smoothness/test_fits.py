"""Fits recover known constants, and their intervals contain them as often as stated."""

import math

import numpy as np
import pytest

from zofo.smoothness.fits import (
    below,
    block_length,
    envelope,
    fit_growth,
    ratio,
    widening,
)
from zofo.statistics.resampling import Interval

NUM_DRAWS = 120


def noise(rng, num, rho):
    """Return an AR(1) process of unit variance."""
    found = np.empty(num)
    found[0] = rng.normal()
    for i in range(1, num):
        found[i] = rho * found[i - 1] + math.sqrt(1 - rho**2) * rng.normal()
    return found


def test_exact_laws_are_recovered():
    u = np.geomspace(0.3, 30, 25)
    linear = fit_growth(u, 2.0 + 0.7 * u, num_resamples=50).linear
    assert linear.constant.value == pytest.approx(2.0, rel=1e-3)
    assert linear.slope.value == pytest.approx(0.7, rel=1e-3)
    assert linear.error < 1e-4
    power = fit_growth(u, 3.0 * u**1.4, num_resamples=50).power
    assert power.factor.value == pytest.approx(3.0, rel=1e-9)
    assert power.exponent.value == pytest.approx(1.4, rel=1e-9)
    assert power(2.0) == pytest.approx(3.0 * 2.0**1.4)


def test_bounds_of_the_linear_law_are_reached():
    u = np.geomspace(1, 10, 12)
    flat = fit_growth(u, np.full(12, 5.0), num_resamples=50)
    assert flat.linear.slope.value == 0.0
    assert flat.linear.constant.value == pytest.approx(5.0)
    assert flat.grows == "undecided at this scale"
    steep = fit_growth(u, 4.0 * u, num_resamples=50)
    assert steep.linear.constant.value == pytest.approx(0.0, abs=1e-9)
    assert steep.linear.slope.value == pytest.approx(4.0)
    assert steep.grows == "confirmed"


@pytest.mark.parametrize(("exponent", "verdict"), [(1.0, "confirmed"), (3.0, "refuted")])
def test_subquadratic_growth_is_told_from_more(exponent, verdict):
    rng = np.random.default_rng(0)
    u = np.exp(rng.uniform(-1, 2, 40))
    found = fit_growth(u, u**exponent * np.exp(0.2 * rng.normal(size=40)), num_resamples=300)
    assert found.is_subquadratic == verdict


def test_a_path_without_spread_decides_nothing():
    rng = np.random.default_rng(0)
    u = np.exp(0.01 * rng.normal(size=30))
    found = fit_growth(u, np.exp(0.3 * rng.normal(size=30)), num_resamples=300)
    assert found.is_subquadratic == "undecided at this scale"
    assert found.spread < 1.1


@pytest.mark.parametrize("rho", [0.0, 0.5])
def test_coverage_of_the_intervals(rho):
    """The 95% intervals contain the truth in at least 85% of 120 draws, even with AR(1) errors."""
    rng = np.random.default_rng(1)
    hits = np.zeros(5)
    for seed in range(NUM_DRAWS):
        u = np.sort(np.exp(rng.uniform(-1, 1.5, 40)))[::-1]  # The argument falls along the path.
        errors = np.exp(0.3 * noise(rng, 40, rho))
        linear = fit_growth(u, (2 + 3 * u) * errors, num_resamples=200, seed=seed).linear
        power = fit_growth(u, 4 * u**1.3 * errors, num_resamples=200, seed=seed).power
        both = ratio(5 * errors, np.ones(40), num_resamples=200, seed=seed)
        for i, (quantity, truth) in enumerate(
            (
                (linear.constant, 2.0),
                (linear.slope, 3.0),
                (power.factor, 4.0),
                (power.exponent, 1.3),
                (both, 5.0),
            )
        ):
            hits[i] += quantity.low <= truth <= quantity.high
    assert (hits / NUM_DRAWS >= 0.85).all(), hits / NUM_DRAWS


def test_intervals_widen_with_dependence():
    # Without dependence only the quantile of Student's t widens the interval.
    assert widening(0.0, 40, 1) == pytest.approx(1.03, abs=0.01)
    assert widening(0.6, 40, block_length(0.6, 40)) > 1.2
    assert block_length(0.0, 60) == 1
    assert block_length(0.5, 60) > block_length(0.2, 60)


def test_few_points_have_no_interval():
    found = fit_growth([1.0, 2.0, 4.0], [1.0, 2.0, 4.0])
    assert found.power.exponent == Interval(pytest.approx(1.0))
    assert found.is_subquadratic == "undecided at this scale"
    with pytest.raises(ValueError, match="2 or more"):
        fit_growth([1.0], [1.0])
    with pytest.raises(ValueError, match="positive"):
        fit_growth([1.0, 2.0], [0.0, 1.0])


def test_the_envelope_lies_above_all_points_and_touches_two():
    rng = np.random.default_rng(2)
    u = np.exp(rng.uniform(0, 2, 50))
    constants = (1e4 + 3e5 * u) * np.exp(0.4 * rng.normal(size=50))
    constant, slope = envelope(u, constants)
    line = constant + slope * u
    assert (line >= constants * (1 - 1e-9)).all()
    assert ((line - constants) / constants < 1e-6).sum() >= 1
    assert constant >= 0
    assert slope >= 0


def test_verdicts_are_the_intervals():
    assert below(Interval(1.0, 0.5, 1.9), 2.0) == "confirmed"
    assert below(Interval(3.0, 2.1, 4.0), 2.0) == "refuted"
    assert below(Interval(1.9, 1.5, 2.1), 2.0) == "undecided at this scale"
