"""Buffers that a forward pass changes are changed once a step, as in plain training."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from tests.support.models import assert_same_bits
from tests.support.smooth import Net, optimizer_for, rows


class Averaging(nn.Module):
    """A running mean that is put into its place anew, and a count that is changed in place."""

    def __init__(self, num):
        super().__init__()
        self.register_buffer("mean", torch.zeros(num))
        self.register_buffer("calls", torch.zeros((), dtype=torch.long))

    def forward(self, x):
        if self.training:
            self.mean = 0.9 * self.mean + 0.1 * x.detach().mean(0)
            self.calls += 1
        return x - self.mean


KINDS = {
    "batch norm": lambda: nn.BatchNorm1d(6),
    "averages of all batches": lambda: nn.BatchNorm1d(6, momentum=None),
    "spectral norm": lambda: nn.utils.parametrizations.spectral_norm(nn.Linear(6, 6)),
    "older spectral norm": lambda: nn.utils.spectral_norm(nn.Linear(6, 6)),
    "new tensors": lambda: Averaging(6),
}


def net_with(kind):
    net = Net()
    net.second = nn.Sequential(KINDS[kind]().double(), net.second).requires_grad_(False)
    return net


def buffers_of(net):
    return {name: b.clone() for name, b in net.named_buffers()}


@pytest.mark.parametrize("estimator", ["forward", "central"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_step_changes_them_once(kind, estimator):
    net = net_with(kind)
    plain = copy.deepcopy(net)
    sgd = torch.optim.SGD(plain.adapter.parameters(), lr=0.2)
    optimizer = optimizer_for(net, base_lr=0.0, estimator=estimator, num_directions=2)
    for seed in range(3):
        x = rows(8, seed)
        sgd.zero_grad()
        plain(x).backward()
        sgd.step()
        optimizer.step(lambda x=x: net(x))
    start = buffers_of(net_with(kind))
    assert not all(torch.equal(b, start[name]) for name, b in net.named_buffers())
    assert_same_bits(buffers_of(net), buffers_of(plain))
    assert_same_bits(dict(net.named_parameters()), dict(plain.named_parameters()))


@pytest.mark.parametrize("kind", ["spectral norm", "older spectral norm", "new tensors"])
def test_both_losses_start_with_the_same_buffers(kind):
    """Else the difference would hold their change, divided by eps."""
    net = net_with(kind)
    optimizer = optimizer_for(net, base_lr=0.0, eps=1e-7)
    for seed in range(2):
        x = rows(8, seed)
        optimizer.step(lambda x=x: net(x))
        assert abs(optimizer.last_step.projected_grad[0]) < 10


def test_a_loop_that_runs_the_pass_itself():
    net, plain = net_with("batch norm"), None
    plain = copy.deepcopy(net)
    optimizer = optimizer_for(net, "zo-peft", adapter_lr=0.0)
    for seed in range(2):
        x = rows(8, seed)
        plain(x)
        loss = net(x)  # without `before_pass`
        optimizer.measure(lambda x=x: net(x), loss)
        optimizer.step()
    assert_same_bits(buffers_of(net), buffers_of(plain))


def test_an_error_in_an_evaluation_leaves_them_as_the_pass_did():
    net = net_with("batch norm")
    plain, x, calls = copy.deepcopy(net), rows(8), []
    plain(x)

    def closure():
        calls.append(1)
        loss = net(x)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return loss

    with pytest.raises(KeyboardInterrupt):
        optimizer_for(net).step(closure)
    assert_same_bits(buffers_of(net), buffers_of(plain))


def test_models_without_such_buffers_pay_nothing():
    net, x = Net(), rows(4)
    net.register_buffer("constant", torch.ones(3))
    optimizer = optimizer_for(net)
    optimizer.step(lambda: net(x))

    def closure():
        return net(x)

    assert optimizer.unchanged_by(closure) is closure
    assert optimizer.buffers.moved() == {}
