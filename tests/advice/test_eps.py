"""Tests of the plateau of eps.

Synthetic ladders have closed forms; real losses are tested in three dtypes.
"""

import math

import numpy as np
import pytest
import torch
from torch import nn

from zofo.advice.eps import Ladder, measure_ladder, plateau, weight_scale
from zofo.advice.probe import Probe
from zofo.noise.combine import direction
from zofo.optim.blocks import split_parameters
from zofo.perturb.view import Perturbation


def made_up(eps, *, slope=2.0, curvature=500.0, third=0.0, rounding=1e-7, directions=8, seed=0):
    """Return a synthetic ladder and the RMS of its slopes, curvatures and third derivatives.

    The loss is 1 at the start of every direction. Every loss has a rounding error of size
    `rounding`.
    """
    generator = np.random.default_rng(seed)
    s, c, t = (scale * generator.normal(size=directions) for scale in (slope, curvature, third))
    h = np.asarray(eps)[:, None]

    def noisy(values):
        return values + rounding * generator.normal(size=np.shape(values))

    ahead = 1 + h * s + h**2 * c / 2 + h**3 * t / 6
    behind = 1 - h * s + h**2 * c / 2 - h**3 * t / 6
    ladder = Ladder(np.asarray(eps), noisy(ahead), noisy(behind), noisy(np.ones(directions)))
    size = [float(np.sqrt((x**2).mean())) for x in (s, c, t)]
    return ladder, size


RUNGS = np.geomspace(1e-7, 1, 13)


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("rounding", [1e-9, 1e-7])
def test_the_forward_plateau_is_between_rounding_and_curvature(rounding, seed):
    ladder, (slope, curvature, _) = made_up(RUNGS, rounding=rounding, seed=seed)
    found = plateau(ladder, "forward")
    low = np.sqrt(2) * rounding / slope / 0.1
    high = 0.1 * 2 * slope / curvature
    assert found.exists
    assert 1 / 3 < found.low / low < 3
    assert 1 / 3 < found.high / high < 3
    assert 1 / 3 < found.eps / np.sqrt(low * high) < 3


@pytest.mark.parametrize("seed", range(5))
def test_the_central_plateau_is_between_rounding_and_the_third_derivative(seed):
    ladder, (slope, _, third) = made_up(RUNGS, third=1e4, seed=seed)
    found = plateau(ladder, "central")
    low = 1e-7 / np.sqrt(2) / slope / 0.1
    high = np.sqrt(0.1 * 6 * slope / third)
    assert 1 / 3 < found.low / low < 3
    assert 1 / 3 < found.high / high < 3
    assert 1 / 3 < found.eps / np.sqrt(low * high) < 3
    assert found.eps > plateau(ladder, "forward").eps


def test_where_rounding_meets_curvature_there_is_none():
    ladder, (_, curvature, _) = made_up(RUNGS, rounding=1e-3)
    found = plateau(ladder, "forward")
    assert not found.exists
    assert found.error > 0.1
    assert found.eps == pytest.approx(np.sqrt(2 * np.sqrt(2) * 1e-3 / curvature), rel=2)


def test_a_loss_that_no_direction_moves_has_none():
    flat = Ladder(RUNGS, np.ones((13, 3)), np.ones((13, 3)), np.ones(3))
    found = plateau(flat)
    assert not found.exists
    assert RUNGS[0] < found.eps < RUNGS[-1]


def test_swallowed_perturbations_are_no_plateau():
    """The plateau excludes radii at which rounding swallows the perturbation.

    Below the spacing of 16-bit weights no weight moves, so the differences there are exactly zero.
    """
    ladder, _ = made_up(RUNGS)
    small = RUNGS < 1e-4
    ladder.ahead[small] = ladder.behind[small] = ladder.at
    assert plateau(ladder).eps > 1e-4


def test_how_far_the_loss_is_a_parabola():
    ladder, _ = made_up(RUNGS, rounding=1e-12)
    assert plateau(ladder).quadratic_to == RUNGS[-1]
    bent, (slope, _, third) = made_up(RUNGS, rounding=1e-12, curvature=0.0, third=600.0)
    # The cubic term is half as large as the linear one where ε² t / 6 = s / 2.
    reach = np.sqrt(3 * slope / third)
    assert reach / 4 < plateau(bent).quadratic_to < reach * 4


class Net(nn.Module):
    """A two-layer classifier on random data."""

    def __init__(self, dtype):
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.first = nn.Linear(32, 64)
        self.second = nn.Linear(64, 3)
        with torch.no_grad():
            for p in self.parameters():
                p.copy_(torch.randn(p.shape, generator=generator) * 0.2)
        self.x = torch.randn(64, 32, generator=generator)
        self.y = torch.randint(0, 3, (64,), generator=generator)
        self.to(dtype)

    def forward(self, rows):
        x = self.x[rows].to(self.first.weight.dtype)
        logits = self.second(torch.tanh(self.first(x)))
        wide = logits if logits.dtype == torch.float64 else logits.float()
        return nn.functional.cross_entropy(wide, self.y[rows], reduction="none")


def rms_error(net, eps, estimator, seed=5, num=24):
    """Return the relative RMS error of the scalars s at `eps`.

    The reference is autograd in float64.
    """
    names = split_parameters(net).base
    index = split_parameters(net).base_index
    view = Perturbation(net, list(names.values()), [index[n] for n in names], seed=seed)
    twin = Net(torch.float64)
    with torch.no_grad():
        for a, b in zip(twin.parameters(), net.parameters(), strict=True):
            a.copy_(b)
    rows = torch.arange(64)
    exact = torch.autograd.grad(twin(rows).mean(), list(twin.parameters()))
    wrong, size = [], []
    for k in range(num):
        s = sum(
            float((g * direction(g.shape, seed=seed, step=k, tensor=index[n], dtype=g.dtype)).sum())
            for (n, _), g in zip(twin.named_parameters(), exact, strict=True)
        )
        with torch.no_grad():
            with view.at(eps, step=k):
                ahead = float(net(rows).mean())
            if estimator == "forward":
                found = (ahead - float(net(rows).mean())) / eps
            else:
                with view.at(-eps, step=k):
                    found = (ahead - float(net(rows).mean())) / (2 * eps)
        wrong.append((found - s) ** 2)
        size.append(s**2)
    return float(np.sqrt(np.mean(wrong) / np.mean(size)))


@pytest.mark.parametrize("estimator", ["forward", "central"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_the_advised_radius_is_near_the_best_in_every_dtype(dtype, estimator):
    net = Net(dtype).requires_grad_(False)
    names, index = split_parameters(net).base, split_parameters(net).base_index
    probe = Probe(
        net,
        lambda m, rows: (m(rows).mean(), m(rows)),
        lambda rows: torch.tensor(rows),
        num_rows=64,
        batch_size=32,
    )
    view = Perturbation(net, list(names.values()), [index[n] for n in names], seed=1)
    ladder = measure_ladder(
        probe,
        view,
        scale=weight_scale(list(names.values())),
        estimator=estimator,
        is_16_bit=dtype == torch.bfloat16,
    )
    found = plateau(ladder, estimator)
    best = min(rms_error(net, eps, estimator) for eps in np.geomspace(1e-6, 0.3, 12))
    error = rms_error(net, found.eps, estimator)
    # The middle of a wide plateau need not have the smallest error, so the bound leaves room.
    assert error < max(3 * best, 0.02)
    if dtype != torch.bfloat16:
        assert found.exists
        assert error < 0.05
    assert probe.cost <= 3 * 2 * 9 + 3


@pytest.mark.parametrize("estimator", ["forward", "central"])
@pytest.mark.parametrize("bad", [math.inf, math.nan])
def test_rungs_where_the_loss_overflows_do_not_count(estimator, bad):
    """A rung whose losses overflow 16 bits leaves the plateau below it unchanged."""
    eps = np.geomspace(1e-4, 10, 6)
    rounding = np.array([1e-6, -1e-6, 1e-6])
    slopes, curvatures = np.array([1.0, -2.0, 1.5]), np.array([1.0, 2.0, 0.5])

    def losses(sign):
        h = sign * eps[:, None]
        return 1 + h * slopes + h**2 * curvatures / 2 + h**3 + sign * rounding

    ahead, behind = losses(1), losses(-1)
    ahead[4:], behind[4:] = bad, bad
    at = np.ones(3)
    found = plateau(Ladder(eps, ahead, behind, at), estimator)
    without = plateau(Ladder(eps[:4], ahead[:4], behind[:4], at), estimator)
    assert found.eps == pytest.approx(without.eps)
    assert found.exists == without.exists
    assert math.isfinite(found.error)
    assert found.eps < eps[4]
