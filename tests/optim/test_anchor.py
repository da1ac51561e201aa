"""An anchor pulls the base towards where it began, exactly and replayably, with w_0 on the disk."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch

from tests.support.models import assert_same_bits, batch_for, build, loss_of
from zofo.disk.copied import CopyOnDisk
from zofo.errors import UserError
from zofo.noise.pull import pull, pull_by_torch
from zofo.optim.blocks import split_parameters
from zofo.optim.methods import param_groups
from zofo.optim.optimizer import HybridOptimizer
from zofo.optim.trajectory import Trajectory


def base_of(model):
    return {name: p.detach().clone() for name, p in split_parameters(model).base.items()}


def optimizer_for(model, *, method="hybrid", anchor=100.0, base_lr=1e-3, groups=None, **options):
    made = param_groups(
        model, method, base_lr=base_lr, adapter_lr=1e-2, base_anchor=anchor, **groups or {}
    )
    return HybridOptimizer(made, model, **{"seed": 2**40 + 3, "eps": 1e-2, **options})


def run(model, optimizer, steps):
    batches = [batch_for("llama", seed=i) for i in range(3)]
    path = []
    for step in steps:
        optimizer.step(lambda b=batches[step % 3]: loss_of(model, b))
        path.append(base_of(model))
    return path


def distance(one, other):
    return sum(float((one[n].double() - other[n].double()).square().sum()) for n in one) ** 0.5


def pulled(now, origin, share, dtype, step=0):
    weight = torch.full((4096,), now, dtype=dtype)
    pull(weight, torch.full((4096,), origin, dtype=dtype), share, seed=3, step=step, tensor=2)
    return weight


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_pull_goes_its_share_of_the_way(dtype):
    assert torch.equal(pulled(3.0, 1.0, 0.25, dtype), torch.full((4096,), 2.5, dtype=dtype))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_pull_far_below_the_spacing_is_right_in_the_mean(dtype):
    """The next number below 3 lies a spacing away, and the pull is a tenth of it."""
    below = torch.nextafter(torch.tensor(3.0, dtype=dtype), torch.tensor(0.0, dtype=dtype))
    spacing = 3.0 - float(below)
    weight = pulled(3.0, 1.0, 0.1 * spacing / 2, dtype)
    assert set(weight.tolist()) == {3.0, float(below)}
    share = float((weight != 3.0).double().mean())
    assert abs(share - 0.1) < 4 * (0.1 * 0.9 / 4096) ** 0.5
    # Further steps have draws of their own, and a weight at its origin stays.
    assert not torch.equal(weight, pulled(3.0, 1.0, 0.1 * spacing / 2, dtype, step=1))
    assert torch.equal(pulled(3.0, 3.0, 0.5, dtype), torch.full((4096,), 3.0, dtype=dtype))


def test_a_pull_is_the_same_for_every_layout():
    table = torch.randn(6, 8, dtype=torch.float32).to(torch.bfloat16)
    origin = torch.randn(6, 8).to(torch.bfloat16)
    other = table.t().contiguous().t()
    for weight in (table, other):
        pull(weight, origin, 0.005, seed=3, step=0, tensor=2)
    assert not other.is_contiguous()
    assert torch.equal(table, other)


def test_a_weight_is_rounded_alike_whatever_its_neighbours_do():
    """Of few weights off their origin and of many, each draws the bits of its own place."""
    goal = torch.zeros(4096, dtype=torch.bfloat16)
    many, few = torch.full_like(goal, 3.0), torch.zeros_like(goal)
    few[5::64] = 3.0
    for weight in (many, few):
        pull(weight, goal, 5e-4, seed=3, step=0, tensor=2)
    assert torch.equal(many[5::64], few[5::64])
    assert 0 < int((many[5::64] != 3.0).sum()) < 64


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_kernel_has_the_bits_of_the_torch_operations(dtype):
    """Whether many weights are off their origin or few, and whatever their size."""
    size = 2**18 + 2**17 + 5
    generator = torch.Generator().manual_seed(0)
    origin = torch.randn(size, generator=generator).to(dtype)
    origin[:400] = torch.logspace(-9, 4.5, 400).to(dtype)  # down to denormal numbers of float16
    off = torch.rand(size, generator=generator) < torch.linspace(0, 1, size)
    off[:400] = True
    moved = torch.where(off, origin * 1.01 + 1e-3 * origin.roll(1), origin)
    moved[1], origin[1] = 0.0, -0.0
    for share in (1e-4, 0.3, 1.0):
        ends = [moved.clone(), moved.clone()]
        options = {"seed": 2**63 + 7, "step": 9, "tensor": 5}
        pull(ends[0], origin, share, **options)
        pull_by_torch(ends[1], origin, share, **options)
        assert torch.equal(*(end.view(torch.int16) for end in ends))
        assert not torch.equal(ends[0], moved)


def test_the_step_is_that_of_the_equation():
    """In float64: w − lr Σ s v / K − lr λ (w − w_0), up to rounding."""
    model = build("llama", "lora", dtype=torch.float64)
    twin = copy.deepcopy(model)
    first = base_of(model)
    optimizer = optimizer_for(model, anchor=200.0)
    plain = optimizer_for(twin, anchor=0.0)
    run(model, optimizer, [0])
    run(twin, plain, [0])
    assert_same_bits(base_of(model), base_of(twin))  # where the base began, nothing pulls
    before = base_of(model)
    run(model, optimizer, [1])
    run(twin, plain, [1])
    for name, weight in base_of(model).items():
        wanted = base_of(twin)[name] - 1e-3 * 200.0 * (before[name] - first[name])
        assert torch.allclose(weight, wanted, rtol=0, atol=1e-12)


def test_an_anchored_base_stays_nearer():
    ends = []
    for anchor in (0.0, 300.0):
        model = build("llama", "lora")
        first = base_of(model)
        run(model, optimizer_for(model, anchor=anchor), range(8))
        ends.append(distance(base_of(model), first))
    assert 0 < ends[1] < 0.8 * ends[0]


@pytest.mark.parametrize("method", ["hybrid", "zo-ft"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_an_anchored_trajectory_is_replayed(tmp_path, method, dtype):
    model = build("llama", "lora" if method == "hybrid" else None, dtype=dtype)
    original = copy.deepcopy(model)
    is_first = method == "hybrid" and dtype == torch.float32
    options = {"distribution": "rank-one"} if is_first else {}
    rates = {"base_lr": {"*layers.0*": 1e-3, "*": 3e-4}, "groups": {"base_weight_decay": 0.3}}
    optimizer = optimizer_for(model, method=method, **rates, **options)
    path = run(model, optimizer, range(5))
    optimizer.trajectory.save(tmp_path / "t.safetensors")
    loaded, _ = Trajectory.load(tmp_path / "t.safetensors")
    assert loaded.has_anchor
    assert loaded == optimizer.trajectory
    plain = copy.deepcopy(original)
    loaded.replay(split_parameters(plain).base)
    assert_same_bits(base_of(plain), path[-1])
    # In parts, the second of which needs the original.
    plain, first = copy.deepcopy(original), base_of(original)
    base = split_parameters(plain).base
    loaded.replay(base, stop=3)
    assert_same_bits(base_of(plain), path[2])
    with pytest.raises(UserError, match="pass original"):
        loaded.replay(base, start=3)
    loaded.replay(base, start=3, original=CopyOnDisk(first, tmp_path))
    assert_same_bits(base_of(plain), path[-1])


def test_a_trajectory_without_anchor_keeps_its_format(tmp_path):
    model = build("llama", "lora")
    optimizer = optimizer_for(model, anchor=0.0)
    run(model, optimizer, range(2))
    optimizer.trajectory.save(tmp_path / "t.safetensors")
    assert Trajectory.load(tmp_path / "t.safetensors")[1]["format"] == 1


def test_a_loop_of_ones_own_continues_to_the_same_bits(tmp_path):
    model = build("llama", "lora")
    original = copy.deepcopy(model)
    optimizer = optimizer_for(model)
    run(model, optimizer, range(3))
    state, adapter = copy.deepcopy(optimizer.state_dict()), split_parameters(model).adapter
    adapter = {name: p.detach().clone() for name, p in adapter.items()}
    record = copy.deepcopy(optimizer.trajectory)
    path = run(model, optimizer, range(3, 6))

    again = copy.deepcopy(original)
    with torch.no_grad():
        for name, p in split_parameters(again).adapter.items():
            p.copy_(adapter[name])
    continued = optimizer_for(again)
    record.replay(split_parameters(again).base)
    continued.load_state_dict(state)
    continued.trajectory = record
    assert_same_bits(run(again, continued, range(3, 6))[-1], path[-1])
    # An optimizer that is made for the moved base does not know where it began.
    with pytest.raises(UserError, match="fingerprint"):
        optimizer_for(again).load_state_dict(state)
    late = optimizer_for(again, original=base_of(original))
    late.load_state_dict(copy.deepcopy(continued.state_dict()))
    late.trajectory = copy.deepcopy(continued.trajectory)
    ends = run(again, late, [6]), run(model, optimizer, [6])
    assert_same_bits(ends[0][-1], ends[1][-1])


def test_a_copy_of_the_optimizer_pulls_to_the_same_base():
    model = build("llama", "lora")
    optimizer = optimizer_for(model)
    run(model, optimizer, range(2))
    twin = copy.deepcopy(optimizer)
    ends = run(twin.model, twin, [2]), run(model, optimizer, [2])
    assert_same_bits(ends[0][-1], ends[1][-1])
    with pytest.raises(UserError, match="state_dict"):
        pickle.dumps(optimizer)


def test_wrong_anchors_are_refused():
    model = build("llama", "lora")
    with pytest.raises(UserError, match="at least 0"):
        param_groups(model, base_anchor=-1.0)
    with pytest.raises(UserError, match="lower base_anchor to at most 1000"):
        param_groups(model, base_lr=1e-3, base_anchor=2000.0)
    with pytest.raises(UserError, match="by its gradient"):
        param_groups(build("llama", None), "fo-ft", base_anchor=1.0)
    base = base_of(model)
    lacking = dict(list(base.items())[1:])
    with pytest.raises(UserError, match="lacks"):
        optimizer_for(model, original=lacking)
    moved = {name: weight + 1 for name, weight in base.items()}
    optimizer = optimizer_for(model, original=moved)
    with pytest.raises(UserError, match="not the original"):
        run(model, optimizer, [0])
    assert_same_bits(base_of(model), base)


def test_the_copy_is_read_one_tensor_at_a_time(tmp_path):
    tensors = {"a": torch.randn(3, 2).bfloat16(), "b": torch.zeros(0), "c": torch.tensor(2.5)}
    tensors["d"] = torch.randn(4, 5).t()
    copied = CopyOnDisk(tensors, tmp_path / "new")
    assert list((tmp_path / "new").iterdir()) == []  # It has no name.
    for name in ("d", "a", "c", "b", "a"):
        assert torch.equal(copied[name], tensors[name])
        assert copied[name].dtype == tensors[name].dtype
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot be written"):
        CopyOnDisk(tensors, tmp_path / "file" / "below")
