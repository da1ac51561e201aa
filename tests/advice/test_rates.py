"""Tests of the learning rates that follow from moments.

The references are closed forms, limits, and Monte Carlo estimates.
"""

import math
from itertools import pairwise

import numpy as np
import pytest

from zofo.advice.caps import cap, epochs_to
from zofo.advice.curvature import Directions
from zofo.advice.moments import moments, total
from zofo.advice.rates import (
    FAR,
    NEAR,
    bend,
    best_constant_rate,
    decrease,
    is_stable,
    loss_after,
    noise_per_step,
    stable_rate,
    zeroth_rate,
)
from zofo.errors import UserError
from zofo.statistics.resampling import interval, resamples


def measured(eigenvalues, gradient, row_noise, *, num=2000, rows=8, seed=0, loss=1.0, signs=False):
    """Return random directions of a quadratic with a diagonal Hessian.

    Row gradients have i.i.d. noise of total variance `row_noise`.
    """
    generator = np.random.default_rng(seed)
    d = len(eigenvalues)
    v = generator.normal(size=(num, d))
    v = np.sign(v) if signs else v
    noise = generator.normal(size=(num, rows, d)) * math.sqrt(row_noise / d)
    slopes = ((gradient + noise) * v[:, None, :]).sum(axis=2)
    return Directions(slopes, v**2 @ eigenvalues, np.full(num, loss), d, 1e-3)


EIGENVALUES = np.array([1.0] * 20 + [5.0, 10.0])
GRADIENT = np.concatenate((np.full(20, 0.1), [1.0, -2.0]))


def test_moments_are_those_of_the_quadratic():
    found = moments(measured(EIGENVALUES, GRADIENT, 3.0))
    square = GRADIENT @ GRADIENT
    rayleigh = GRADIENT @ (EIGENVALUES * GRADIENT) / square
    assert found.signal == pytest.approx(square, rel=0.15)
    # The variance of a row's slope is that of the gradient noise, summed over the weights.
    assert found.row_noise == pytest.approx(3.0, rel=0.1)
    assert found.trace == pytest.approx(EIGENVALUES.sum(), rel=0.03)
    # E s² contains the noise, which points in no preferred direction. The curvature along it is
    # therefore the mean eigenvalue.
    noise = 3.0 / 8
    blended = (square * rayleigh + noise * EIGENVALUES.mean()) / (square + noise)
    assert found.rayleigh == pytest.approx(blended, rel=0.3)


def test_signal_is_unbiased_where_there_is_none():
    found = moments(measured(EIGENVALUES, np.zeros(22), 3.0, num=8000))
    assert abs(found.signal) < 0.03
    assert abs(np.square(measured(EIGENVALUES, np.zeros(22), 3.0).slopes.mean(axis=1)).mean()) > 0.3


def test_intervals_of_few_directions_hold_the_truth():
    """The 95% interval from six directions contains the true trace in at least 80 of 100 draws.

    The interval is a bootstrap with expanded percentiles.
    """
    hits = 0
    for seed in range(100):
        directions = measured(EIGENVALUES, GRADIENT, 0.5, num=6, seed=seed)
        low, high = (getattr(moments(directions).intervals()["trace"], k) for k in ("low", "high"))
        hits += low <= EIGENVALUES.sum() <= high
    assert hits >= 80


def test_expanded_percentiles_are_wider_for_small_samples():
    values = np.random.default_rng(0).normal(size=5)
    means = values[resamples(5)].mean(axis=1)
    found = interval(values.mean(), means, 5)
    plain = np.quantile(means, [0.025, 0.975])
    assert found.high - found.low > plain[1] - plain[0]


def second_moments(rate, eigenvalues, num_directions):
    """Return the matrix of the recursion that the docstring of `zofo.advice.rates` states."""
    k, lam = num_directions, np.asarray(eigenvalues)
    diagonal = np.diag(1 - 2 * rate * lam + (1 + 1 / k) * (rate * lam) ** 2)
    return diagonal + rate**2 / k * np.outer(np.ones_like(lam), lam**2)


@pytest.mark.parametrize("num_directions", [1, 2, 5])
@pytest.mark.parametrize("eigenvalues", [[1.0], [1.0] * 50, [100.0, 1.0, 0.1], EIGENVALUES])
def test_stability_is_that_of_the_recursion(eigenvalues, num_directions):
    for rate in np.geomspace(1e-4, 3, 200):
        radius = np.abs(np.linalg.eigvals(second_moments(rate, eigenvalues, num_directions))).max()
        if abs(radius - 1) > 1e-9:
            assert is_stable(rate, eigenvalues, num_directions) == (radius < 1)
    bound = stable_rate(sum(eigenvalues), max(eigenvalues), num_directions)
    assert is_stable(0.999 * bound, eigenvalues, num_directions)
    # For equal eigenvalues the sufficient condition is also necessary.
    if len(set(eigenvalues)) == 1:
        assert not is_stable(1.001 * bound, eigenvalues, num_directions)


@pytest.mark.parametrize("num_directions", [1, 3])
def test_the_recursion_is_what_gaussian_directions_do(num_directions):
    generator = np.random.default_rng(0)
    eigenvalues, x0, rate = np.array([3.0, 1.0, 0.5, 0.2]), np.array([1.0, -1.0, 2.0, 0.5]), 0.1
    x = np.tile(x0, (200_000, 1))
    expected = x0**2
    for _ in range(3):
        v = generator.normal(size=(num_directions, *x.shape))
        scalars = (v * (eigenvalues * x)).sum(axis=2, keepdims=True)
        x = x - rate * (scalars * v).mean(axis=0)
        expected = second_moments(rate, eigenvalues, num_directions) @ expected
    assert np.square(x).mean(axis=0) == pytest.approx(expected, rel=0.03)


@pytest.mark.parametrize(("factor", "falls"), [(0.95, True), (1.05, False)])
def test_signs_with_a_diagonal_hessian_are_stable_up_to_two_over_the_trace(factor, falls):
    lam = EIGENVALUES
    rate = factor * 2 / lam.sum()
    # Signs have v_i² = 1, which leaves the recursion m_i ← (1 − 2ηλ_i) m_i + η² Σ_j λ_j² m_j.
    matrix = np.diag(1 - 2 * rate * lam) + rate**2 * np.outer(np.ones_like(lam), lam**2)
    assert (np.abs(np.linalg.eigvals(matrix)).max() < 1) == falls


def test_the_best_single_step_is_the_best():
    signal, noise, curvature = 4.0, 2.0, 30.0
    best = best_constant_rate(1, loss=100.0, signal=signal, noise=noise, curvature=curvature)
    assert best == pytest.approx(signal / ((signal + noise) * curvature), rel=0.04)
    gains = [
        decrease(best * f, signal=signal, noise=noise, curvature=curvature) for f in (0.8, 1, 1.25)
    ]
    assert max(gains) == gains[1]


def test_the_best_constant_rate_falls_with_the_horizon():
    rates = [
        best_constant_rate(n, loss=1.0, signal=4.0, noise=2.0, curvature=30.0)
        for n in (1, 10, 100, 1000, 10000)
    ]
    assert all(a >= b for a, b in pairwise(rates))
    assert rates[-1] < 0.1 * rates[0]


def test_the_loss_after_n_steps_is_that_of_the_recursion():
    rate, loss, signal, noise, curvature = 0.01, 2.0, 3.0, 1.0, 20.0
    expected = loss
    for _ in range(50):
        g = signal * expected / loss
        expected -= rate * g - 0.5 * rate**2 * (g + noise) * curvature
    after = loss_after(rate, 50, loss=loss, signal=signal, noise=noise, curvature=curvature)
    assert float(after) == pytest.approx(expected, rel=0.03)
    still = loss_after(rate, 50, loss=loss, signal=0.0, noise=noise, curvature=curvature)
    assert float(still) == pytest.approx(loss + 50 * 0.5 * rate**2 * noise * curvature)


def advised(directions, **more):
    options = {"batch_rows": 8, "num_steps": 100, "trusted_to": 0.1, **more}
    return zeroth_rate(moments(directions), **options)


def test_no_signal_asks_for_a_rate_that_does_no_harm():
    found = advised(measured(EIGENVALUES, np.zeros(22), 3.0, num=6, seed=1), trusted_to=10.0)
    assert found.limited_by in ("no signal", "horizon")
    rise = 100 * 0.5 * found.rate**2 * found.noise * EIGENVALUES.sum()
    assert rise < 0.05


@pytest.mark.parametrize("eigenvalues", [-EIGENVALUES, 0 * EIGENVALUES])
def test_without_positive_curvature_the_rate_stays_within_what_was_seen(eigenvalues):
    found = advised(measured(eigenvalues, GRADIENT, 0.5, num=6))
    assert found.limited_by == "reach"
    slopes = np.abs(measured(eigenvalues, GRADIENT, 0.5, num=6).slopes.mean(axis=1))
    assert found.rate * slopes.max() == pytest.approx(0.1)
    assert math.isinf(found.one_step)


def test_a_loss_that_does_not_depend_on_the_block_leaves_it_where_it_is():
    found = advised(measured(0 * EIGENVALUES, np.zeros(22), 0.0, num=6))
    assert found.rate == 0


ONE_LARGE = np.array([10.0] + [0.01] * 49)


@pytest.mark.parametrize("num_directions", [1, 4, 16])
@pytest.mark.parametrize(
    ("eigenvalues", "gradient"),
    [
        (EIGENVALUES, GRADIENT),
        (ONE_LARGE, np.array([1.0] + [0.0] * 49)),
        # The gradient has no component along the largest curvature.
        (ONE_LARGE, np.array([0.0] + [0.3] * 49)),
    ],
)
@pytest.mark.parametrize("num", [6, 4000])
def test_the_rate_is_stable(eigenvalues, gradient, num, num_directions):
    """Four thousand directions give a stable rate.

    Six directions give one in at least 98 of 100 draws, or in 70 where one large eigenvalue
    dominates the trace.
    """

    def holds(seed):
        directions = measured(eigenvalues, gradient, 0.5, num=num, seed=seed, loss=10.0)
        found = advised(directions, trusted_to=math.inf, num_directions=num_directions)
        return is_stable(found.rate, eigenvalues, num_directions)

    if num == 6:
        at_least = 98 if eigenvalues is EIGENVALUES else 70
        assert sum(map(holds, range(100))) >= at_least
    else:
        assert holds(0)


def test_curvature_along_the_gradient_of_an_indefinite_hessian():
    eigenvalues = np.array([10.0] * 10 + [-9.95] * 10)
    gradient = np.array([1.0] * 10 + [0.0] * 10)
    found = moments(measured(eigenvalues, gradient, 1e-6, num=20_000))
    assert found.trace == pytest.approx(0.5, abs=1.0)
    assert found.rayleigh == pytest.approx(10, rel=0.1)
    assert found.careful_largest >= 10


def test_curvature_along_the_gradient_is_unbiased_for_few_directions():
    """Six directions give an unbiased estimate of the curvature along the gradient.

    The one weight has curvature 3 along its gradient on top of a constant 100.
    """
    generator = np.random.default_rng(0)
    found = []
    for _ in range(4000):
        v = generator.normal(size=(6, 1))
        curvatures = 100 + 3.0 * v[:, 0] ** 2
        slopes = np.repeat(v, 2, axis=1)
        found.append(moments(Directions(slopes, curvatures, np.ones(6), 1, 1e-3)))
    size = np.mean([m.mean_square for m in found])
    shared = np.mean([m.rayleigh * m.mean_square for m in found])
    assert shared / size == pytest.approx(3.0, rel=0.05)


def test_the_spread_of_curvatures_is_the_frobenius_norm():
    found = moments(measured(EIGENVALUES, GRADIENT, 3.0, num=20_000))
    assert found.spread == pytest.approx(np.linalg.norm(EIGENVALUES), rel=0.05)
    assert EIGENVALUES.max() <= found.careful_largest <= 1.2 * np.linalg.norm(EIGENVALUES)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_loss_that_is_not_finite_along_a_direction_is_refused(bad):
    directions = measured(EIGENVALUES, GRADIENT, 3.0, num=6)
    directions.curvatures[2] = bad
    with pytest.raises(UserError, match="1 of 6 directions"):
        moments(directions)


def test_pretrained_weights_wander_less_where_nothing_is_gained():
    for gradient, limit in ((GRADIENT, FAR), (0 * GRADIENT, NEAR)):
        directions = measured(1e-9 * EIGENVALUES, gradient, 3.0, num=40)
        found = advised(directions, trusted_to=1e9, pretrained_scale=0.05)
        assert found.limited_by == "drift"
        walked = found.rate * math.sqrt(100 * np.square(directions.slopes.mean(axis=1)).mean())
        assert walked == pytest.approx(limit * 0.05, rel=0.1)


def test_more_directions_a_step_allow_a_larger_rate():
    directions = measured(EIGENVALUES, GRADIENT, 0.5, num=50)
    rates = [advised(directions, trusted_to=9.0, num_directions=k).rate for k in (1, 2, 4)]
    assert rates[0] < rates[1] < rates[2] < 4 * rates[0]


def test_groups_add_up_to_the_block():
    halves = [
        measured(EIGENVALUES[a:b], GRADIENT[a:b], 1.5, num=3000, seed=a)
        for a, b in ((0, 11), (11, 22))
    ]
    whole, parts = moments(measured(EIGENVALUES, GRADIENT, 3.0, num=3000)), map(moments, halves)
    summed = total(list(parts))
    assert summed.trace == pytest.approx(whole.trace, rel=0.05)
    assert summed.signal == pytest.approx(whole.signal, rel=0.2)
    assert summed.row_noise == pytest.approx(whole.row_noise, rel=0.1)
    assert summed.num_weights == 22


def test_caps_are_the_theorems():
    found = cap(50.0, batches=100, epochs=4, num_weights=1000)
    assert found.first == pytest.approx(1 / (50 * 100 * 1000))
    assert found.second == pytest.approx(1 / (20 * 50))
    assert found.rate == found.first
    other = cap(50.0, batches=100, epochs=4, reading="sqrt(T)n")
    assert other.second == pytest.approx(1 / (200 * 50))
    assert other.first == pytest.approx(1 / (50 * 100))
    assert cap(-1.0, batches=10, epochs=1).rate == math.inf
    assert epochs_to(0.1, batches=100, risk=0.1) == pytest.approx(1000 + 100)


@pytest.mark.parametrize("num_directions", [1, 2, 8])
def test_the_expected_change_of_directions_that_rows_share(num_directions):
    """Monte Carlo on f = h/2 ‖x‖² with Gaussian directions and rows of independent noise."""
    d, rows, h, row_noise, rate, draws = 10, 8, 2.0, 3.0, 0.02, 200_000
    generator = np.random.default_rng(0)
    gradient = np.linspace(-0.5, 1.0, d)
    changes = np.zeros(draws)
    of_rows = np.arange(rows) % num_directions
    for part in np.array_split(np.arange(draws), 20):
        v = generator.normal(size=(len(part), num_directions, d))
        noise = generator.normal(size=(len(part), rows, d)) * math.sqrt(row_noise / d)
        slopes = ((gradient + noise) * v[:, of_rows]).sum(axis=2) / rows  # [draws, rows]
        estimate = (slopes[:, :, None] * v[:, of_rows]).sum(axis=1)
        changes[part] = -rate * estimate @ gradient + rate**2 * h / 2 * (estimate**2).sum(axis=1)
    trace, rayleigh = h * d, h
    curvature = {"trace": trace, "rayleigh": rayleigh, "num_directions": num_directions}
    expected = decrease(
        rate,
        signal=gradient @ gradient,
        noise=noise_per_step(row_noise, rows, **curvature, by_rows=True),
        curvature=bend(**curvature),
    )
    error = changes.std() / math.sqrt(draws)
    assert -changes.mean() == pytest.approx(expected, abs=4 * error)
    assert 4 * error < 0.1 * abs(expected)


def test_a_direction_a_row_allows_a_larger_rate_where_rows_agree_and_none_where_they_do_not():
    options = {"batch_rows": 8, "num_steps": 100, "trusted_to": 1e9}
    rows = {"num_directions": 8, "by_rows": True}
    agreeing = moments(measured(EIGENVALUES, GRADIENT, 1e-3))
    gain = zeroth_rate(agreeing, **options, **rows).one_step
    # Equal rows average over 8 directions: (tr H + 2 κ) / 8 + 7 κ / 8 instead of tr H + 2 κ.
    kappa = GRADIENT @ (EIGENVALUES * GRADIENT) / (GRADIENT @ GRADIENT)
    one = EIGENVALUES.sum() + 2 * kappa
    expected = one / (one / 8 + 7 * kappa / 8)
    assert gain / zeroth_rate(agreeing, **options).one_step == pytest.approx(expected, rel=0.15)
    assert expected > 3
    noisy = moments(measured(EIGENVALUES, GRADIENT, 1e4))
    same = zeroth_rate(noisy, **options, **rows)
    assert same.noise * same.curvature == pytest.approx(
        zeroth_rate(noisy, **options).noise * zeroth_rate(noisy, **options).curvature, rel=0.05
    )
