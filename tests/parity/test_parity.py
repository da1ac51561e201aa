"""zofo's step equals plain versions of the paper's step and of MeZO's, given the same directions.

The two plain versions below follow the papers and use only torch. They share the directions with
zofo and nothing else.

References:
    arXiv 2604.09940, hybrid algorithm: forward difference on x, gradient on y, both at (x, y).
    Malladi et al., "Fine-Tuning Language Models with Just Forward Passes", 2023, Algorithm 1.
"""

from __future__ import annotations

import copy

import pytest
import torch

from tests.support.models import batch_for, bits, build, loss_of
from zofo import HybridOptimizer, param_groups, split_parameters
from zofo.noise.combine import direction

NUM_STEPS = 20
SEED = 77


def directions(model, step, distribution):
    """Return one v per base parameter, in the order of `split_parameters(model).base`."""
    blocks = split_parameters(model)
    return [
        direction(
            p.shape,
            seed=SEED,
            step=step,
            tensor=blocks.base_index[name],
            distribution=distribution,
            dtype=p.dtype,
        )
        for name, p in blocks.base.items()
    ]


def paper(model, batches, *, mu, eta_x, eta_y, distribution):
    """Run the paper's step on x and y simultaneously.

    x ← x − η_x (f(x + μv, y) − f(x, y)) / μ · v and y ← y − η_y ∇_y f(x, y).
    """
    blocks = split_parameters(model)
    x, y = list(blocks.base.values()), list(blocks.adapter.values())
    losses = []
    for step, batch in enumerate(batches):
        v = directions(model, step, distribution)
        f = loss_of(model, batch)
        g_y = torch.autograd.grad(f, y)
        with torch.no_grad():
            original = [p.clone() for p in x]
            for p, d in zip(x, v, strict=True):
                p.copy_(p + mu * d)
            f_ahead = loss_of(model, batch)
            s = (f_ahead.double() - f.detach().double()) / mu
            for p, p0, d in zip(x, original, v, strict=True):
                p.copy_(p0 - eta_x * s.to(p.dtype) * d)
            for p, g in zip(y, g_y, strict=True):
                p.copy_(p - eta_y * g)
        losses.append(float(f.detach()))
    return losses


@torch.no_grad()
def mezo(model, batches, *, eps, eta, distribution):
    """Perturb in place by +ε, −2ε, +ε, then step θ ← θ − η · projected gradient · v."""
    theta = list(split_parameters(model).base.values())
    for step, batch in enumerate(batches):
        v = directions(model, step, distribution)

        def perturb(scale, v=v):
            for p, d in zip(theta, v, strict=True):
                p.add_(d, alpha=scale)

        perturb(eps)
        ahead = loss_of(model, batch).double()
        perturb(-2 * eps)
        behind = loss_of(model, batch).double()
        perturb(eps)
        projected_gradient = float(ahead - behind) / (2 * eps)
        for p, d in zip(theta, v, strict=True):
            p.sub_(d, alpha=eta * projected_gradient)


def change(after, before):
    return {name: after[name] - before[name] for name in before}


def assert_same_path(ours, theirs, start, tolerance):
    """Assert that the changes differ by less than `tolerance` of the change itself, per tensor."""
    expected, found = change(bits(theirs), bits(start)), change(bits(ours), bits(start))
    for name, moved in expected.items():
        assert float((found[name] - moved).norm()) < tolerance * float(moved.norm()), name


ARCHITECTURES = ["llama", "opt"]
# A float32 loss near 4 is a multiple of 4.8e-7. With eps = 1e-3 this gives an error of 5e-4 in s.
TOLERANCE = {torch.float32: 5e-3, torch.float64: 1e-9}


@pytest.mark.parametrize("distribution", ["gaussian", "rademacher"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_hybrid_is_the_papers_step(architecture, dtype, distribution):
    start = build(architecture, "lora", dtype=dtype).eval()
    ours, theirs = copy.deepcopy(start), copy.deepcopy(start)
    batches = [batch_for(architecture, seed=i) for i in range(NUM_STEPS)]
    expected = paper(theirs, batches, mu=1e-3, eta_x=1e-4, eta_y=1e-1, distribution=distribution)
    optimizer = HybridOptimizer(
        param_groups(ours, "hybrid", base_lr=1e-4, adapter_lr=1e-1),
        ours,
        eps=1e-3,
        distribution=distribution,
        seed=SEED,
    )
    losses = [float(optimizer.step(lambda b=b: loss_of(ours, b))) for b in batches]
    assert losses == pytest.approx(expected, abs=1e-5)
    assert_same_path(ours, theirs, start, TOLERANCE[dtype])


@pytest.mark.parametrize("distribution", ["gaussian", "rademacher"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_zo_ft_is_mezo(architecture, dtype, distribution):
    start = build(architecture, None, dtype=dtype).eval()
    ours, theirs = copy.deepcopy(start), copy.deepcopy(start)
    batches = [batch_for(architecture, seed=i) for i in range(NUM_STEPS)]
    mezo(theirs, batches, eps=1e-3, eta=1e-4, distribution=distribution)
    optimizer = HybridOptimizer(
        param_groups(ours, "zo-ft", base_lr=1e-4),
        ours,
        eps=1e-3,
        estimator="central",
        distribution=distribution,
        seed=SEED,
    )
    for batch in batches:
        optimizer.step(lambda batch=batch: loss_of(ours, batch))
    assert_same_path(ours, theirs, start, TOLERANCE[dtype])
