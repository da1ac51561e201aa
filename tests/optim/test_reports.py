"""Reading the scalars one step late gives the same steps, and the host never waits."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import zofo.optim.update
from tests.support.models import assert_same_bits, batch_for, bits, build, loss_of
from zofo import HybridOptimizer, param_groups

METHODS = {"hybrid": "lora", "zo-peft": "lora", "zo-ft": None}


def optimizer_of(model, method="hybrid", *, late, **options):
    groups = param_groups(model, method, base_lr=1e-3, adapter_lr=1e-2, base_weight_decay=0.1)
    options = {"optimizer": "AdamW", "max_grad_norm": 1.0, **options}
    return HybridOptimizer(groups, model, seed=3, reads_late=late, **options)


class NoWaiting(TorchDispatchMode):
    """Raises an error where the host reads a tensor's value."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func in (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.equal.default):
            raise AssertionError(f"the host waits in {func}")
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("estimator", ["forward", "central"])
@pytest.mark.parametrize("method", METHODS)
def test_reading_late_changes_no_bit(method, estimator):
    model = build("llama", METHODS[method]).train()
    twin = copy.deepcopy(model)
    batch = batch_for("llama")
    now = optimizer_of(model, method, late=False, estimator=estimator, num_directions=2)
    late = optimizer_of(twin, method, late=True, estimator=estimator, num_directions=2)
    for _ in range(4):
        now.step(lambda: loss_of(model, batch))
        late.step(lambda: loss_of(twin, batch))
        assert late.last_read is not None
        assert late.last_read.step in (now.last_step.step - 1, 0)
    assert_same_bits(bits(model), bits(twin))
    assert late.trajectory == now.trajectory
    assert late.last_step == now.last_step
    assert late.num_forwards == now.num_forwards
    assert_same_states(late.state_dict(), now.state_dict())


class Plain(nn.Module):
    """A model without transformers, because the host reads the masks of transformers."""

    def __init__(self):
        super().__init__()
        self.table, self.layer = nn.Embedding(20, 8), nn.Linear(8, 8)
        self.adapter = nn.Linear(8, 2)
        for p in (*self.table.parameters(), *self.layer.parameters()):
            p.requires_grad_(False)

    def forward(self, ids):
        return self.adapter(self.layer(self.table(ids)).tanh()).square().mean()


@pytest.mark.parametrize("estimator", ["forward", "central"])
def test_the_host_does_not_wait_for_the_step_it_queues(monkeypatch, estimator):
    """The host queues a step without waiting for it.

    The test uses SGD, because torch's AdamW reads its step count, which lies on the host.
    """
    model, ids = Plain(), torch.arange(6).view(2, 3)
    options = {"optimizer": "SGD", "optimizer_kwargs": {"momentum": 0.9}}
    optimizer = optimizer_of(model, late=True, self_check=False, estimator=estimator, **options)
    optimizer.step(lambda: model(ids))
    # The CPU kernels read their coefficients on the host, so the test replaces them.
    monkeypatch.setattr(zofo.optim.update, "combine_many", lambda *args, **kwargs: None)
    for _ in range(3):
        with NoWaiting():
            optimizer.step(lambda: model(ids))
    assert len(optimizer.trajectory) == 4


def test_the_check_for_waiting_can_fail():
    model, ids = Plain(), torch.arange(6).view(2, 3)
    optimizer = optimizer_of(model, late=False, self_check=False)
    with NoWaiting(), pytest.raises(AssertionError, match="the host waits"):
        optimizer.step(lambda: model(ids))


@pytest.mark.parametrize("what", ["loss", "difference"])
@pytest.mark.parametrize("inner", ["AdamW", "SGD"])
def test_a_step_that_is_not_finite_is_left_out(what, inner):
    model = build("llama", "lora").train()
    twin = copy.deepcopy(model)
    batch = batch_for("llama")
    calls = {"n": 0}

    def closure(of, bad):
        loss = loss_of(of, batch)
        calls["n"] += 1
        is_first = calls["n"] % 2 == 1
        spoiled = bad and (what == "loss" or not is_first)
        return loss * math.nan if spoiled else loss

    now, late = optimizer_of(model, late=False), optimizer_of(twin, late=True)
    if inner == "SGD":
        now = optimizer_of(model, late=False, optimizer="SGD", optimizer_kwargs={"momentum": 0.9})
        late = optimizer_of(twin, late=True, optimizer="SGD", optimizer_kwargs={"momentum": 0.9})
    for step in range(5):
        bad = step == 2
        calls["n"] = 0
        if bad:
            with pytest.warns(UserWarning, match="step 2 was not applied.* loss .* not finite"):
                now.step(lambda bad=bad: closure(model, bad))
        else:
            now.step(lambda bad=bad: closure(model, bad))
        calls["n"] = 0
        if step == 3:  # The late optimizer reads step 2 during step 3.
            with pytest.warns(UserWarning, match="step 2 was not applied.* loss .* not finite"):
                late.step(lambda bad=bad: closure(twin, bad))
        else:
            late.step(lambda bad=bad: closure(twin, bad))
    assert late.trajectory == now.trajectory
    assert [row[0].step for row in late.trajectory.updates] == [0, 1, 3, 4]
    assert_same_bits(bits(model), bits(twin))
    assert_same_states(late.state_dict(), now.state_dict())


def test_what_is_read_waits_for_the_step():
    model = build("llama", "lora").train()
    batch = batch_for("llama")
    optimizer = optimizer_of(model, late=True)
    for _ in range(2):
        optimizer.step(lambda: loss_of(model, batch))
    assert optimizer.last_read.step == 0
    assert len(optimizer.trajectory) == 2
    assert optimizer.last_read.step == 1
    optimizer.step(lambda: loss_of(model, batch))
    saved = optimizer.state_dict()
    assert saved["zofo"]["last_measured"]["step"] == 2


def assert_same_states(a, b):
    assert a["zofo"] == b["zofo"]
    assert a["state"].keys() == b["state"].keys()
    for key, state in a["state"].items():
        for name, value in state.items():
            same = value == b["state"][key][name]
            assert bool(same.all()) if isinstance(same, torch.Tensor) else same, (key, name)
