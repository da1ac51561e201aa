"""HybridTrainer equals the bare hybrid loop and checks its methods and options."""

from __future__ import annotations

import pytest
import torch
from transformers import HfArgumentParser, Trainer, TrainingArguments

from tests.support.models import assert_same_bits, bits, build
from tests.support.trainers import (
    SEED,
    Recorder,
    Rows,
    arguments,
    history,
    plain_options,
    trainer_for,
)
from zofo.errors import UserError
from zofo.optim.blocks import split_parameters
from zofo.optim.methods import METHODS, param_groups
from zofo.optim.optimizer import HybridOptimizer
from zofo.optim.reshuffle import ReshufflingSampler, epoch_order
from zofo.trainer.mixin import HybridArguments, HybridOptions, HybridTrainer

# Tests of the algorithm.


@pytest.mark.parametrize("estimator", ["forward", "central"])
@pytest.mark.parametrize("accumulation", [1, 2])
@pytest.mark.parametrize("optim", ["sgd", "adamw_torch"])
def test_equals_a_bare_loop(tmp_path, optim, accumulation, estimator):
    recorder, steps = Recorder(), 3
    model = build("llama", "lora", lora_dropout=0.3)
    twin = build("llama", "lora", lora_dropout=0.3)
    trainer = trainer_for(
        tmp_path,
        model,
        callbacks=[recorder],
        optim=optim,
        gradient_accumulation_steps=accumulation,
        max_steps=steps,
        estimator=estimator,
        num_directions=2,
        lr_scheduler_type="constant",
        max_grad_norm=0.05,
    )
    trainer.train()

    optimizer = HybridOptimizer(
        param_groups(twin, "hybrid", base_lr=1e-3, adapter_lr=1e-2),
        twin,
        optimizer={"sgd": "SGD", "adamw_torch": "AdamW"}[optim],
        eps=1e-3,
        estimator=estimator,
        num_directions=2,
        seed=SEED,
        max_grad_norm=0.05,
    )
    rows, order = Rows(), epoch_order(12, seed=SEED, epoch=0, sampling="reshuffle")
    torch.set_rng_state(recorder.generator)
    twin.train()
    batches = [[rows[i] for i in order[j : j + 2]] for j in range(0, 2 * steps * accumulation, 2)]
    batches = [{key: torch.stack([r[key] for r in batch]) for key in batch[0]} for batch in batches]
    losses, scalars = [], []
    for step in range(steps):
        micro = batches[step * accumulation : (step + 1) * accumulation]
        count = sum((batch["labels"][:, 1:] != -100).sum() for batch in micro)
        for batch in micro:
            optimizer.accumulate(lambda b=batch, n=count: twin(**b, num_items_in_batch=n).loss)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(optimizer.last_step.loss)
        scalars.append(sum(optimizer.last_step.projected_grad) / 2)

    assert_same_bits(bits(model), bits(twin))
    assert history(trainer, "loss") == pytest.approx(losses)
    assert history(trainer, "projected_grad") == scalars
    assert trainer._hybrid.trajectory.updates == optimizer.trajectory.updates


@pytest.mark.parametrize("adapter", ["lora", "prompt"])
@pytest.mark.parametrize("accumulation", [1, 2])
@pytest.mark.parametrize("optim", ["sgd", "adamw_torch", "adamw_torch_fused"])
def test_base_lr_zero_is_the_plain_trainer(tmp_path, optim, accumulation, adapter):
    class Plain(Trainer):
        def _get_train_sampler(self, train_dataset=None):
            return ReshufflingSampler(len(self.train_dataset), seed=SEED)

    shared = {
        "optim": optim,
        "gradient_accumulation_steps": accumulation,
        "max_grad_norm": 0.05,
        "weight_decay": 0.1,
        "max_steps": 5,
    }
    model = build("llama", adapter, lora_dropout=0.3)
    twin = build("llama", adapter, lora_dropout=0.3)
    hybrid = trainer_for(tmp_path / "a", model, base_lr=0.0, zo_seed=99, **shared)
    plain = Plain(
        model=twin,
        args=TrainingArguments(**plain_options(tmp_path / "b", **shared)),
        train_dataset=Rows(),
    )
    # Trainer seeds the generators in its constructor.
    torch.manual_seed(SEED)
    hybrid.train()
    torch.manual_seed(SEED)
    plain.train()
    assert_same_bits(bits(model), bits(twin))
    for key in ("loss", "grad_norm", "learning_rate"):
        assert history(hybrid, key) == history(plain, key)


def test_base_lr_zero_does_not_depend_on_the_seed_of_the_directions(tmp_path):
    models = [build("llama", "lora") for _ in range(2)]
    for model, zo_seed in zip(models, (1, 2), strict=True):
        trainer_for(tmp_path, model, base_lr=0.0, zo_seed=zo_seed).train()
    assert_same_bits(bits(models[0]), bits(models[1]))


def with_label_smoothing(folder, model, **changes):
    return trainer_for(folder, model, label_smoothing_factor=0.1, **changes)


def with_a_loss_function(folder, model, **changes):
    def loss_function(outputs, labels, num_items_in_batch=None):
        flat = torch.nn.functional.cross_entropy(
            outputs.logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), reduction="sum"
        )
        return flat / num_items_in_batch

    return HybridTrainer(
        model=model,
        args=arguments(folder, **changes),
        train_dataset=Rows(),
        compute_loss_func=loss_function,
    )


def without_loss_arguments(folder, model, **changes):
    trainer = trainer_for(folder, model, **changes)
    # This is the value for models whose forward takes no **kwargs.
    trainer.model_accepts_loss_kwargs = False
    return trainer


@pytest.mark.parametrize("accumulation", [1, 2])
@pytest.mark.parametrize(
    "make", [trainer_for, with_label_smoothing, with_a_loss_function, without_loss_arguments]
)
def test_the_loss_difference_is_scaled_as_the_loss(tmp_path, make, accumulation):
    """Both losses of a difference are divided by the accumulation steps.

    If only one of them were, |s| would be about 2000.
    """
    changes = {"gradient_accumulation_steps": accumulation, "self_check": False}
    trainer = make(tmp_path, build("llama", "lora"), max_steps=2, **changes)
    trainer.train()
    assert all(0 < abs(scalar) < 10 for scalar in history(trainer, "projected_grad"))


def test_a_loss_that_is_not_repeatable_is_refused(tmp_path):
    class Counting(HybridTrainer):
        calls = 0

        def compute_loss(self, *args, **kwargs):
            self.calls += 1
            return super().compute_loss(*args, **kwargs) * self.calls

    with pytest.raises(UserError, match="computed again"):
        trainer_for(tmp_path, cls=Counting).train()


# Tests of the methods and options.


@pytest.mark.parametrize("method", METHODS)
def test_each_method_moves_its_blocks_and_lowers_the_loss(tmp_path, method):
    orders = METHODS[method]
    model = build("llama", "lora" if orders.needs_adapter else None)
    before, blocks = bits(model), split_parameters(model)
    names = {id(p): n for n, p in model.named_parameters()}
    changes = {"learning_rate": 5e-2, "base_lr": 1e-2}
    if orders.base == "first":
        changes["base_lr"] = 0.5
    if method in ("zo-ft", "zo-peft"):
        changes = {"learning_rate": 5e-3, "base_lr": 1e-3, "estimator": "central"}
    rows = Rows(2)
    trainer = trainer_for(
        tmp_path, model, rows=rows, method=method, max_steps=40, max_grad_norm=0, **changes
    )
    trainer.train()
    losses = history(trainer, "loss")
    assert sum(losses[-5:]) < sum(losses[:5])
    after = bits(model)
    for block, order in (("base", orders.base), ("adapter", orders.adapter)):
        for parameter in getattr(blocks, block).values():
            name = names[id(parameter)]
            assert torch.equal(before[name], after[name]) == (order == "frozen"), name


def test_classification_with_a_trained_head(tmp_path):
    model = build("bert", "lora")
    trainer = HybridTrainer(model=model, args=arguments(tmp_path), train_dataset=Rows(classes=2))
    before = bits(model)
    trainer.train()
    moved = {n for n, p in bits(model).items() if not torch.equal(p, before[n])}
    assert any("modules_to_save" in n for n in moved)
    assert any("embeddings" in n for n in moved)
    assert not any("original_module" in n for n in moved)


def test_rates_by_pattern(tmp_path):
    model = build("llama", "lora")
    before = bits(model)
    trainer_for(tmp_path, model, base_lr={"*layers.1.*": 1e-2}).train()
    moved = {n for n, p in bits(model).items() if not torch.equal(p, before[n])}
    assert any("layers.1." in n and "lora" not in n for n in moved)
    assert not any("layers.0." in n and "lora" not in n for n in moved)


@pytest.mark.parametrize(
    ("adapter", "changes", "match"),
    [
        (None, {"method": "hybrid"}, "the model has none"),
        ("lora", {"method": "zo-ft"}, "the model has one"),
        ("lora", {"method": "hybird"}, "did you mean 'hybrid'"),
    ],
)
def test_a_method_that_does_not_fit_is_refused_before_training(tmp_path, adapter, changes, match):
    with pytest.raises(UserError, match=match):
        trainer_for(tmp_path, build("llama", adapter), **changes)


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"eps": 0.0}, "eps"),
        ({"estimator": "backward"}, "estimator"),
        ({"base_lr": {"*nothing*": 1.0}}, "matches no base parameter"),
        ({"base_lr": -1.0}, "at least 0"),
        ({"base_lr": "fast"}, "must be a number"),
        ({"sampling": "sorted"}, "sampling"),
    ],
)
def test_wrong_values_are_refused_before_the_first_step(tmp_path, changes, match):
    model = build("llama", "lora")
    before = bits(model)
    with pytest.raises(UserError, match=match):
        trainer_for(tmp_path, model, **changes).train()
    assert_same_bits(bits(model), before)


@pytest.mark.parametrize(
    ("method", "changes", "match"),
    [
        ("zo-peft", {"fp16": True}, "fp16"),
    ],
)
def test_arguments_that_would_void_the_estimate_are_refused(tmp_path, method, changes, match):
    with pytest.raises(UserError, match=match):
        trainer_for(tmp_path, method=method, **changes)


def test_a_trainer_that_generates_its_batches_is_refused(tmp_path):
    class Online(HybridTrainer):
        def _generate_and_score_completions(self): ...

    with pytest.raises(UserError, match="generate their batches"):
        trainer_for(tmp_path, cls=Online)


def test_a_quantized_base_is_refused(tmp_path):
    model = build("llama", "lora")
    layer = model.get_base_model().model.layers[0].mlp.up_proj
    layer.weight = torch.nn.Parameter(layer.weight.to(torch.int8), requires_grad=False)
    with pytest.raises(UserError, match=r"layers\.0\.mlp\.up_proj\.weight"):
        trainer_for(tmp_path, model)


def test_an_optimizer_with_modes_is_refused(tmp_path):
    class ScheduleFree(torch.optim.SGD):
        def train(self): ...

        def eval(self): ...

    trainer = HybridTrainer(
        model=build("llama", "lora"),
        args=arguments(tmp_path),
        train_dataset=Rows(),
        optimizer_cls_and_kwargs=(ScheduleFree, {"lr": 0.1}),
    )
    with pytest.raises(UserError, match="plain one"):
        trainer.train()


def test_rates_as_text(tmp_path):
    trainer = trainer_for(tmp_path, base_lr='{"*layers.1.*": 2e-3}', max_steps=1)
    trainer.train()
    assert history(trainer, "base_lr") == [2e-3]


def test_a_foreign_optimizer_is_refused_and_our_own_is_used(tmp_path):
    model = build("llama", "lora")
    shared = {"model": model, "args": arguments(tmp_path), "train_dataset": Rows()}
    with pytest.raises(UserError, match="optimizers holds SGD"):
        HybridTrainer(**shared, optimizers=(torch.optim.SGD(model.parameters()), None))
    own = HybridOptimizer(param_groups(model, "hybrid"), model)
    HybridTrainer(**shared, optimizers=(own, None)).train()
    assert own.step_count == len(own.trajectory) == 4


def test_arguments_without_options_are_refused_and_options_beside_them_are_read(tmp_path):
    plain = TrainingArguments(**plain_options(tmp_path))
    model = build("llama", "lora")
    with pytest.raises(UserError, match="carries no hybrid options"):
        HybridTrainer(model=model, args=plain, train_dataset=Rows())
    trainer = HybridTrainer(
        model=model, args=plain, train_dataset=Rows(), hybrid=HybridOptions(base_lr=2e-3)
    )
    trainer.train()
    assert history(trainer, "base_lr")[0] == 2e-3


def test_the_arguments_work_on_a_command_line(tmp_path):
    parser = HfArgumentParser(HybridArguments)
    line = ["--output_dir", str(tmp_path), "--base_lr", "1e-4", "--eps", "1e-2", "--no_self_check"]
    (parsed,) = parser.parse_args_into_dataclasses(line)
    assert (parsed.base_lr, parsed.eps, parsed.self_check) == (1e-4, 1e-2, False)
    assert parsed.method == "hybrid"
    (parsed,) = parser.parse_dict({"output_dir": str(tmp_path), "base_lr": {"*": 1e-3}})
    assert parsed.base_lr == {"*": 1e-3}
