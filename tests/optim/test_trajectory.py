"""The history of updates determines the base: a replay gives the same bits.

Damaged files are refused.
"""

from __future__ import annotations

import copy
import itertools

import pytest
import torch
from torch.optim.lr_scheduler import LambdaLR

from tests.support.models import assert_same_bits, batch_for, build, loss_of
from tests.support.trainers import trainer_for
from zofo.disk.files import write_tensors
from zofo.errors import UserError
from zofo.noise.combine import DISTRIBUTIONS, direction
from zofo.optim.blocks import split_parameters
from zofo.optim.methods import param_groups
from zofo.optim.optimizer import HybridOptimizer
from zofo.optim.trajectory import MAX_UPDATES, GroupSpec, Trajectory, Update

NUM_STEPS = 6
PER_MODULE = {"*layers.0*": 1e-3, "lm_head*": 0.0, "*.weight": 3e-4}


def base_of(model):
    return {name: p.detach().clone() for name, p in split_parameters(model).base.items()}


def trained(
    *,
    architecture="llama",
    adapter="lora",
    dtype=torch.float32,
    base_lr=1e-3,
    weight_decay=0.0,
    schedule=None,
    num_steps=NUM_STEPS,
    **options,
):
    """Return an untrained model, and the path of bases and the optimizer of its trained twin."""
    model = build(architecture, adapter, dtype=dtype)
    original, batches = copy.deepcopy(model), [batch_for(architecture, seed=i) for i in range(3)]
    groups = param_groups(
        model, "hybrid", base_lr=base_lr, adapter_lr=1e-2, base_weight_decay=weight_decay
    )
    optimizer = HybridOptimizer(groups, model, **{"seed": 2**40 + 3, **options})
    scheduler = LambdaLR(optimizer, schedule or (lambda t: 1.0))
    path = [base_of(model)]
    for step in range(num_steps):
        optimizer.step(lambda b=batches[step % 3]: loss_of(model, b))
        scheduler.step()
        path.append(base_of(model))
    return original, path, optimizer


VARIANTS = {
    "plain": {},
    "weight decay": {"weight_decay": 0.3},
    "rates by module": {"base_lr": PER_MODULE},
    "schedule": {"schedule": lambda t: max(0.0, 1 - t / 4)},
    "everything": {
        "weight_decay": 0.3,
        "base_lr": PER_MODULE,
        "schedule": lambda t: 1 / (t + 1),
        "estimator": "central",
    },
}


DRAWS = [
    draw
    for draw in itertools.product(
        (torch.float32, torch.bfloat16, torch.float16), DISTRIBUTIONS, (1, 4)
    )
    if draw[1:] != ("rank-one", 4)  # the rows share its directions
]
"""Dtype, distribution and number of directions."""


def replays():
    """Return every pair of draws and variant.

    The default run takes all draws with the variant that has every option, and the other variants
    with two draws.
    """
    few = [(torch.float32, "rademacher", 1), (torch.bfloat16, "gaussian", 4)]
    return [
        pytest.param(
            *draw,
            variant,
            marks=[] if variant == "everything" or draw in few else [pytest.mark.slow],
        )
        for draw in DRAWS
        for variant in VARIANTS
    ]


@pytest.mark.parametrize(("dtype", "distribution", "num_directions", "variant"), replays())
def test_replay_gives_the_trained_base_bit_for_bit(
    tmp_path, dtype, distribution, num_directions, variant
):
    original, path, optimizer = trained(
        dtype=dtype,
        distribution=distribution,
        num_directions=num_directions,
        eps=1e-2 if dtype == torch.bfloat16 else 1e-3,
        **VARIANTS[variant],
    )
    assert any(not torch.equal(path[-1][n], path[0][n]) for n in path[0])
    optimizer.trajectory.save(tmp_path / "t.safetensors")
    loaded, _ = Trajectory.load(tmp_path / "t.safetensors")
    loaded.replay(split_parameters(original).base)
    assert_same_bits(base_of(original), path[-1])


@pytest.mark.parametrize("architecture", ["opt", "gpt2", "bert"])
def test_replay_of_other_architectures(architecture):
    original, path, optimizer = trained(architecture=architecture)
    optimizer.trajectory.replay(split_parameters(original).base)
    assert_same_bits(base_of(original), path[-1])


def test_a_replay_reports_how_far_it_is():
    model = build("llama", None)
    base = split_parameters(model).base
    spec = GroupSpec(tuple(base), tuple(range(len(base))))
    trajectory = Trajectory(
        0, "rademacher", 1e-3, "forward", (spec,), [(Update(0, (1.0,), 0.1, 0),)]
    )
    reports = []
    trajectory.replay(base, progress=lambda *numbers: reports.append(numbers))
    total = sum(p.numel() for p in base.values())
    assert [num for num, _ in reports] == sorted({num for num, _ in reports})
    assert reports[-1] == (total, total)
    assert len(reports) == len(base)


def test_the_adapter_does_not_matter_to_a_replay():
    """A replay on a model without adapter gives the same base.

    Users merge or ship such a model.
    """
    original, path, optimizer = trained()
    plain = build("llama", None, seed=5)
    with torch.no_grad():
        for name, parameter in split_parameters(plain).base.items():
            parameter.copy_(split_parameters(original).base[name])
    optimizer.trajectory.replay(split_parameters(plain).base)
    assert_same_bits(base_of(plain), path[-1])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_prefix_is_the_base_at_that_step(dtype):
    original, path, optimizer = trained(dtype=dtype, eps=1e-2, weight_decay=0.1)
    parameters = split_parameters(original).base
    for step in range(NUM_STEPS):
        assert_same_bits(base_of(original), path[step])
        optimizer.trajectory.replay(parameters, start=step, stop=step + 1)
    assert_same_bits(base_of(original), path[NUM_STEPS])

    other = copy.deepcopy(original)
    with torch.no_grad():
        for name, parameter in split_parameters(other).base.items():
            parameter.copy_(path[0][name])
    optimizer.trajectory.replay(split_parameters(other).base, stop=4)
    assert_same_bits(base_of(other), path[4])
    optimizer.trajectory.replay(split_parameters(other).base, start=4)
    assert_same_bits(base_of(other), path[NUM_STEPS])


def test_a_step_that_was_not_applied_is_not_replayed():
    original = build("llama")
    model = copy.deepcopy(original)
    optimizer = HybridOptimizer(param_groups(model, "hybrid", base_lr=1e-3), model)
    for step, factor in enumerate((1.0, float("nan"), 1.0)):
        batch = batch_for("llama", seed=step)
        if factor == 1.0:
            optimizer.step(lambda b=batch: loss_of(model, b))
        else:
            with pytest.warns(UserWarning, match="not finite"):
                optimizer.step(lambda b=batch, f=factor: loss_of(model, b) * f)
    assert [row[0].step for row in optimizer.trajectory.updates] == [0, 2]
    optimizer.trajectory.replay(split_parameters(original).base)
    assert_same_bits(base_of(original), base_of(model))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_rate_of_zero_leaves_every_bit(dtype):
    """An update with rate zero changes no bit.

    Negative zeros keep their sign, which adding a positive zero would remove.
    """
    weight = torch.full((256,), -0.0, dtype=dtype)
    update = Update(step=0, projected_grad=(5.0,), lr=0.0, weight_decay=0.5)
    update.apply([weight], [0], seed=0, distribution="rademacher")
    assert torch.equal(weight, torch.zeros_like(weight))
    assert bool(weight.signbit().all())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_updates_below_half_a_spacing_are_not_swallowed(dtype):
    """Weights move by −lr · s · v on average, even far below the spacing of 16-bit numbers.

    Stochastic rounding makes this possible.
    """
    num = 200_000
    weight, v = torch.ones(num, dtype=dtype), direction((num,), seed=1, step=2, tensor=3)
    update = Update(step=2, projected_grad=(3.0,), lr=1e-5, weight_decay=0.0)
    update.apply([weight], [3], seed=1, distribution="rademacher")
    progress = (weight.double() - 1) * v.double()
    z = (progress.mean() + 3e-5) / (progress.std() / num**0.5)
    assert float(z.abs()) < 4
    assert float(progress.mean()) < -2e-5


# Tests of the files.


def example(num_steps=7, num_directions=2, num_groups=2):
    generator = torch.Generator().manual_seed(0)
    scalars = torch.randn(num_steps, num_directions, dtype=torch.float64, generator=generator)
    groups = tuple(
        GroupSpec((f"first.{g}", f"second.{g}"), (2 * g, 2 * g + 1)) for g in range(num_groups)
    )
    updates = [
        tuple(
            Update(3 * t, tuple(scalars[t].tolist()), 0.1 / (t + g + 1), 0.01 * g)
            for g in range(num_groups)
        )
        for t in range(num_steps)
    ]
    return Trajectory(2**64 - 1, "gaussian", 1e-3, "central", groups, updates)


@pytest.mark.parametrize("num_directions", [1, 3])
@pytest.mark.parametrize("num_groups", [1, 2])
@pytest.mark.parametrize("num_steps", [0, 1, 7])
def test_save_and_load_are_inverse(tmp_path, num_steps, num_groups, num_directions):
    trajectory = example(num_steps, num_directions, num_groups)
    trajectory.save(tmp_path / "t.safetensors", base="some/model", digits=[1, 2])
    loaded, header = Trajectory.load(tmp_path / "t.safetensors")
    assert loaded == trajectory
    assert len(loaded) == num_steps
    assert (header["base"], header["digits"]) == ("some/model", [1, 2])


def test_saving_twice_gives_the_same_file_and_nothing_beside_it(tmp_path):
    for name in ("a", "b", "a"):
        example().save(tmp_path / name)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    assert {p.name for p in tmp_path.iterdir()} == {"a", "b"}


def test_two_thousand_steps_of_a_small_model_take_at_most_64_kib(tmp_path):
    """The trajectory of 2000 steps fits into 64 KiB.

    The names are those of SmolLM2-135M, a 30-layer Llama.
    """
    parts = [f"self_attn.{p}_proj" for p in "qkvo"] + [
        f"mlp.{p}_proj" for p in ("gate", "up", "down")
    ]
    parts += ["input_layernorm", "post_attention_layernorm"]
    names = [f"model.layers.{i}.{part}.weight" for i in range(30) for part in parts]
    names += ["lm_head.weight", "model.norm.weight"]
    trajectory = example(2000, 1, 1)
    trajectory.groups = (GroupSpec(tuple(names), tuple(range(len(names)))),)
    trajectory.save(tmp_path / "t.safetensors", base_fingerprint="0" * 32)
    assert (tmp_path / "t.safetensors").stat().st_size <= 64 * 1024
    assert Trajectory.load(tmp_path / "t.safetensors")[0] == trajectory


def refused(path, message):
    with pytest.raises(UserError, match=message) as caught:
        Trajectory.load(path)
    assert str(path) in str(caught.value)


def test_a_missing_file(tmp_path):
    refused(tmp_path / "t.safetensors", "does not exist")


def test_a_truncated_file(tmp_path):
    path = tmp_path / "t.safetensors"
    example().save(path)
    content = path.read_bytes()
    for size in range(0, len(content), 7):
        path.write_bytes(content[:size])
        refused(path, "damaged")


def test_a_changed_byte_is_noticed_wherever_it_is(tmp_path):
    path = tmp_path / "t.safetensors"
    example(2).save(path, base="some/model")
    content = path.read_bytes()
    for place in range(len(content)):
        damaged = bytearray(content)
        damaged[place] ^= 1
        path.write_bytes(damaged)
        refused(path, "damaged|zofo reads")


@pytest.mark.parametrize("key", ["format", "noise_version", "dtype_policy"])
def test_an_unknown_version(tmp_path, key):
    path = tmp_path / "t.safetensors"
    example().save(path, **{key: 99})
    refused(path, f"{key} 99; this zofo reads")


def test_a_file_of_another_kind(tmp_path):
    path = tmp_path / "t.safetensors"
    write_tensors(path, {"weight": torch.zeros(2)}, {})
    refused(path, "not a trajectory of zofo")
    path.write_bytes(b"PK\x03\x04 some other file")
    refused(path, "damaged")


def test_a_model_without_the_moved_tensors_is_refused(tmp_path):
    parameters = {"first.0": torch.nn.Parameter(torch.zeros(2))}
    with pytest.raises(UserError, match=r"'second\.0' \(3 missing in all"):
        example().replay(parameters)
    assert torch.equal(parameters["first.0"], torch.zeros(2))


def test_a_run_whose_trajectory_could_not_be_read_again_is_refused_at_its_start(tmp_path):
    rates = {"*layers.0*": 1e-3, "*": 1e-4}
    options = {"model": build("llama", "lora"), "base_lr": rates}
    trainer_for(tmp_path, max_steps=MAX_UPDATES // 2, **options)
    with pytest.raises(UserError, match="updates that a trajectory can hold"):
        trainer_for(tmp_path, max_steps=MAX_UPDATES // 2 + 1, **options)
