"""Tests of the hybrid step.

With base_lr = 0 it equals FO-PEFT, both blocks move together, and runs can be resumed.
"""

from __future__ import annotations

import copy
import io

import pytest
import torch
from torch.optim.lr_scheduler import LambdaLR

from tests.support.models import CASES, assert_same_bits, batch_for, bits, build, loss_of
from tests.support.smooth import (
    SEED,
    Net,
    adapter_gradient,
    adapter_of,
    base_of,
    directions_of,
    moved_along,
    optimizer_for,
    rows,
)
from zofo.errors import UserError
from zofo.optim.blocks import split_parameters

FIRST_ORDER = {
    "sgd": (torch.optim.SGD, {"momentum": 0.9}),
    "adamw": (torch.optim.AdamW, {"betas": (0.8, 0.9)}),
}

# Invariant 5: training with base_lr = 0 equals FO-PEFT.


def train_by_torch_alone(model, batches, name):
    optimizer_class, kwargs = FIRST_ORDER[name]
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = optimizer_class(trained, lr=1e-2, weight_decay=0.1, **kwargs)
    torch.manual_seed(17)
    losses = []
    for batch in batches:
        optimizer.zero_grad()
        loss = loss_of(model, batch)
        loss.backward()
        optimizer.step()
        losses.append(loss.detach())
    return losses


PERTURBED = {
    "float32": (torch.float32, "forward", "rademacher", 0),
    "bfloat16": (torch.bfloat16, "central", "gaussian", SEED),
}


def some(cases):
    """Mark as slow the cases that add little to the others.

    The optimizer and the dtype meet every model, and each other on one.
    """
    names, kinds = list(FIRST_ORDER), list(PERTURBED)
    return [
        pytest.param(
            *case,
            name,
            kind,
            marks=[]
            if case == ("llama", "lora") or names.index(name) % 2 == kinds.index(kind)
            else [pytest.mark.slow],
        )
        for case in cases
        for name in names
        for kind in kinds
    ]


@pytest.mark.parametrize(("architecture", "adapter", "name", "kind"), some(CASES))
def test_base_lr_zero_is_fo_peft_bit_for_bit(architecture, adapter, name, kind):
    dtype, estimator, distribution, seed = PERTURBED[kind]
    plain = build(architecture, adapter, dtype=dtype, lora_dropout=0.1).train()
    ours = copy.deepcopy(plain)
    batches = [batch_for(architecture, seed=i) for i in range(3)]
    expected = train_by_torch_alone(plain, batches, name)
    expected_state = torch.get_rng_state()

    optimizer_class, kwargs = FIRST_ORDER[name]
    optimizer = optimizer_for(
        ours,
        base_lr=0.0,
        adapter_lr=1e-2,
        groups={"adapter_weight_decay": 0.1, "base_weight_decay": 0.5},
        optimizer=optimizer_class,
        optimizer_kwargs=kwargs,
        estimator=estimator,
        seed=seed,
        distribution=distribution,
        num_directions=2,
    )
    torch.manual_seed(17)
    losses = [optimizer.step(lambda b=b: loss_of(ours, b)) for b in batches]
    assert all(torch.equal(a, b) for a, b in zip(losses, expected, strict=True))
    assert torch.equal(torch.get_rng_state(), expected_state)
    # In bfloat16 the mean loss of two classes takes few values, so a difference may be zero.
    if dtype == torch.float32:
        assert all(s != 0 for s in optimizer.last_step.projected_grad)
    assert_same_bits(bits(ours), bits(plain))


# Tests that both blocks step from the same point.


@pytest.mark.parametrize("distribution", ["rademacher", "gaussian"])
@pytest.mark.parametrize("estimator", ["forward", "central"])
def test_both_blocks_step_from_the_same_point(estimator, distribution):
    net, x = Net(), rows(8)
    start, eps = copy.deepcopy(net), 1e-3
    optimizer = optimizer_for(net, eps=eps, estimator=estimator, distribution=distribution)
    optimizer.step(lambda: net(x))
    (s,) = optimizer.last_step.projected_grad

    def slope(model):
        v = directions_of(model, step=0, distribution=distribution)
        with torch.no_grad():
            ahead = moved_along(model, v, eps)(x)
            behind = model(x) if estimator == "forward" else moved_along(model, v, -eps)(x)
        return float(ahead - behind) / (eps if estimator == "forward" else 2 * eps)

    assert s == pytest.approx(slope(start), rel=1e-8)
    v = directions_of(start, step=0, distribution=distribution)
    expected = base_of(moved_along(start, v, -0.3 * s))
    torch.testing.assert_close(base_of(net), expected, rtol=1e-9, atol=1e-12)
    gradient, old = adapter_gradient(start, x), adapter_of(start)
    torch.testing.assert_close(
        adapter_of(net), {n: old[n] - 0.2 * g for n, g in gradient.items()}, rtol=1e-12, atol=1e-12
    )

    # The learning rates are so large that a step of one block visibly changes the other's gradient.
    new_adapter, new_base = copy.deepcopy(start), copy.deepcopy(start)
    with torch.no_grad():
        for name, p in split_parameters(new_adapter).adapter.items():
            p.copy_(adapter_of(net)[name])
        for name, p in split_parameters(new_base).base.items():
            p.copy_(base_of(net)[name])
    assert s != pytest.approx(slope(new_adapter), rel=1e-2)
    sequential = adapter_gradient(new_base, x)
    assert all(not torch.allclose(gradient[n], sequential[n], rtol=1e-2) for n in gradient)


def test_several_directions_are_averaged():
    net, x = Net(), rows(8)
    start = copy.deepcopy(net)
    optimizer = optimizer_for(net, num_directions=3)
    optimizer.step(lambda: net(x))
    scalars = optimizer.last_step.projected_grad
    assert len(set(scalars)) == 3
    for k, s in enumerate(scalars):
        start = moved_along(start, directions_of(start, step=0, index=k), -0.3 * s / 3)
    torch.testing.assert_close(base_of(net), base_of(start), rtol=1e-9, atol=1e-12)
    assert optimizer.last_step.num_forwards == optimizer.num_forwards == 3


def test_each_step_measures_and_moves_along_its_own_direction():
    net, x = Net(), rows(8)
    optimizer = optimizer_for(net)
    for step in range(3):
        start, v = copy.deepcopy(net), directions_of(net, step=step)
        optimizer.step(lambda: net(x))
        (s,) = optimizer.last_step.projected_grad
        with torch.no_grad():
            slope = float(moved_along(start, v, 1e-3)(x) - start(x)) / 1e-3
        assert s == pytest.approx(slope, rel=1e-8)
        expected = base_of(moved_along(start, v, -0.3 * s))
        torch.testing.assert_close(base_of(net), expected, rtol=1e-9, atol=1e-12)


# Tests of gradient accumulation.


@pytest.mark.parametrize("estimator", ["forward", "central"])
@pytest.mark.parametrize("last_in_step", [False, True], ids=["accumulate", "accumulate+closure"])
def test_micro_batches_equal_the_full_batch(estimator, last_in_step):
    whole, x = Net(), rows(12)
    parts = copy.deepcopy(whole)
    one = optimizer_for(whole, estimator=estimator, num_directions=2)
    many = optimizer_for(parts, estimator=estimator, num_directions=2)
    for _ in range(2):
        one.step(lambda: whole(x))
        first, second, third = (lambda m=m: parts(m) / 3 for m in x.split(4))
        many.zero_grad()
        many.accumulate(first)
        many.accumulate(second)
        if last_in_step:
            many.step(third)
        else:
            many.accumulate(third)
            assert many.step() is None
        assert many.last_step.projected_grad == pytest.approx(one.last_step.projected_grad)
        assert many.last_step.loss == pytest.approx(one.last_step.loss)
        assert many.last_step.num_forwards == 3 * one.last_step.num_forwards
    torch.testing.assert_close(bits(parts), bits(whole), rtol=1e-8, atol=1e-10)


def test_step_without_anything_measured_is_an_error():
    net = Net()
    before = bits(net)
    with pytest.raises(ValueError, match="nothing was measured"):
        optimizer_for(net).step()
    assert_same_bits(bits(net), before)


# Tests of learning rates, clipping and weight decay.


def test_schedulers_change_both_rates():
    net, x = Net(), rows(8)
    optimizer = optimizer_for(net, base_lr=0.4, adapter_lr=0.2)
    scheduler = LambdaLR(optimizer, [lambda t: 1 / (t + 1), lambda t: 0.5**t])
    for t in range(4):
        start, gradient = copy.deepcopy(net), adapter_gradient(net, x)
        optimizer.step(lambda: net(x))
        scheduler.step()
        for name, old in base_of(start).items():
            moved = (base_of(net)[name] - old).abs()
            size = 0.4 * 0.5**t * abs(optimizer.last_step.projected_grad[0])
            torch.testing.assert_close(moved, torch.full_like(moved, size), rtol=1e-9, atol=1e-12)
        for name, old in adapter_of(start).items():
            torch.testing.assert_close(adapter_of(net)[name], old - 0.2 / (t + 1) * gradient[name])
    assert [row[0].lr for row in optimizer.trajectory.updates] == [0.4, 0.2, 0.1, 0.05]


def test_clipping_limits_the_adapter_and_leaves_the_base():
    net, x = Net(), rows(8)
    start, free = copy.deepcopy(net), copy.deepcopy(net)
    norm = torch.cat([g.flatten() for g in adapter_gradient(net, x).values()]).norm()
    optimizer = optimizer_for(net, max_grad_norm=float(norm) / 4)
    optimizer.step(lambda: net(x))
    optimizer_for(free).step(lambda: free(x))
    assert optimizer.last_step.grad_norm == pytest.approx(float(norm))
    old, unclipped = adapter_of(start), adapter_of(free)
    for name, new in adapter_of(net).items():
        torch.testing.assert_close(
            new - old[name], (unclipped[name] - old[name]) / 4, rtol=1e-5, atol=0
        )
    assert_same_bits(base_of(net), base_of(free))


def test_weight_decay_of_the_base_is_decoupled():
    """Weight decay multiplies the base by 1 − lr · decay per step.

    The loss of this test does not depend on the base.
    """
    net = Net()
    start = copy.deepcopy(net)
    optimizer = optimizer_for(net, base_lr=0.3, groups={"base_weight_decay": 0.2})
    for _ in range(5):
        optimizer.step(lambda: net.adapter.weight.square().sum())
        assert optimizer.last_step.projected_grad == (0.0,)
    expected = {n: p * (1 - 0.3 * 0.2) ** 5 for n, p in base_of(start).items()}
    torch.testing.assert_close(base_of(net), expected, rtol=1e-12, atol=0)
    assert torch.equal(net.adapter.bias, start.adapter.bias)


def test_weight_decay_does_not_enter_the_estimate():
    plain, x = Net(), rows(8)
    decayed, start = copy.deepcopy(plain), base_of(plain)
    optimizer_for(plain).step(lambda: plain(x))
    optimizer_for(decayed, groups={"base_weight_decay": 0.2}).step(lambda: decayed(x))
    expected = {n: p - 0.3 * 0.2 * start[n] for n, p in base_of(plain).items()}
    torch.testing.assert_close(base_of(decayed), expected, rtol=1e-9, atol=1e-12)
    assert_same_bits(adapter_of(decayed), adapter_of(plain))


def test_each_pattern_has_its_rate_and_what_none_matches_is_frozen():
    net, x = Net(), rows(8)
    start = copy.deepcopy(net)
    optimizer = optimizer_for(net, base_lr={"*.bias": 0.1, "first.*": 0.4})
    optimizer.step(lambda: net(x))
    (s,) = optimizer.last_step.projected_grad
    expected = {"first.weight": 0.4, "first.bias": 0.1, "second.bias": 0.1, "second.weight": 0.0}
    for name, lr in expected.items():
        moved = (base_of(net)[name] - base_of(start)[name]).abs()
        torch.testing.assert_close(
            moved, torch.full_like(moved, lr * abs(s)), rtol=1e-9, atol=1e-12
        )
    assert not net.second.weight.requires_grad
    # A frozen weight is not perturbed either.
    v = directions_of(start, step=0)
    v["second.weight"].zero_()
    with torch.no_grad():
        assert s == pytest.approx(float(moved_along(start, v, 1e-3)(x) - start(x)) / 1e-3, rel=1e-8)


# Tests of resuming.


@pytest.mark.parametrize("name", FIRST_ORDER)
@pytest.mark.parametrize(("architecture", "adapter"), [("llama", "lora"), ("gpt2", "prefix")])
def test_a_restored_run_continues_with_the_same_bits(architecture, adapter, name):
    cut, total = 2, 5
    optimizer_class, kwargs = FIRST_ORDER[name]

    def start(model):
        optimizer = optimizer_for(
            model,
            base_lr=1e-3,
            adapter_lr=1e-2,
            optimizer=optimizer_class,
            optimizer_kwargs=kwargs,
        )
        return optimizer, LambdaLR(optimizer, lambda t: 1 / (t + 1))

    def run(model, optimizer, scheduler, steps):
        for t in steps:
            torch.manual_seed(t)
            batch = batch_for(architecture, seed=t)
            optimizer.step(lambda batch=batch: loss_of(model, batch))
            scheduler.step()

    whole = build(architecture, adapter, lora_dropout=0.1).train()
    halves = copy.deepcopy(whole)
    optimizer, scheduler = start(whole)
    run(whole, optimizer, scheduler, range(total))

    before, before_scheduler = start(halves)
    run(halves, before, before_scheduler, range(cut))
    file = io.BytesIO()
    torch.save((before.state_dict(), before_scheduler.state_dict(), halves.state_dict()), file)
    file.seek(0)
    saved, saved_scheduler, weights = torch.load(file, weights_only=True)
    resumed = build(architecture, adapter, lora_dropout=0.1, seed=9).train()
    resumed.load_state_dict(weights)
    after, after_scheduler = start(resumed)
    after.load_state_dict(saved)
    after_scheduler.load_state_dict(saved_scheduler)
    run(resumed, after, after_scheduler, range(cut, total))

    assert_same_bits(bits(resumed), bits(whole))
    assert after.last_step == optimizer.last_step
    assert after.num_forwards == optimizer.num_forwards
    assert after.trajectory.updates == optimizer.trajectory.updates[cut:]


@pytest.mark.parametrize(
    "other", [{"seed": 1}, {"distribution": "gaussian"}, {"num_directions": 2}]
)
def test_a_state_with_other_directions_is_refused(other):
    state = optimizer_for(Net()).state_dict()
    with pytest.raises(UserError, match=next(iter(other))):
        optimizer_for(Net(), **other).load_state_dict(state)
