"""Directions that rows share: known moments, micro-batches, records, and what is refused."""

from __future__ import annotations

import copy
import functools

import pytest
import torch
from torch import nn
from torch.nn import functional

from tests.support.models import assert_same_bits, batch_for, bits, build
from zofo.errors import UserError
from zofo.optim.blocks import split_parameters
from zofo.optim.methods import param_groups
from zofo.optim.optimizer import HybridOptimizer
from zofo.optim.trajectory import Trajectory
from zofo.optim.update import total

ROWS, STEPS = 5, 500
ZO = {"base_lr": 1e-4, "adapter_lr": 1e-2}


class Line(nn.Module):
    """A linear layer with a bias, so that one weight has rank-one directions and one has not."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(4, 3)

    def forward(self, x):
        return self.layer(x)


def shares_of(model, x, y):
    """Quadratic losses, of which a central difference is exact: [rows]."""
    return (model(x) - y).square().sum(1) / 2


def estimates(per_step):
    """The estimates of many steps at one point: [steps, weights of the matrix], and of the bias."""
    torch.manual_seed(3)
    model = Line().double()
    x, y = torch.randn(ROWS, 4).double(), torch.randn(ROWS, 3).double()
    start = copy.deepcopy(model.state_dict())
    rows = [
        torch.autograd.grad(share, list(model.parameters()), retain_graph=True)
        for share in shares_of(model, x, y)
    ]
    optimizer = HybridOptimizer(
        param_groups(model, "zo-ft", base_lr=1.0),
        model,
        distribution="rank-one",
        directions_per_step=per_step,
        estimator="central",
        self_check=False,
        seed=11,
    )
    found = []
    for _ in range(STEPS):
        model.load_state_dict(start)
        optimizer.step(lambda: shares_of(model, x, y))
        moved = [start[n] - p.detach() for n, p in model.named_parameters()]
        found.append([m.flatten() for m in moved])
    weights = [torch.stack([row[i].flatten() for row in rows]) for i in range(2)]  # [rows, size]
    return [torch.stack([f[i] for f in found]) for i in range(2)], weights


@pytest.mark.parametrize("per_step", [1, 2, "rows"])
def test_the_estimate_has_the_known_mean_and_second_moment(per_step):
    (matrix, bias), (by_row, bias_by_row) = estimates(per_step)
    for found, rows in ((matrix, by_row), (bias, bias_by_row)):
        error = (found.mean(0) - rows.sum(0)) / (found.std(0) / STEPS**0.5)
        assert error.abs().max() < 4.5
    # s of a direction is that of its rows' gradients g_k, also along the bias, whose direction is
    # one for all: E‖Σ_k s_k v_k‖² = d Σ_k (‖g_k‖² + ‖bias's g_k‖²) + Σ_{k ≠ l} g_k · g_l
    num = {1: 1, 2: 2, "rows": ROWS}[per_step]
    group = torch.arange(ROWS) % num
    g = torch.zeros(num, 12).double().index_add(0, group, by_row)
    b = torch.zeros(num, 3).double().index_add(0, group, bias_by_row)
    cross = g.sum(0).square().sum() - g.square().sum()
    expected = 12 * (g.square().sum() + b.square().sum()) + cross
    # The common direction of the bias correlates the s_k; v_k · v_l has the mean 0 all the same.
    squares = matrix.square().sum(1)
    assert abs(squares.mean() - expected) < 4.5 * squares.std() / STEPS**0.5


def lm_shares(model, batch):
    labels = batch["labels"][:, 1:]
    logits = model(**batch).logits[:, -labels.shape[1] - 1 : -1]  # without those of a prompt
    losses = functional.cross_entropy(logits.transpose(1, 2), labels, reduction="none")
    return losses.mean(1) / len(labels)


def share_of(model, batch, num):
    return lm_shares(model, batch) / num


def hybrid(model, per_step="rows", **options):
    options = {"distribution": "rank-one", "directions_per_step": per_step, "seed": 3} | options
    return HybridOptimizer(param_groups(model, "hybrid", **ZO), model, optimizer="adamw", **options)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("per_step", [1, 2, "rows"])
def test_the_record_turns_the_original_base_into_the_trained_one(tmp_path, dtype, per_step):
    model = build("llama", "lora", dtype=dtype)
    original, optimizer = copy.deepcopy(model), hybrid(model, per_step)
    for step in range(4):
        batch = batch_for("llama", rows=3 if step == 2 else 5, seed=step)  # a last, smaller batch
        optimizer.step(lambda batch=batch: lm_shares(model, batch))
    optimizer.trajectory.save(tmp_path / "t.safetensors")
    trajectory, _ = Trajectory.load(tmp_path / "t.safetensors")
    assert trajectory.updates == optimizer.trajectory.updates
    assert trajectory.rank_one == optimizer.trajectory.rank_one
    trajectory.replay(split_parameters(original).base)
    base = {k: v.detach() for k, v in split_parameters(model).base.items()}
    assert_same_bits({k: v.detach() for k, v in split_parameters(original).base.items()}, base)


def test_micro_batches_take_the_directions_of_the_whole_batch():
    batch = batch_for("llama", rows=6)
    moved = []
    for num in (1, 3):
        model = build("llama", "lora")
        optimizer = hybrid(model)
        for part in range(num):
            rows = slice(part * 6 // num, (part + 1) * 6 // num)
            micro = {k: v[rows] for k, v in batch.items()}
            optimizer.accumulate(functools.partial(share_of, model, micro, num))
        optimizer.step()
        moved.append(optimizer.trajectory.updates[0][0].projected_grad)
    torch.testing.assert_close(torch.tensor(moved[0]), torch.tensor(moved[1]), rtol=1e-2, atol=1e-3)


def test_a_stopped_run_continues_with_the_same_kinds_of_direction():
    model = build("gpt2", "lora").eval()  # its positions are one row for the whole batch
    optimizer = hybrid(model)
    batches = [batch_for("gpt2", rows=4, seed=s) for s in range(4)]
    for batch in batches[:2]:
        optimizer.step(lambda batch=batch: lm_shares(model, batch))
    twin = copy.deepcopy(model)
    other = hybrid(twin)
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    other.trajectory = copy.deepcopy(optimizer.trajectory)
    assert other.rank_one == optimizer.rank_one
    for batch in batches[2:]:
        optimizer.step(lambda batch=batch: lm_shares(model, batch))
        other.step(lambda batch=batch: lm_shares(twin, batch))
    assert_same_bits(bits(model), bits(twin))


def test_a_step_without_base_rate_is_that_of_the_adapter_alone():
    batch, bases = batch_for("llama", rows=4), []
    for method, options in (
        ("hybrid", {"distribution": "rank-one", "directions_per_step": "rows"}),
        ("fo-peft", {}),
    ):
        model = build("llama", "lora")
        rates = {"base_lr": 0.0} if method == "hybrid" else {}
        groups = param_groups(model, method, adapter_lr=1e-2, **rates)
        optimizer = HybridOptimizer(groups, model, optimizer="adamw", **options)
        for _ in range(3):
            optimizer.step(lambda model=model: lm_shares(model, batch))
        bases.append(bits(model))
    assert_same_bits(*bases)


def test_a_row_that_is_not_finite_is_left_out_and_said():
    model, batch = build("llama", "lora"), batch_for("llama", rows=4)
    optimizer = hybrid(model, self_check=False)
    bad = torch.tensor([0.0, 0.0, torch.inf, 0.0])

    def closure():
        shares = lm_shares(model, batch)
        return shares if torch.is_grad_enabled() else shares + bad

    with pytest.warns(UserWarning, match="1 rows have a loss difference or a reward"):
        optimizer.step(closure)
    scalars = optimizer.last_step.projected_grad
    assert scalars[2] == 0
    assert all(scalars[i] for i in (0, 1, 3))
    assert optimizer.last_step.rows_left_out == 1


def test_rows_that_act_on_each_other_are_refused():
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Linear(4, 1))
    optimizer = HybridOptimizer(
        param_groups(model, "zo-ft", base_lr=1e-3),
        model,
        distribution="rank-one",
        directions_per_step="rows",
    )
    x, before = torch.randn(6, 4), bits(model)
    with pytest.raises(UserError, match="act on each other"):
        optimizer.step(lambda: model(x)[:, 0].square() / 6)
    assert_same_bits(before, bits(model))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"directions_per_step": 4}, "needs the distribution"),
        ({"directions_per_step": "row"}, "or rows"),
        ({"directions_per_step": 0}, "from 1 to"),
        ({"directions_per_step": 1 << 24}, "from 1 to"),
        ({"distribution": "rank-one", "num_directions": 2}, "directions_per_step instead"),
    ],
)
def test_options_that_contradict_each_other_are_refused(options, message):
    model = build("llama", "lora")
    with pytest.raises(UserError, match=message):
        HybridOptimizer(param_groups(model, "hybrid", **ZO), model, **options)


def test_a_closure_without_shares_is_told_what_to_return():
    model, batch = build("llama", "lora"), batch_for("llama")
    with pytest.raises(UserError, match=r"shape \[rows\]"):
        hybrid(model).step(lambda: lm_shares(model, batch).sum())


@pytest.mark.parametrize("num", [0, 1, 2, 3, 7, 32])
def test_the_total_is_the_sum(num):
    scalars = torch.randn(num, dtype=torch.float64)
    torch.testing.assert_close(total(scalars), scalars.sum())
