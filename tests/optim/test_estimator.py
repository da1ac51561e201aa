"""Tests of loss differences: their bias, their second moment, and their exact cases."""

from __future__ import annotations

import pytest
import torch
from scipy import stats
from torch import nn

from tests.support.models import CASES, batch_for, build, loss_of
from zofo.noise.combine import direction
from zofo.optim.blocks import split_parameters
from zofo.optim.estimator import forwards_per_direction, projected_gradients
from zofo.optim.generators import GeneratorState
from zofo.perturb.view import Perturbation

SEED, STEP = 20_260_601, 4
NUM_DIRECTIONS = 600
FALSE_ALARM = 1e-3
"""Probability that a correct estimator fails one test of a mean, over random seeds."""
DENSE = ("rademacher", "gaussian")  # test_rows.py has the moments of rank-one directions


class Quadratic(nn.Module):
    """The loss w'Aw/2 + b'w with an indefinite matrix A."""

    def __init__(self):
        super().__init__()
        generator = torch.Generator().manual_seed(2)
        matrix = torch.randn(6, 6, dtype=torch.float64, generator=generator)
        self.matrix = matrix + matrix.T
        self.slope = torch.randn(6, dtype=torch.float64, generator=generator)
        self.w = nn.Parameter(torch.randn(6, dtype=torch.float64, generator=generator))

    def forward(self):
        return self.w @ self.matrix @ self.w / 2 + self.slope @ self.w


class Nonlinear(nn.Module):
    """A two-layer network with a smooth loss. Every tensor has its own direction."""

    def __init__(self):
        super().__init__()
        generator = torch.Generator().manual_seed(3)
        self.x = torch.randn(5, 2, dtype=torch.float64, generator=generator)
        self.inner, self.outer = nn.Linear(2, 1, bias=False), nn.Linear(1, 1)
        self.double()
        with torch.no_grad():
            for p in self.parameters():
                p.copy_(torch.randn(p.shape, dtype=torch.float64, generator=generator))

    def forward(self):
        return (self.outer(torch.tanh(self.inner(self.x))) - 1).square().mean()


def perturbation_of(model, distribution="rademacher"):
    parameters = list(model.parameters())
    return Perturbation(
        model, parameters, range(len(parameters)), seed=SEED, distribution=distribution
    )


def scalars_of(model, *, estimator, distribution, eps, num_directions=NUM_DIRECTIONS):
    with torch.no_grad():
        loss = model()
    return projected_gradients(
        model,
        perturbation_of(model, distribution),
        loss,
        eps=eps,
        step=STEP,
        num_directions=num_directions,
        estimator=estimator,
    )


def directions_of(model, distribution, num_directions=NUM_DIRECTIONS):
    """Return the directions in float64, [num_directions, number of weights]."""
    return torch.stack(
        [
            torch.cat(
                [
                    direction(
                        p.shape,
                        seed=SEED,
                        step=STEP,
                        tensor=i,
                        index=k,
                        distribution=distribution,
                        dtype=torch.float64,
                    ).flatten()
                    for i, p in enumerate(model.parameters())
                ]
            )
            for k in range(num_directions)
        ]
    )


def gradient_of(model):
    gradients = torch.autograd.grad(model(), list(model.parameters()))
    return torch.cat([g.flatten() for g in gradients])


def assert_mean_is(samples, expected):
    """Assert that every column's mean lies in its confidence interval.

    The interval has a Bonferroni correction over the columns.
    """
    error = samples.std(0) / samples.shape[0] ** 0.5
    z = (samples.mean(0) - expected) / error
    assert float(z.abs().max()) < stats.norm.isf(FALSE_ALARM / (2 * z.numel()))


@pytest.mark.parametrize("distribution", DENSE)
@pytest.mark.parametrize("estimator", ["forward", "central"])
@pytest.mark.parametrize("problem", [Quadratic, Nonlinear])
def test_mean_is_the_gradient_and_second_moment_is_known(problem, estimator, distribution):
    """Both estimators have mean E s v = g and the known second moment E ‖s v‖².

    The second moment is d ‖g‖² for signs and (d + 2) ‖g‖² for Gaussian directions.
    """
    model = problem()
    gradient = gradient_of(model)
    v = directions_of(model, distribution)
    estimates = (
        scalars_of(model, estimator=estimator, distribution=distribution, eps=1e-6)[:, None] * v
    )
    assert_mean_is(estimates, gradient)
    factor = gradient.numel() + (2 if distribution == "gaussian" else 0)
    assert_mean_is(estimates.square().sum(1, keepdim=True), factor * gradient.square().sum())


@pytest.mark.parametrize("distribution", DENSE)
@pytest.mark.parametrize("eps", [1e-3, 1e-1, 2.0])
def test_on_a_quadratic_forward_is_off_by_half_the_curvature_and_central_is_exact(
    eps, distribution
):
    model = Quadratic()
    v = directions_of(model, distribution, 20)
    options = {"distribution": distribution, "eps": eps, "num_directions": 20}
    slope = v @ gradient_of(model)
    curvature = torch.einsum("ki,ij,kj->k", v, model.matrix, v)
    assert float(curvature.abs().min()) > 0.01
    tolerance = {"rtol": 1e-9, "atol": 1e-13 / eps}
    torch.testing.assert_close(
        scalars_of(model, estimator="forward", **options), slope + eps / 2 * curvature, **tolerance
    )
    torch.testing.assert_close(
        scalars_of(model, estimator="central", **options), slope, **tolerance
    )


@pytest.mark.parametrize(("estimator", "order"), [("forward", 1), ("central", 2)])
def test_order_of_the_error_in_eps(estimator, order):
    """Halving eps divides the error of an estimator by 2^order."""
    model = Nonlinear()
    exact = directions_of(model, "rademacher", 8) @ gradient_of(model)

    def error(eps):
        options = {"distribution": "rademacher", "num_directions": 8}
        return (scalars_of(model, estimator=estimator, eps=eps, **options) - exact).abs()

    ratio = error(2e-3) / error(1e-3)
    torch.testing.assert_close(ratio, torch.full_like(ratio, 2.0**order), rtol=0.05, atol=0)


@pytest.mark.parametrize("estimator", ["forward", "central"])
def test_cost_in_forwards(estimator):
    model, calls = Quadratic(), []
    model.register_forward_hook(lambda *_: calls.append(1))
    scalars_of(model, estimator=estimator, distribution="rademacher", eps=1e-3, num_directions=4)
    assert len(calls) - 1 == 4 * forwards_per_direction(estimator)
    assert forwards_per_direction(estimator) == {"forward": 1, "central": 2}[estimator]


def test_forward_difference_needs_the_loss():
    model = Quadratic()
    with pytest.raises(ValueError, match="needs the unperturbed loss"):
        projected_gradients(model, perturbation_of(model), None, eps=1e-3, step=0)


# Invariant 3: only the perturbation makes the two losses differ.


@pytest.mark.parametrize(("architecture", "adapter"), CASES)
def test_a_perturbation_of_size_zero_gives_the_same_loss_with_dropout(architecture, adapter):
    model = build(architecture, adapter, lora_dropout=0.3).train()
    batch = batch_for(architecture)
    blocks = split_parameters(model)
    view = Perturbation(
        model,
        list(blocks.base.values()),
        [blocks.base_index[name] for name in blocks.base],
        seed=SEED,
    )
    generators = GeneratorState.capture()
    loss = loss_of(model, batch)
    with torch.no_grad(), generators.replayed(), view.at(0.0, step=0):
        assert torch.equal(loss_of(model, batch), loss)
    # This llama has no dropout except that of LoRA.
    if architecture != "llama" or adapter == "lora":
        assert not torch.equal(loss_of(model, batch), loss)


class Masked(nn.Module):
    """A layer that records every dropout mask it applies."""

    def __init__(self):
        super().__init__()
        self.linear, self.dropout = nn.Linear(8, 8), nn.Dropout(0.5)
        self.masks = []

    def forward(self, x):
        mask = self.dropout(torch.ones(8))
        self.masks.append(mask)
        return (self.linear(x) * mask).square().mean()


@pytest.mark.parametrize("estimator", ["forward", "central"])
@pytest.mark.parametrize("replay", [True, False])
def test_masks_are_the_same_in_all_evaluations_of_a_replayed_step(estimator, replay):
    model, x = Masked(), torch.randn(3, 8)
    generators = GeneratorState.capture()
    with torch.no_grad():
        loss = model(x)
    projected_gradients(
        lambda: model(x),
        perturbation_of(model),
        loss,
        eps=1e-3,
        step=0,
        num_directions=2,
        estimator=estimator,
        generators=generators if replay else None,
    )
    assert len(model.masks) == 1 + 2 * forwards_per_direction(estimator)
    for mask in model.masks[1:]:
        assert torch.equal(mask, model.masks[0]) == replay


def test_a_failed_evaluation_leaves_the_generators_as_they_were():
    model = Masked()
    state = torch.get_rng_state()

    def closure():
        model(torch.ones(3, 8))
        raise KeyboardInterrupt

    for generators in (GeneratorState.capture(), None):
        with pytest.raises(KeyboardInterrupt):
            projected_gradients(
                closure,
                perturbation_of(model),
                torch.tensor(0.0),
                eps=1e-3,
                step=0,
                generators=generators,
            )
        assert torch.equal(torch.get_rng_state(), state)
