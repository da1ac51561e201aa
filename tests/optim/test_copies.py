"""Copies, pickles and states of the optimizer; schedulers of torch; groups that come later."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch

from tests.support.models import assert_same_bits, bits
from tests.support.smooth import Net, optimizer_for, rows
from zofo.errors import UserError


def pickled(value):
    return pickle.loads(pickle.dumps(value))


@pytest.mark.parametrize("duplicate", [copy.deepcopy, pickled])
@pytest.mark.parametrize(
    ("method", "options"),
    [
        ("hybrid", {"optimizer": "AdamW", "num_directions": 2, "max_grad_norm": 1.0}),
        ("zo-peft", {"estimator": "central"}),
        ("fo-peft", {"optimizer": "SGD", "optimizer_kwargs": {"momentum": 0.9}}),
    ],
)
def test_a_copy_continues_with_the_same_bits(duplicate, method, options):
    net, x = Net(), rows(4)
    optimizer = optimizer_for(net, method, **options)
    schedule = torch.optim.lr_scheduler.StepLR(optimizer, 1)  # wraps `step` of the optimizer
    optimizer.step(lambda: net(x))
    schedule.step()
    twin, other = duplicate((net, optimizer))
    assert other.state_dict()["zofo"] == optimizer.state_dict()["zofo"]
    for _ in range(2):
        optimizer.step(lambda: net(x))
        other.step(lambda: twin(x))
    assert_same_bits(bits(twin), bits(net))
    assert other.trajectory == optimizer.trajectory
    assert other.last_step == optimizer.last_step


def test_a_copy_of_the_optimizer_alone_has_a_model_of_its_own():
    net, x = Net(), rows(4)
    optimizer = optimizer_for(net)
    optimizer.step(lambda: net(x))
    other, before = copy.deepcopy(optimizer), bits(net)
    other.step(lambda: other.model(x))
    assert_same_bits(bits(net), before)
    assert (other.step_count, optimizer.step_count) == (2, 1)
    optimizer.step(lambda: net(x))
    assert_same_bits(bits(net), bits(other.model))


@pytest.mark.parametrize("name", ["SGD", "AdamW", "Adafactor"])
@pytest.mark.parametrize("kind", ["OneCycleLR", "CyclicLR"])
def test_schedulers_with_momentum_move_both_rates(kind, name):
    net, x = Net(), rows(4)
    keywords = {"momentum": 0.9} if name == "SGD" else {}
    optimizer = optimizer_for(net, optimizer=name, optimizer_kwargs=keywords)
    has_momentum = {"cycle_momentum": name != "Adafactor"}
    top = [10 * group["lr"] for group in optimizer.param_groups]
    low = [group["lr"] for group in optimizer.param_groups]
    schedule = (
        torch.optim.lr_scheduler.OneCycleLR(optimizer, top, total_steps=4, **has_momentum)
        if kind == "OneCycleLR"
        else torch.optim.lr_scheduler.CyclicLR(optimizer, low, top, 2, **has_momentum)
    )
    seen = []
    for _ in range(3):
        optimizer.step(lambda: net(x))
        schedule.step()
        seen.append([group["lr"] for group in optimizer.param_groups])
    assert all(len({rates[block] for rates in seen}) > 1 for block in range(2))
    if name != "Adafactor":  # The inner optimizer sees the momentum that the scheduler sets.
        key = "momentum" if name == "SGD" else "betas"
        assert optimizer.inner.param_groups[0][key] == optimizer.param_groups[0][key]
        assert optimizer.param_groups[0][key] != optimizer.inner.defaults[key]


@pytest.mark.parametrize(
    "extra", [{}, {"order": "first", "block": "adapter"}, {"order": "zeroth", "names": ["x"]}]
)
def test_groups_cannot_come_later(extra):
    net = Net()
    optimizer = optimizer_for(net)
    weight = torch.nn.Parameter(torch.ones(2))
    with pytest.raises(UserError, match="make a new one with all groups"):
        optimizer.add_param_group({"params": [weight], "lr": 1.0, **extra})
    assert len(optimizer.param_groups) == 2


def state_of_adamw():
    return torch.optim.AdamW(Net().adapter.parameters()).state_dict()


def state_of(net, **options):
    optimizer = optimizer_for(net, **options)
    optimizer.step(lambda: net(rows(4)))
    return optimizer.state_dict()


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (state_of_adamw, "not that of a HybridOptimizer"),
        (dict, "not that of a HybridOptimizer"),
        (lambda: state_of(Net(), eps=1e-2), "saved with eps 0.01"),
        (lambda: state_of(Net(), estimator="central"), "saved with estimator 'central'"),
        (lambda: state_of(Net(), method="fo-peft"), "does not fit this optimizer"),
    ],
)
def test_a_state_that_does_not_belong_here_is_refused(make, words):
    net = Net()
    optimizer = optimizer_for(net)
    with pytest.raises(UserError, match=words):
        optimizer.load_state_dict(make())
    assert optimizer.step_count == 0


def test_a_state_of_another_base_is_refused():
    first, second = optimizer_for(Net()), optimizer_for(Net())
    first.original_fingerprint()
    second.original_fingerprint()
    with pytest.raises(UserError, match="load the base that the run began with"):
        second.load_state_dict(first.state_dict())
