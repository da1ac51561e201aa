"""A closure that cannot be repeated, or whose loss is scaled, is refused before anything moves."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch

from tests.support.models import assert_same_bits, bits
from tests.support.smooth import Net, optimizer_for, rows
from zofo.errors import UserError
from zofo.optim.zeroth_loss import ZerothLoss


def unrepeatable(kind, net):
    """A closure whose loss is another one at each call."""
    batches = iter([rows(4, seed) for seed in range(9)])
    generator, calls = torch.Generator().manual_seed(1), []
    if kind == "draws its batch":
        return lambda: net(next(batches))
    if kind == "own generator":
        return lambda: net(torch.randn(4, 4, dtype=torch.float64, generator=generator))
    if kind == "own numpy generator":
        own = np.random.default_rng(1)
        return lambda: net(rows(9)[own.permutation(9)[:4]])
    return lambda: net(rows(4)) * (1 + len([calls.append(1), *calls]))  # counts its calls


KINDS = ("draws its batch", "own generator", "own numpy generator", "counts its calls")


@pytest.mark.parametrize("method", ["hybrid", "zo-peft"])
@pytest.mark.parametrize("estimator", ["forward", "central"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_closure_that_does_not_repeat_is_refused(kind, estimator, method):
    net = Net()
    before = bits(net)
    optimizer = optimizer_for(net, method, estimator=estimator)
    with pytest.raises(UserError, match=r"computed again .* draw the batch before the step"):
        optimizer.step(unrepeatable(kind, net))
    assert_same_bits(bits(net), before)
    assert optimizer.step_count == 0


def test_so_is_a_loss_of_the_differences_that_does_not_repeat():
    net, x = Net(), rows(4)
    wrong = unrepeatable("draws its batch", net)
    with pytest.raises(UserError, match="computed again"):
        optimizer_for(net).step(lambda: net(x), lambda: ZerothLoss(wrong))


@pytest.mark.parametrize(
    "draw",
    [
        lambda: torch.randn(4, 4, dtype=torch.float64),
        lambda: rows(9)[np.random.permutation(9)[:4]],
        lambda: rows(4, random.randrange(99)),
    ],
    ids=["torch", "numpy", "python"],
)
def test_global_generators_are_replayed(draw):
    net = Net()
    optimizer = optimizer_for(net, adapter_lr=0.0, base_lr=0.0, eps=1e-6)
    optimizer.step(lambda: net(draw()))
    assert abs(optimizer.last_step.projected_grad[0]) < 100  # two batches would give some 1e5


def test_without_the_self_check_nothing_is_evaluated_again():
    net = Net()
    optimizer_for(net, self_check=False).step(unrepeatable("counts its calls", net))


# Losses that are scaled.


class OwnScaler(torch.amp.GradScaler):
    def scale(self, outputs):
        return outputs * self._scale if self._scale is not None else super().scale(outputs)


def scaled(optimizer, net, x, how):
    kind = OwnScaler if how == "of a class of one's own" else torch.amp.GradScaler
    scaler = kind("cpu", init_scale=2.0**16 if how.startswith("step of") else 8.0)
    scaler.scale(torch.ones(()))  # torch asserts that the scaler was used
    if how in ("step of the optimizer", "small scale", "of a class of one's own"):
        optimizer.step(lambda: scaler.scale(net(x)))
    elif how == "closure given to the scaler":
        scaler.step(optimizer, lambda: scaler.scale(net(x)))
    elif how == "divided":
        optimizer.accumulate(lambda: scaler.scale(net(x)) / 2)
    elif how == "sum of two":
        optimizer.accumulate(lambda: scaler.scale(net(x[:2])) + scaler.scale(net(x[2:])))
    elif how == "measured":
        optimizer.measure(lambda: scaler.scale(net(x)), net(x) * 8, optimizer.before_pass())
    else:
        loss = (lambda: net(x)) if how == "only unscaled" else (lambda: scaler.scale(net(x)))
        optimizer.accumulate(loss)
        scaler.step(optimizer)


@pytest.mark.parametrize(
    "how",
    [
        "step of the optimizer",
        "step of the scaler",
        "small scale",
        "closure given to the scaler",
        "divided",
        "sum of two",
        "of a class of one's own",
        "measured",
        "only unscaled",
    ],
)
@pytest.mark.parametrize("method", ["hybrid", "zo-peft"])
def test_a_loss_under_a_scaler_is_refused(how, method):
    net, x = Net().float(), rows(4).float()
    before, scale = bits(net), torch.amp.GradScaler.scale
    if (how, method) == ("only unscaled", "zo-peft"):
        pytest.skip("torch refuses it, because no gradient was scaled")
    with pytest.raises(UserError, match="GradScaler"):
        scaled(optimizer_for(net, method), net, x, how)
    assert_same_bits(bits(net), before)
    assert torch.amp.GradScaler.scale is scale


def test_a_disabled_scaler_is_allowed():
    net, x = Net(), rows(4)
    scaler, optimizer = torch.amp.GradScaler("cpu", enabled=False), optimizer_for(net)
    optimizer.step(lambda: scaler.scale(net(x)))
    assert optimizer.step_count == 1


def test_the_remedy_gives_the_step_without_a_scaler():
    net, twin, x = Net().float(), Net().float(), rows(4).float()
    twin.load_state_dict(net.state_dict())
    optimizer, plain = optimizer_for(net), optimizer_for(twin)
    scaler = torch.amp.GradScaler("cpu")
    for _ in range(2):
        optimizer.zero_grad()
        generators = optimizer.before_pass()
        loss = net(x)
        scaler.scale(loss).backward()
        optimizer.measure(lambda: net(x), loss.detach(), generators)
        scaler.step(optimizer)
        scaler.update()
        plain.step(lambda: twin(x))
    for name, p in net.named_parameters():
        torch.testing.assert_close(p, dict(twin.named_parameters())[name])


@pytest.mark.parametrize("factor", [65536, 0.5, torch.tensor(300.0), torch.tensor(65536.0)])
def test_factors_that_no_scaler_would_use_stay_allowed(factor):
    net, x = Net(), rows(4)
    optimizer = optimizer_for(net, base_lr=0.0, adapter_lr=0.0)
    optimizer.step(lambda: net(x) * factor)
    assert optimizer.step_count == 1
