"""Fits recover the exponents of synthetic data, and claims are judged by the documented rule."""

import numpy as np
import pytest

from zofo.convergence import claims, fits
from zofo.convergence.claims import CONFIRMED, REFUTED, UNDECIDED, Claim
from zofo.convergence.epochs import epochs_to
from zofo.convergence.experiments.table import CLAIMS
from zofo.statistics.resampling import Interval

NUM_SEEDS = 24
T = np.array([16.0, 32, 64, 128, 256, 512])


def synthetic(noise=0.05, seed=0):
    """Return the values a / (γ T) + b γ, times one random factor per seed, and the rates γ.

    The best rate is √(a / (b T)), and the best value is 2 √(a b / T).
    """
    generator = np.random.default_rng(seed)
    rates = 2.0 ** np.arange(-8, 2, 1 / 3)
    exact = 3.0 / (rates * T[:, None]) + 0.5 * rates
    factor = np.exp(noise * generator.standard_normal((1, 1, NUM_SEEDS)))
    return exact[:, :, None] * factor, rates


def test_tuning_finds_rate_and_value_between_the_grids_points():
    values, rates = synthetic(noise=0)
    tuned = fits.tune(values, rates, fits.resamples(NUM_SEEDS, 10))
    assert np.exp(tuned.log_value[:, 0]) == pytest.approx(2 * np.sqrt(1.5 / T), rel=2e-3)
    assert np.exp(tuned.log_rate[:, 0]) == pytest.approx(np.sqrt(6 / T), rel=0.01)
    assert tuned.is_inside.all()


def test_the_exponent_is_recovered():
    values, rates = synthetic()
    tuned = fits.tune(values, rates, fits.resamples(NUM_SEEDS))
    found = fits.exponent(T, tuned.log_value)
    assert found.value == pytest.approx(-0.5, abs=0.005)
    assert found.low <= -0.5 + 0.005
    assert found.high >= -0.5 - 0.005


def test_intervals_hold_the_truth_as_often_as_they_say():
    """The 95% interval contains the true slope in at least 88% of 200 draws.

    The lower bound is about four standard deviations of the binomial below 95%.
    """
    generator = np.random.default_rng(5)
    weights, hits = fits.resamples(NUM_SEEDS, 300), 0
    x = T[:4]
    for _ in range(200):
        noise = np.exp(0.3 * generator.standard_normal((len(x), NUM_SEEDS)))
        found = fits.interval(fits.slopes(np.log(x), np.log(fits.means(noise, weights))))
        hits += found.low <= 0 <= found.high
    assert 0.88 * 200 <= hits <= 200


def test_the_interval_widens_where_the_exponent_drifts():
    x = np.geomspace(1, 100, 8)
    log_y = np.tile((np.log(1 + x) - 2 * np.log(x))[:, None], (1, 5))
    found = fits.exponent(x, log_y)
    assert found.high - found.low > 0.1
    straight = fits.exponent(x, np.tile(-np.log(x)[:, None], (1, 5)))
    assert straight.high - straight.low < 1e-12


def test_infinite_values_lose():
    values, rates = synthetic()
    values[:, -5:, 0] = np.inf
    tuned = fits.tune(values, rates, fits.resamples(NUM_SEEDS, 50))
    assert np.isfinite(tuned.log_value).all()
    assert (tuned.log_rate <= np.log(rates[-6])).all()


def test_a_best_rate_at_the_end_of_the_grid_is_noticed():
    values, rates = synthetic()
    tuned = fits.tune(values[:, :6], rates[:6], fits.resamples(NUM_SEEDS, 10))
    assert not tuned.is_inside.any()


def test_values_at_given_rates_are_interpolated():
    values, rates = synthetic(noise=0)
    weights = fits.resamples(NUM_SEEDS, 5)
    wanted = np.sqrt(6 / T)
    found = fits.at_rates(values, rates, wanted, weights)
    assert np.exp(found[:, 0]) == pytest.approx(2 * np.sqrt(1.5 / T), rel=0.01)
    assert np.isnan(fits.at_rates(values, rates, wanted * 1e6, weights)).all()


def test_epochs_to_a_target():
    log_values = np.log(5 / np.sqrt(T))[:, None]
    found = epochs_to(T, log_values, np.log(5 / np.sqrt(100.0)))
    assert np.exp(found) == pytest.approx([100.0])
    assert np.isnan(epochs_to(T, log_values, np.log(1e-3))).all()


def claim_of(claimed, candidates=None):
    return Claim("c", "order", "s", "s", lambda: None, {}, claimed, candidates or {})


POWERS = {"half": -0.5, "two thirds": -2 / 3, "one": -1.0}


@pytest.mark.parametrize(
    ("low", "high", "outcome"),
    [
        (-0.52, -0.49, CONFIRMED),
        (-0.68, -0.65, REFUTED),
        (-0.6, -0.5, UNDECIDED),  # The ends of the interval are nearest to different powers.
        # The power 1/2 is nearest, but the distance to it is too large.
        (-0.575, -0.57, UNDECIDED),
        (-1.2, -0.3, UNDECIDED),
        (float("nan"), float("nan"), UNDECIDED),
    ],
)
def test_exponents_are_judged(low, high, outcome):
    found = Interval((low + high) / 2, low, high)
    assert claims.judge(claim_of("half", POWERS), found)[0] == outcome


@pytest.mark.parametrize(
    ("low", "high", "outcome"),
    [(0.3, 0.9, CONFIRMED), (1.1, 1.2, REFUTED), (0.9, 1.1, UNDECIDED)],
)
def test_ranges_are_judged(low, high, outcome):
    found = Interval((low + high) / 2, low, high)
    assert claims.judge(claim_of((0.0, 1.0)), found)[0] == outcome


def test_what_cannot_be_trusted_is_undecided():
    outcome, reason = claims.judge(claim_of("half", POWERS), Interval(-0.5, -0.5, -0.5, "edge"))
    assert (outcome, reason) == (UNDECIDED, "edge")


def test_every_claim_names_one_of_its_candidates():
    for claim in CLAIMS:
        assert isinstance(claim.claimed, tuple) or claim.claimed in claim.candidates, claim.name
    assert len({claim.name for claim in CLAIMS}) == len(CLAIMS)
