"""A quantised base moves by its scales, and its history gives every bit of it."""

from __future__ import annotations

import copy
import itertools

import peft
import pytest
import torch

from tests.optim.test_rows import lm_shares
from tests.support.models import batch_for, bits, loss_of
from tests.support.quantized import load_quantized, plain_decoder
from zofo.disk.files import fingerprint
from zofo.errors import UserError
from zofo.models.loading import load_model
from zofo.noise.combine import combine
from zofo.optim.blocks import split_parameters
from zofo.optim.methods import param_groups
from zofo.optim.optimizer import HybridOptimizer
from zofo.optim.trajectory import TRAJECTORY_FILE, Trajectory
from zofo.perturb.quantized import Scales, is_quantized, unit_of, unnest_scales
from zofo.saved.checkpoint import load_checkpoint, save_checkpoint

MOVING = ["nf4", "fp4", "int8"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return plain_decoder(tmp_path_factory.mktemp("base"))


def with_adapter(model, kind="lora"):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        config = {
            "lora": lambda: peft.LoraConfig(
                task_type="CAUSAL_LM", r=4, target_modules="all-linear", init_lora_weights=False
            ),
            "prefix": lambda: peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3),
            "prompt": lambda: peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3),
        }[kind]()
        return peft.get_peft_model(model, config)


def optimizer_of(model, method="hybrid", base_lr=1e-4, **options):
    groups = param_groups(model, method, base_lr=base_lr, adapter_lr=1e-2)
    return HybridOptimizer(groups, model, optimizer="AdamW", eps=1e-3, **options)


def train(optimizer, model, steps):
    batch = batch_for("llama")

    def loss():
        if optimizer.options.directions_per_step == 1:
            return loss_of(model, batch)
        return lm_shares(model, batch)

    return [float(optimizer.step(loss).sum()) for _ in range(steps)]


SIGNS = {"num_directions": 2}
ROWS = {"distribution": "rank-one", "directions_per_step": "rows"}
TELLING = [
    *(("nf4", SIGNS, adapter) for adapter in ("lora", "prefix", "prompt")),
    *(("fp4", SIGNS, "lora"), ("int8", SIGNS, "lora"), ("nf4", ROWS, "lora")),
    ("int8", ROWS, "prompt"),
]
OTHERS = [
    case
    for case in itertools.product(MOVING, (SIGNS, ROWS), ("lora", "prefix", "prompt"))
    if case not in TELLING
]


@pytest.mark.parametrize(
    ("kind", "options", "adapter"),
    [*TELLING, *(pytest.param(*case, marks=pytest.mark.slow) for case in OTHERS)],
)
def test_replay_gives_the_trained_base(tmp_path, folder, kind, options, adapter):
    model = with_adapter(load_quantized(folder, kind), adapter).train()
    optimizer = optimizer_of(model, **options)
    before = {n: p.detach().clone() for n, p in split_parameters(model).base.items()}
    train(optimizer, model, 4)
    trained = split_parameters(model)
    moved = {n for n, p in trained.base.items() if not torch.equal(p, before[n])}
    assert moved == trained.movable.keys()  # The codes stay.
    save_checkpoint(tmp_path, model, optimizer)
    with torch.no_grad():
        expected = loss_of(model.eval(), batch_for("llama"))

    loaded = load_checkpoint(load_quantized(folder, kind), tmp_path)
    assert fingerprint(split_parameters(loaded).base) == fingerprint(trained.base)
    assert fingerprint(split_parameters(loaded).adapter) == fingerprint(trained.adapter)
    with torch.no_grad():
        assert torch.equal(loss_of(loaded, batch_for("llama")), expected)


def test_the_history_of_nested_scales(tmp_path, folder):
    model = with_adapter(load_quantized(folder, "nested")).train()
    with pytest.warns(UserWarning, match=r"double quantisation.* [\d,]+ bytes more"):
        optimizer = optimizer_of(model)
    train(optimizer, model, 2)
    save_checkpoint(tmp_path, model, optimizer)
    loaded = load_checkpoint(load_quantized(folder, "nested"), tmp_path)
    trained = fingerprint(split_parameters(model).base)
    assert fingerprint(split_parameters(loaded).base) == trained


@pytest.mark.parametrize("kind", MOVING)
def test_a_continued_run_is_the_uninterrupted_one(folder, kind):
    whole = with_adapter(load_quantized(folder, kind)).train()
    losses = train(optimizer_of(whole), whole, 6)

    first = with_adapter(load_quantized(folder, kind)).train()
    optimizer = optimizer_of(first)
    begun = train(optimizer, first, 3)
    second = with_adapter(load_quantized(folder, kind)).train()
    again = optimizer_of(second)
    trajectory = optimizer.trajectory
    trajectory.replay(split_parameters(second).base)
    for name, parameter in split_parameters(second).adapter.items():
        parameter.data.copy_(split_parameters(first).adapter[name])
    again.load_state_dict(optimizer.state_dict())
    again.trajectory = trajectory
    assert begun + train(again, second, 3) == losses
    assert fingerprint(split_parameters(second).base) == fingerprint(split_parameters(whole).base)


def test_a_trajectory_records_the_units(tmp_path, folder):
    model = with_adapter(load_quantized(folder, "nf4")).train()
    optimizer = optimizer_of(model)
    train(optimizer, model, 2)
    optimizer.trajectory.save(tmp_path / TRAJECTORY_FILE)
    loaded, _ = Trajectory.load(tmp_path / TRAJECTORY_FILE)
    blocks = split_parameters(model)
    scales = {n: p for n, p in blocks.base.items() if isinstance(p, Scales)}
    assert loaded == optimizer.trajectory
    assert loaded.units == {blocks.base_index[n]: p.unit for n, p in scales.items()}
    assert len(set(loaded.units.values())) > 1

    # An optimizer on a base that has moved far measures in the units of the record.
    far, parameter = next(iter(scales.items()))
    parameter.data.mul_(2**10)
    moved = copy.deepcopy(model)
    for module in moved.modules():
        state = getattr(getattr(module, "weight", None), "quant_state", None)
        if state is not None:
            vars(state).pop("zofo_scales", None)
    another = optimizer_of(moved)
    assert another.trajectory.units[blocks.base_index[far]] > parameter.unit
    another.trajectory = loaded
    train(another, moved, 1)
    copied = split_parameters(moved).base
    assert all(copied[name].unit == parameter.unit for name, parameter in scales.items())


@pytest.mark.parametrize("kind", MOVING)
def test_a_base_rate_of_zero_is_fo_peft(folder, kind):
    runs = []
    for method in ("hybrid", "fo-peft"):
        model = with_adapter(load_quantized(folder, kind)).train()
        losses = train(optimizer_of(model, method, base_lr=0.0), model, 3)
        runs.append((losses, fingerprint(split_parameters(model).adapter)))
    assert runs[0] == runs[1]


@pytest.mark.parametrize(
    "kind", ["nf4", *(pytest.param(kind, marks=pytest.mark.slow) for kind in ("fp4", "int8"))]
)
def test_the_scales_alone_learn(folder, kind):
    """Pure zeroth order moves nothing but the scales, and the loss falls."""
    model = load_quantized(folder, kind).train()
    scales = [n for n, p in split_parameters(model).base.items() if isinstance(p, Scales)]
    optimizer = HybridOptimizer(
        param_groups(model, "zo-ft", base_lr=dict.fromkeys(scales, 3e-2)),
        model,
        estimator="central",
        num_directions=4,
        eps=1e-2,
    )
    before = bits(model)
    losses = train(optimizer, model, 12)
    assert losses[-1] < losses[0] - 0.02
    after = bits(model)
    assert all(torch.equal(after[n], before[n]) for n in before if n.endswith("norm.weight"))


@pytest.mark.parametrize("kind", [*MOVING, "stored as floats"])
def test_gradients_cannot_move_a_quantised_base(folder, kind):
    model = load_quantized(folder, kind)
    match = r"14 of its weights are quantized, .* scales hybrid and zo-ft move"
    with pytest.raises(UserError, match=match):
        param_groups(model, "fo-ft")


def test_units_do_not_change_a_base_without_scales(folder):
    import transformers as hf

    model = hf.AutoModelForCausalLM.from_pretrained(folder).train()
    model.config.use_cache = False
    assert unnest_scales(model) == 0
    assert optimizer_of(model, "zo-ft").trajectory.units == {}


class Line(torch.nn.Module):
    """One quantised layer with a bias, and two groups a row in 4 bits."""

    def __init__(self, kind):
        super().__init__()
        bnb = pytest.importorskip("bitsandbytes")
        torch.manual_seed(3)
        if kind == "int8":
            layer = bnb.nn.Linear8bitLt(128, 3, has_fp16_weights=False)
        else:
            layer = bnb.nn.Linear4bit(128, 3, quant_type=kind, compress_statistics=False)
        self.layer = layer.to("cpu")

    def forward(self, x):
        return self.layer(x)


@pytest.mark.parametrize(
    ("kind", "per_step"),
    [
        *(("nf4", None), ("nf4", "rows"), ("int8", "rows")),
        *(
            pytest.param(*case, marks=pytest.mark.slow)
            for case in (("fp4", None), ("fp4", "rows"), ("int8", None))
        ),
    ],
)
def test_estimates_are_unbiased_for_the_gradient_of_the_scales(kind, per_step):
    """Of quadratic losses, a central difference is the exact derivative along a direction."""
    model = Line(kind).train()
    (scales,) = (p for p in split_parameters(model).base.values() if isinstance(p, Scales))
    x, y = torch.randn(5, 128), torch.randn(5, 3)
    groups = scales.shape[1]

    def shares():
        return (model(x) - y).square().sum(1) / 2

    with torch.no_grad():
        errors = model(x) - y  # [rows, out]
        parts = []  # each group's part of the output, per unit of its scale: [rows, out]
        for group in range(groups):
            cut = torch.zeros_like(x)
            place = slice(group * 128 // groups, (group + 1) * 128 // groups)
            cut[:, place] = x[:, place]
            parts.append((model(cut) - model.layer.bias) / scales[:, group])
        exact = torch.stack([(errors * part).sum(0) for part in parts], 1)  # [out, groups]

    options = {"distribution": "rank-one", "directions_per_step": per_step} if per_step else {}
    optimizer = HybridOptimizer(
        param_groups(model, "zo-ft", base_lr={"layer.[wS]*": 1.0}),
        model,
        estimator="central",
        eps=1e-2,
        self_check=False,
        seed=11,
        **options,
    )
    start, found = scales.detach().clone(), []
    for _ in range(400):
        optimizer.step(shares if per_step else lambda: shares().sum())
        found.append((start - scales) / scales.unit)
        scales.data.copy_(start)
    found = torch.stack(found)  # [steps, out, groups]
    error = (found.mean(0) - exact * scales.unit) / (found.std(0) / len(found) ** 0.5)
    assert error.abs().max() < 4.5
    assert found.mean(0).abs().max() > 10 * (found.std(0) / len(found) ** 0.5).min()


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["nf4", "int8"])
@pytest.mark.parametrize("adapter", ["lora", "prefix", "prompt"])
def test_a_real_model(tmp_path, kind, adapter):
    """SmolLM2: a perturbed loss is that of a moved copy; replay and resume give every bit."""
    pytest.importorskip("bitsandbytes")
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(100, 40_000, (2, 16), generator=generator)
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}

    def base():
        model, _ = load_model("smollm2-135m", quantization=kind)
        model.config.use_cache = False
        return model

    def step(optimizer, model):
        return float(optimizer.step(lambda: model(**batch).loss))

    model, copied = (with_adapter(base(), adapter).train() for _ in range(2))
    optimizer, blocks = optimizer_of(model, base_lr=1e-6, seed=5), split_parameters(model)
    codes = {n: p for n, p in blocks.base.items() if is_quantized(p)}
    before = fingerprint(codes)
    for name, parameter in split_parameters(copied).movable.items():
        tensor, change = blocks.base_index[name], (1e-3 * unit_of(parameter),)
        combine(parameter.data, change, seed=5, step=9, tensor=tensor)
    with torch.no_grad():
        expected = copied(**batch).loss
        with optimizer.perturbation.at(1e-3, step=9):
            assert torch.equal(model(**batch).loss, expected)
    del copied
    for _ in range(3):
        step(optimizer, model)
    save_checkpoint(tmp_path, model, optimizer)
    again = load_checkpoint(base(), tmp_path).train()
    assert fingerprint(split_parameters(again).base) == fingerprint(blocks.base)
    resumed = optimizer_of(again, base_lr=1e-6, seed=5)
    resumed.load_state_dict(optimizer.state_dict())
    resumed.trajectory = copy.deepcopy(optimizer.trajectory)
    assert step(resumed, again) == step(optimizer, model)
    assert fingerprint(split_parameters(again).base) == fingerprint(blocks.base)
    assert fingerprint(codes) == before
