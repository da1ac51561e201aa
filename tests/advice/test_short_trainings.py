"""Tests of the search for a first-order learning rate, on synthetic trainings and on real ones."""

import math

import numpy as np
import pytest
import torch

from tests.support.problems import Quadratic, batch_of, loss
from zofo.advice.curvature import along_update
from zofo.advice.probe import Probe, untouched
from zofo.advice.short_trainings import (
    MAX_RATES,
    RATIO,
    Beginning,
    VirtualRun,
    num_virtual_steps,
    search_rate,
    virtual_training,
)


def made_up(best, *, noise=0.01, blows_up_at=math.inf, flat=False):
    """Return a function that simulates a training, and the list of rates it was called with.

    The loss is a parabola in the logarithm of the rate.
    """
    tried = []

    def train(rate):
        tried.append(rate)
        start = Beginning(np.full(40, 1.0), (1.0,) * 5)
        if rate >= blows_up_at:
            return VirtualRun(rate, (1.0, 2.0), np.empty(0), start)
        level = 1.0 if flat else 0.5 + 0.2 * math.log10(rate / best) ** 2
        generator = np.random.default_rng(len(tried))
        held = level + noise * generator.normal(size=40)
        return VirtualRun(rate, tuple(level + noise * generator.normal(size=10)), held, start)

    return train, tried


@pytest.mark.parametrize("start", [1e-3, 3e-3, 1e-2, 3e-2, 1e-1])
def test_the_best_of_a_ladder_is_found_from_both_sides(start):
    train, tried = made_up(1e-2)
    found = search_rate(train, start=start, num_steps=10, horizon=10)
    assert 1 / RATIO <= found.best / 1e-2 <= RATIO
    assert len(tried) == len(set(tried)) <= MAX_RATES
    assert found.rate == found.best
    assert found.moved


def test_a_longer_run_gets_a_smaller_rate():
    found = search_rate(made_up(1e-2)[0], start=1e-2, num_steps=10, horizon=1000)
    assert found.rate == pytest.approx(found.best / 10)


def test_rates_that_blow_up_are_left_below():
    train, _ = made_up(1.0, blows_up_at=0.05)
    found = search_rate(train, start=1e-2, num_steps=10, horizon=10)
    assert found.best < 0.05
    train, _ = made_up(1.0, blows_up_at=1e-9)
    assert search_rate(train, start=1e-2, num_steps=10, horizon=10).rate < 1e-3


def test_where_nothing_moves_the_largest_harmless_rate_is_taken():
    train, _ = made_up(1.0, flat=True, blows_up_at=0.05)
    found = search_rate(train, start=1e-3, num_steps=10, horizon=10)
    assert 0.05 / RATIO <= found.best < 0.05
    assert not found.moved


def test_a_rate_whose_loss_swings_is_no_equal_of_the_best():
    """A rate whose loss swings does not count as equal to the best one.

    Such a rate has a large standard error, but it also does much harm.
    """

    def train(rate):
        generator = np.random.default_rng(round(1e6 * rate))
        swing = 50.0 if rate > 0.02 else 0.01
        held = 1 + swing * generator.exponential(size=40) * generator.choice([0.0, 4.0], size=40)
        return VirtualRun(
            rate,
            tuple(1 + swing * generator.random(10)),
            held,
            Beginning(np.full(40, 1.0), (1.0,) * 5),
        )

    assert search_rate(train, start=1e-2, num_steps=10, horizon=10).best < 0.02


def test_rates_that_only_do_harm_are_left_for_smaller_ones():
    """The search moves on to smaller rates while every rate does harm.

    It must not choose the less harmful one, however close the two losses are.
    """

    def train(rate):
        level = 1.0 if rate < 2e-3 else 1.08
        start = Beginning(np.full(40, 1.0), (1.0,) * 5)
        return VirtualRun(rate, (level,) * 10, np.full(40, level), start)

    found = search_rate(train, start=1e-2, num_steps=10, horizon=10)
    assert found.best < 2e-3
    assert not found.is_below_harm


@pytest.mark.parametrize("apart", [1.0, 1.015, 1.03, 1.5])
def test_harm_is_seen_on_the_same_rows(apart):
    """Harm is judged on the same rows before and after.

    Fresh batches may have other losses than the held-aside rows, because the rows differ and
    dropout is active.
    """

    def train(rate):
        level = 2.0 - 0.2 * min(rate, 1e-2) / 1e-2
        start = Beginning(np.full(40, 2.0), (2.0 * apart,) * 5)
        return VirtualRun(rate, (level * apart,) * 10, np.full(40, level), start)

    found = search_rate(train, start=1e-3, num_steps=20, horizon=20)
    assert found.best >= 1e-2 / RATIO
    assert not found.is_below_harm


@pytest.mark.parametrize(("last_half", "is_harmful"), [(1.0, False), (1.3, True)])
def test_a_loss_that_rises_and_comes_back_is_no_harm(last_half, is_harmful):
    """A rate does no harm if its loss rises first and then comes back.

    On MiniLM with a prompt, only the largest rates learn in a whole run, and their loss rises
    first.
    """
    start = Beginning(np.full(40, 1.0), (1.0,) * 5)
    losses = (1.6,) * 5 + (last_half,) * 5
    run = VirtualRun(1e-1, losses, np.full(40, last_half), start)
    assert run.is_harmful == is_harmful


@pytest.mark.parametrize("gain", [0.0, 0.1])
def test_only_a_rate_that_has_moved_is_better_than_others(gain):
    """The search prefers a smaller rate only if that rate has lowered the loss.

    The larger rate is 3% worse here, and it still wins over a rate that stands still.
    """

    def train(rate):
        generator = np.random.default_rng(round(1e6 * rate))
        level = 1.03 if rate > 2e-2 else 1.0 - gain
        start = Beginning(np.full(40, 1.0), (1.0,) * 5)
        held = level + (0.01 if rate < 0.05 else 2.0) * np.abs(generator.normal(size=40))
        return VirtualRun(rate, (level,) * 10, held, start)

    found = search_rate(train, start=1e-2, num_steps=10, horizon=10)
    assert (found.best > 2e-2) == (gain == 0)
    assert found.best < 0.05


def test_of_rates_that_rise_and_come_back_the_largest_is_taken():
    def train(rate):
        start = Beginning(np.full(40, 1.0), (1.0,) * 5)
        level = 1.0 if rate < 0.2 else 2.0
        losses = (1.0 + 5 * rate,) * 5 + (level,) * 5
        return VirtualRun(rate, losses, np.full(40, level), start)

    found = search_rate(train, start=1e-2, num_steps=10, horizon=10)
    assert 0.2 / RATIO <= found.best < 0.2


def test_where_every_rate_did_harm_that_is_said():
    def train(rate):
        start = Beginning(np.full(40, 1.0), (1.0,) * 5)
        return VirtualRun(rate, (1.1,) * 10, np.full(40, 1.1), start)

    found = search_rate(train, start=1e-2, num_steps=10, horizon=10)
    assert found.is_below_harm
    assert found.best < min(run.rate for run in found.runs)


def test_the_length_of_a_short_training_follows_the_run():
    assert [num_virtual_steps(n) for n in (10, 100, 10_000)] == [5, 20, 50]


def test_a_short_training_lowers_a_quadratic_and_repeats_itself():
    model = Quadratic([1.0], [1.0, 4.0, 10.0])
    probe = Probe(model, loss, batch_of, num_rows=128, batch_size=8)
    before = model.adapter.detach().clone()

    def run():
        with untouched(model, [model.adapter], seed=0):
            return virtual_training(
                probe,
                [model.adapter],
                0.1,
                optimizer=lambda p, lr: torch.optim.SGD(p, lr=lr),
                num_steps=8,
                accumulation=2,
            )

    first, second = run(), run()
    assert first.losses == second.losses
    assert np.array_equal(first.held, second.held)
    assert first.decrease > 0.5 * (float(first.start.held.mean()) - 0.5)
    assert len(first.losses) == 8
    assert len(first.start.fresh) == len(first.last_half) == 4
    assert torch.equal(model.adapter, before)
    # Each of the 8 steps runs 2 micro-batches of 2 forward-equivalents. At the start the losses of
    # half of these micro-batches are computed, and the held-aside rows are evaluated twice.
    assert probe.cost == pytest.approx(2 * (8 * 2 * 2 + 4 * 2 + 2 * len(probe.held) / 8))


@pytest.mark.parametrize("num_steps", [5, 8])
def test_a_training_that_does_not_move_is_what_it_is_compared_with(num_steps):
    """A training at rate zero equals its own reference.

    Both see the same rows, micro-batches and dropout masks.
    """
    model = Quadratic([1.0], [1.0, 4.0, 10.0])

    def masked(m, rows):
        value, shares = loss(m, rows)
        factor = 1 + torch.nn.functional.dropout(torch.ones(1), 0.5, m.training).double()
        return value * factor.mean(), shares * factor

    probe = Probe(model, masked, batch_of, num_rows=128, batch_size=8)
    with untouched(model, [model.adapter], seed=0):
        run = virtual_training(
            probe,
            [model.adapter],
            0.0,
            optimizer=lambda p, lr: torch.optim.SGD(p, lr=lr),
            num_steps=num_steps,
            accumulation=2,
        )
    assert run.last_half == pytest.approx(run.start.fresh)
    assert len(set(run.losses)) > 1
    assert run.score == pytest.approx(run.start.score)
    assert not run.is_harmful


@pytest.mark.parametrize("is_sign", [False, True])
def test_curvature_along_an_update_is_the_hessians(is_sign):
    curves = torch.tensor([1.0, 4.0, 10.0], dtype=torch.float64)
    model = Quadratic([1.0], curves.tolist())
    before = model.adapter.detach().clone()
    rows = torch.arange(128)

    def gradient():
        model(rows).mean().backward()

    found = along_update([model.adapter], gradient, is_sign=is_sign)
    model(rows).mean().backward()
    g = model.adapter.grad
    u = g.sign() if is_sign else g
    assert found.slope == pytest.approx(float(g @ u))
    assert found.curvature == pytest.approx(float(u @ (curves * u)), rel=1e-6)
    assert found.rayleigh == pytest.approx(float(u @ (curves * u) / (u @ u)), rel=1e-6)
    assert found.best_rate == pytest.approx(float(g @ u / (u @ (curves * u))), rel=1e-6)
    assert torch.equal(model.adapter, before)
