"""Tests of steps that fail, are interrupted, or are called wrongly.

Further tests cover the global generators and the blocks that each method moves.
"""

from __future__ import annotations

import copy
import math
import random

import numpy as np
import pytest
import torch
from torch import nn

from tests.support.models import ADAPTERS, assert_same_bits, batch_for, bits, build, loss_of
from tests.support.smooth import Net, adapter_of, base_of, moved_along, optimizer_for, rows
from zofo.errors import UserError
from zofo.optim.blocks import split_parameters
from zofo.optim.methods import METHODS
from zofo.optim.optimizer import HybridOptimizer
from zofo.optim.options import StepOptions
from zofo.perturb.view import SelfCheckError

# Tests of losses that are not finite.


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("name", ["SGD", "AdamW"])
def test_a_loss_that_is_not_finite_moves_nothing(name, value):
    net, x = Net(), rows(4)
    optimizer = optimizer_for(net, optimizer=name, groups={"base_weight_decay": 0.1})
    before = bits(net)
    with pytest.warns(UserWarning, match="step 0 was not applied, because loss .* not finite"):
        optimizer.step(lambda: net(x) * value)
    assert_same_bits(bits(net), before)
    assert not optimizer.state
    assert not optimizer.trajectory.updates
    assert optimizer.last_step.non_finite
    # The next step equals an ordinary step. Only its number shows that a step was skipped.
    twin = copy.deepcopy(net)
    other = optimizer_for(twin, optimizer=name, groups={"base_weight_decay": 0.1})
    other.step_count = 1
    optimizer.step(lambda: net(x))
    other.step(lambda: twin(x))
    assert_same_bits(bits(net), bits(twin))
    assert optimizer.last_step == other.last_step
    assert optimizer.trajectory.updates[0][0].step == 1


def test_only_the_unperturbed_loss_is_not_finite():
    """A step is skipped if only its unperturbed loss is not finite.

    The central difference is finite here, but the step must not use it.
    """
    net, x = Net(), rows(4)
    before = bits(net)
    optimizer = optimizer_for(net, estimator="central")
    with pytest.warns(
        UserWarning, match="loss nan or projected gradient .[-0-9.]+,. is not finite"
    ):
        optimizer.step(lambda: net(x) * math.nan if torch.is_grad_enabled() else net(x))
    assert_same_bits(bits(net), before)
    assert not optimizer.trajectory.updates


def test_only_the_perturbed_loss_is_not_finite():
    net, x = Net(), rows(4)
    alone = copy.deepcopy(net)
    optimizer_for(alone, "fo-peft").step(lambda: alone(x))
    start = base_of(net)
    optimizer = optimizer_for(net, groups={"base_weight_decay": 0.1})
    with pytest.warns(UserWarning, match="projected gradient .*inf.* is not finite"):
        optimizer.step(lambda: net(x) if torch.is_grad_enabled() else net(x) * math.inf)
    assert_same_bits(base_of(net), start)
    assert_same_bits(adapter_of(net), adapter_of(alone))
    assert optimizer.last_step.non_finite
    assert not optimizer.trajectory.updates


# Tests of interruptions.


@pytest.mark.parametrize("at_call", range(5))
def test_an_interrupted_step_can_be_taken_again(at_call):
    net, x = Net(), rows(4)
    twin, calls = copy.deepcopy(net), 0
    options = {"estimator": "central", "num_directions": 2, "optimizer": "AdamW"}
    optimizer, undisturbed = optimizer_for(net, **options), optimizer_for(twin, **options)
    optimizer.step(lambda: net(x))
    undisturbed.step(lambda: twin(x))
    before = bits(net)

    def closure():
        nonlocal calls
        loss = net(x)
        if calls == at_call:
            raise KeyboardInterrupt
        calls += 1
        return loss

    with pytest.raises(KeyboardInterrupt):
        optimizer.step(closure)
    assert_same_bits(bits(net), before)
    assert optimizer.step_count == 1
    optimizer.step(lambda: net(x))
    undisturbed.step(lambda: twin(x))
    assert_same_bits(bits(net), bits(twin))
    assert optimizer.last_step == undisturbed.last_step
    assert optimizer.trajectory.updates == undisturbed.trajectory.updates


def test_a_weight_read_around_the_perturbation_stops_the_first_step():
    net, x = Net(), rows(4)
    before = bits(net)

    def closure():
        return net(x) + net.first.weight.square().sum()

    optimizer = optimizer_for(net)
    with pytest.raises(SelfCheckError, match=r"first\.weight of Linear"):
        optimizer.step(closure)
    assert_same_bits(bits(net), before)
    optimizer_for(net, self_check=False).step(closure)


# Tests of the global generators.


class Noisy(nn.Module):
    """Draws from every global generator in its forward pass."""

    def __init__(self):
        super().__init__()
        self.base, self.adapter = nn.Linear(4, 4), nn.Linear(4, 1)
        self.dropout = nn.Dropout(0.5)
        self.base.requires_grad_(False)
        self.seen = []

    def forward(self, x):
        self.seen.append((float(torch.rand(())), random.random(), np.random.random()))
        return self.adapter(self.dropout(self.base(x))).square().mean()


def seed_all(seed):
    torch.manual_seed(seed)
    random.seed(seed)
    np.random.seed(seed)


@pytest.mark.parametrize("replay", [True, False])
@pytest.mark.parametrize("method", ["hybrid", "fo-peft", "zo-peft"])
def test_generators_end_as_one_plain_forward_leaves_them(method, replay):
    plain, x = Noisy(), torch.randn(6, 4)
    ours = copy.deepcopy(plain)
    seed_all(5)
    for _ in range(2):
        plain(x).backward()
    expected = torch.get_rng_state(), random.getstate(), np.random.get_state()

    optimizer = optimizer_for(
        ours, method, estimator="central", num_directions=2, replay_dropout=replay
    )
    seed_all(5)
    for _ in range(2):
        optimizer.step(lambda: ours(x))
    assert torch.equal(torch.get_rng_state(), expected[0])
    assert random.getstate() == expected[1]
    assert str(np.random.get_state()) == str(expected[2])

    per_step = 1 if method == "fo-peft" else 5
    if method != "fo-peft" and replay:  # the first step evaluates the loss again
        assert ours.seen.pop(1) == plain.seen[0]
    assert len(ours.seen) == 2 * per_step
    assert ours.seen[::per_step] == plain.seen
    if method != "fo-peft":
        assert (len(set(ours.seen[:per_step])) == 1) == replay


def test_making_the_optimizer_draws_nothing():
    net = Net()
    seed_all(5)
    before = torch.get_rng_state(), random.getstate(), str(np.random.get_state())
    optimizer_for(net)
    assert torch.equal(torch.get_rng_state(), before[0])
    assert (random.getstate(), str(np.random.get_state())) == before[1:]


# Tests of the blocks that each method moves.


def moved_names(model, before):
    return {n for n, p in model.named_parameters() if not torch.equal(p, before[n])}


@pytest.mark.parametrize("adapter", [*ADAPTERS, None])
@pytest.mark.parametrize("method", METHODS)
def test_a_method_moves_exactly_its_blocks(method, adapter):
    orders = METHODS[method]
    model = build("llama", adapter).train()
    batch = batch_for("llama")
    if orders.needs_adapter != (adapter is not None):
        with pytest.raises(UserError, match=f"'{method}' moves (an|no) adapter"):
            optimizer_for(model, method)
        return
    before, blocks = bits(model), split_parameters(model)
    # With an adapter, peft marks only the adapter as trainable.
    trained = {n for n, p in model.named_parameters() if adapter is None or p.requires_grad}
    optimizer = optimizer_for(model, method, base_lr=1e-2, adapter_lr=1e-2)
    for _ in range(2):
        optimizer.step(lambda: loss_of(model, batch))
    assert moved_names(model, before) == (trained if method != "hybrid" else set(before))
    for block, order in ((blocks.base, orders.base), (blocks.adapter, orders.adapter)):
        for parameter in block.values():
            assert parameter.requires_grad == (order == "first")
            assert (parameter.grad is not None) == (order == "first")
    assert bool(optimizer.trajectory.updates) == (orders.base == "zeroth")


def test_zeroth_order_of_the_adapter_moves_along_its_own_directions():
    """The adapter's zeroth-order step uses directions of its own.

    Its tensor indices differ from those of every base tensor.
    """
    model = build("llama", "lora").eval()
    optimizer = optimizer_for(model, "zo-peft", adapter_lr=1e-2)
    (group,) = optimizer.param_groups
    assert not set(group["tensors"]) & set(split_parameters(model).base_index.values())
    assert len(set(group["tensors"])) == len(group["params"])


def test_zo_ft_descends():
    net, x = Net(), rows(16)
    for parameter in net.parameters():
        parameter.requires_grad_(False)
    optimizer = optimizer_for(net, "zo-ft", base_lr=0.01)
    first = float(net(x))
    for _ in range(300):
        optimizer.step(lambda: net(x))
    assert float(net(x)) < 0.5 * first


# Tests of bad input.


def test_all_bad_options_are_named_at_once():
    net = Net()
    bad = {
        "optimizer": "Adamm",
        "eps": 0.0,
        "estimator": "backward",
        "num_directions": 0,
        "distribution": "uniform",
        "seed": -1,
        "max_grad_norm": -1.0,
    }
    with pytest.raises(UserError) as caught:
        optimizer_for(net, **bad)
    for name, value in bad.items():
        assert name in str(caught.value)
        assert repr(value) in str(caught.value)
    assert "did you mean 'Adam'" in str(caught.value)


def test_options_may_be_given_whole_and_keywords_go_before_them():
    given = StepOptions(eps=1e-2, num_directions=2)
    optimizer = optimizer_for(Net(), options=given, num_directions=3)
    assert optimizer.options == StepOptions(eps=1e-2, num_directions=3)
    assert given.num_directions == 2
    with pytest.raises(TypeError, match="radius"):
        optimizer_for(Net(), radius=1e-2)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"order": "second"}, "group 1 has order 'second'"),
        ({"order": None}, "group 1 has order None"),
        ({"names": ["one"]}, "group 1 .* one name and one tensor index"),
        ({"tensors": []}, "group 1 .* one name and one tensor index"),
    ],
)
def test_groups_that_are_not_complete_are_refused(change, message):
    net = Net()
    groups = [{**g} for g in optimizer_for(net).param_groups]
    groups[1].update(change)
    with pytest.raises(UserError, match=message):
        HybridOptimizer(groups, net)


def test_a_group_without_rate_is_refused():
    net = Net()
    groups = [{k: v for k, v in g.items() if k != "lr"} for g in optimizer_for(net).param_groups]
    with pytest.raises(UserError, match="group 0 has no lr"):
        HybridOptimizer(groups, net)


@pytest.mark.parametrize(
    ("method", "retain"),
    [("hybrid", False), ("hybrid", True), ("zo-peft", False), ("fo-peft", False)],
)
def test_a_closure_that_runs_backward_is_told_so(method, retain):
    net, x = Net(), rows(4)
    before = bits(net)

    def closure():
        loss = net(x)
        loss.backward(retain_graph=retain)
        return loss

    with pytest.raises(ValueError, match="closure called backward"):
        optimizer_for(net, method).step(closure)
    assert_same_bits(bits(net), before)


@pytest.mark.parametrize("method", ["hybrid", "zo-peft"])
@pytest.mark.parametrize("wrong", [float, lambda loss: None], ids=["float", "None"])
def test_a_closure_that_returns_no_tensor_is_told_so(method, wrong):
    net, x = Net(), rows(4)
    with pytest.raises(ValueError, match="return the loss tensor"):
        optimizer_for(net, method).step(lambda: wrong(net(x).detach()))


def test_a_loss_without_graph_is_told_so():
    net, x = Net(), rows(4)
    with pytest.raises(ValueError, match="no gradient for the first-order group"):
        optimizer_for(net).step(lambda: net(x).detach())


def test_the_copy_helper_moves_only_the_base():
    """`moved_along` moves only the base. The closed forms above rely on this."""
    net = Net()
    v = {n: torch.ones_like(p) for n, p in base_of(net).items()}
    twin = moved_along(net, v, 0.5)
    assert_same_bits(adapter_of(twin), adapter_of(net))
    for name, p in base_of(twin).items():
        torch.testing.assert_close(p, base_of(net)[name] + 0.5)
