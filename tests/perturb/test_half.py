"""Tests of bfloat16 and float16.

Perturbations leave no trace in the base, updates are correct on average, and each perturbed weight
is rounded once.
"""

from __future__ import annotations

import pytest
import torch
from scipy import stats
from torch import nn

from tests.support.models import ADAPTERS, batch_for, build, loss_of
from zofo.models.adapters import create_adapter
from zofo.models.loading import load_model
from zofo.noise.combine import combine, direction
from zofo.optim.blocks import split_parameters
from zofo.optim.estimator import projected_gradients
from zofo.perturb.view import Perturbation

HALVES = [torch.bfloat16, torch.float16]
SEED = 20_261_125
NUM_CYCLES = 200
NUM_UPDATES = 1_000
FALSE_ALARM = 1e-3
"""Probability that correct rounding fails one test of a mean, over random seeds."""


def raw_bits(tensors):
    """Return copies of the tensors as integers, which distinguish −0 from 0."""
    return [t.detach().view(torch.int16).clone() for t in tensors]


def base_of(dtype):
    """Return a decoder of one tiny layer, its base weights, and their tensor indices."""
    model = build("llama", None, dtype=dtype).eval()
    del model.model.layers[1:]
    blocks = split_parameters(model)
    return model, list(blocks.base.values()), [blocks.base_index[name] for name in blocks.base]


@pytest.mark.parametrize("dtype", HALVES)
def test_many_cycles_leave_every_bit(dtype):
    model, weights, tensors = base_of(dtype)
    batch = {name: values[:, :3] for name, values in batch_for("llama", rows=1).items()}
    perturbation = Perturbation(model, weights, tensors, seed=SEED, distribution="gaussian")
    before = raw_bits(weights)
    with torch.no_grad():
        loss = loss_of(model, batch)
    num_moved = 0
    for step in range(NUM_CYCLES):
        scalars = projected_gradients(
            lambda: loss_of(model, batch),
            perturbation,
            loss,
            eps=1e-3 if step % 4 < 2 else 3e-2,
            step=step,
            estimator="forward" if step % 2 else "central",
        )
        num_moved += int(scalars.count_nonzero())
    assert num_moved > NUM_CYCLES / 4  # The evaluations really used another point.
    assert all(map(torch.equal, raw_bits(weights), before))


@pytest.mark.parametrize("dtype", HALVES)
def test_the_published_cycle_in_place_does_not(dtype):
    _, weights, tensors = base_of(dtype)
    before = raw_bits(weights)
    with torch.no_grad():
        for weight, tensor in zip(weights, tensors, strict=True):
            v = direction(
                weight.shape, seed=SEED, step=0, tensor=tensor, distribution="gaussian", dtype=dtype
            )
            for factor in (1, -2, 1):
                weight.add_(v, alpha=factor * 1e-3)
    changed = sum(int((a != b).sum()) for a, b in zip(raw_bits(weights), before, strict=True))
    assert changed > 0.1 * sum(weight.numel() for weight in weights)


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("share", [1 / 500, 1 / 16, 0.3, 3.7])
def test_the_mean_update_is_the_exact_one(dtype, share):
    # All magnitudes lie between the same two powers of two, so all weights have the same spacing.
    generator = torch.Generator().manual_seed(3)
    magnitude = 2.0**-4 * (1.2 + 0.6 * torch.rand(960, generator=generator))
    signs = 1 - 2 * torch.randint(0, 2, (960,), generator=generator)
    weight = (magnitude * signs).to(dtype)
    update = share * torch.finfo(dtype).eps * 2.0**-4
    addresses = [{"seed": SEED, "step": step, "tensor": 5} for step in range(NUM_UPDATES)]
    v = torch.stack([direction(weight.shape, **address) for address in addresses])

    def along(rounding):
        """Return how far each update moves along its own direction, as a mean over the weights."""
        results = torch.empty(NUM_UPDATES, len(weight), dtype=dtype)
        for result, address in zip(results, addresses, strict=True):
            combine(weight, (update,), out=result, rounding=rounding, **address)
        return ((results.double() - weight.double()) * v).mean(dim=1)

    moved = along("stochastic")
    half_width = float(stats.norm.isf(FALSE_ALARM / 2) * moved.std()) / NUM_UPDATES**0.5
    assert abs(moved.mean() - update) < half_width
    # The interval is narrow enough to exclude rounding to nearest, which drops small updates and
    # changes large ones.
    assert half_width < 0.1 * update
    to_nearest = along("nearest")
    if share < 0.5:
        assert not to_nearest.any()
    else:
        assert abs(to_nearest.mean() - update) > 10 * half_width


@pytest.mark.parametrize(
    ("dtype", "eps", "above", "below"),
    [
        # eps lies just above half a spacing of 1, and rounding eps itself gives exactly half a
        # spacing. Computed in float32 and rounded once, 1 + eps goes up. With eps rounded first, it
        # goes to the even 1.
        (torch.bfloat16, 0.00391, 1 + 2.0**-7, 1 - 2.0**-8),
        (torch.float16, 0.0004884, 1 + 2.0**-10, 1 - 2.0**-11),
    ],
)
def test_a_perturbed_weight_is_rounded_once_known_answer(dtype, eps, above, below):
    assert 1 + torch.tensor(eps, dtype=dtype) == 1
    layer = nn.Linear(16, 16, bias=False, dtype=dtype)
    nn.init.ones_(layer.weight)
    perturbation = Perturbation(layer, [layer.weight], [0], seed=SEED)
    with torch.no_grad(), perturbation.at(eps, step=0):
        seen = layer(torch.eye(16, dtype=dtype)).T
    v = direction((16, 16), seed=SEED, step=0, tensor=0)
    assert set(v.unique().tolist()) == {-1.0, 1.0}
    assert torch.equal(seen.float(), torch.where(v > 0, above, below))


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("kind", ["linear", "embedding"])
def test_perturbed_weights_are_float32_sums_rounded_once(dtype, kind):
    if kind == "linear":
        layer, x = nn.Linear(64, 64, bias=False, dtype=dtype), torch.eye(64, dtype=dtype)
    else:
        layer, x = nn.Embedding(64, 64, dtype=dtype), torch.arange(64)
    address = {"seed": SEED, "step": 2, "tensor": 7, "distribution": "gaussian"}
    v, eps = direction((64, 64), **address), 1e-3
    perturbation = Perturbation(
        layer, [layer.weight], [7], seed=SEED, distribution=address["distribution"]
    )
    with torch.no_grad(), perturbation.at(eps, step=2):
        seen = layer(x)
    seen = seen.T if kind == "linear" else seen
    weight = layer.weight.detach()
    once = (weight.float() + v * torch.tensor(eps)).to(dtype)
    assert torch.equal(seen, once)
    assert not torch.equal(weight + v.to(dtype) * torch.tensor(eps, dtype=dtype), once)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("adapter", ADAPTERS)
def test_adapters_stay_float32_on_a_16_bit_base(decoder_folder, adapter, dtype):
    model, _ = load_model(decoder_folder, dtype=dtype)
    blocks = split_parameters(create_adapter(model, adapter))
    assert {str(p.dtype) for p in blocks.base.values()} == {f"torch.{dtype}"}
    assert {p.dtype for p in blocks.adapter.values()} == {torch.float32}
