"""The search for a first-order rate, on made-up trainings and on real ones."""

import math

import numpy as np
import pytest
import torch

from tests.theory.small import Quadratic, batch_of, loss
from zofo.theory.curvature import along_update
from zofo.theory.probe import Probe, untouched
from zofo.theory.virtual import (
    MAX_RATES,
    RATIO,
    Beginning,
    VirtualRun,
    num_virtual_steps,
    search_rate,
    virtual_training,
)


def made_up(best, *, noise=0.01, blows_up_at=math.inf, flat=False):
    """Trainings whose loss is a parabola in the logarithm of the rate."""
    tried = []

    def train(rate):
        tried.append(rate)
        start = Beginning(np.full(40, 1.0), (1.0,) * 10)
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
    """Its standard error is large, and so is the harm that it does."""

    def train(rate):
        generator = np.random.default_rng(round(1e6 * rate))
        swing = 50.0 if rate > 0.02 else 0.01
        held = 1 + swing * generator.exponential(size=40) * generator.choice([0.0, 4.0], size=40)
        return VirtualRun(
            rate,
            tuple(1 + swing * generator.random(10)),
            held,
            Beginning(np.full(40, 1.0), (1.0,) * 10),
        )

    assert search_rate(train, start=1e-2, num_steps=10, horizon=10).best < 0.02


def test_rates_that_only_do_harm_are_left_for_smaller_ones():
    """Of two bad rates the less bad is no choice, however close they are to each other."""

    def train(rate):
        level = 1.0 if rate < 2e-3 else 1.04
        start = Beginning(np.full(40, 1.0), (1.0,) * 10)
        return VirtualRun(rate, (level,) * 10, np.full(40, level), start)

    found = search_rate(train, start=1e-2, num_steps=10, horizon=10)
    assert found.best < 2e-3
    assert not found.is_below_harm


@pytest.mark.parametrize("apart", [1.0, 1.015, 1.03, 1.5])
def test_harm_is_seen_on_the_same_rows(apart):
    """Fresh batches with other losses than the held-aside rows, as rows and dropout have it."""

    def train(rate):
        level = 2.0 - 0.2 * min(rate, 1e-2) / 1e-2
        start = Beginning(np.full(40, 2.0), (2.0 * apart,) * 10)
        return VirtualRun(rate, (level * apart,) * 10, np.full(40, level), start)

    found = search_rate(train, start=1e-3, num_steps=20, horizon=20)
    assert found.best >= 1e-2 / RATIO
    assert not found.is_below_harm


def test_where_every_rate_did_harm_that_is_said():
    def train(rate):
        start = Beginning(np.full(40, 1.0), (1.0,) * 10)
        return VirtualRun(rate, (1.1,) * 10, np.full(40, 1.1), start)

    found = search_rate(train, start=1e-2, num_steps=10, horizon=10)
    assert found.is_below_harm
    assert found.best < min(run.rate for run in found.runs)


def test_the_length_of_a_short_training_follows_the_run():
    assert [num_virtual_steps(n) for n in (10, 100, 10_000)] == [5, 10, 20]


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
    # Before its first step a run sees what it is compared with.
    assert first.losses[0] == first.start.fresh[0]
    assert len(first.start.fresh) == 8
    assert torch.equal(model.adapter, before)
    # Two micro-batches of two forward-equivalents a step, their losses at the start, and the
    # held-aside rows twice.
    assert probe.cost == pytest.approx(2 * (8 * 2 * 2 + 8 * 2 + 2 * len(probe.held) / 8))


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
