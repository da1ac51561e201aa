"""Preference pairs in Trainer's loop and in one's own: the estimate, resuming, and refusals."""

from __future__ import annotations

import copy
import math
from dataclasses import replace

import pytest
import torch
from transformers import TrainerCallback

from tests.support.models import assert_same_bits, bits, enliven
from tests.support.trainers import arguments, history, untimed_logs
from tests.trainer.test_rewards import Examples
from zofo.disk.files import read_tensors, write_tensors
from zofo.errors import UserError
from zofo.models.adapters import create_adapter
from zofo.models.loading import load_model
from zofo.optim.blocks import split_parameters
from zofo.optim.methods import param_groups
from zofo.optim.optimizer import HybridOptimizer
from zofo.tasks.preference import PreferenceOptions
from zofo.trainer.mixin import HybridTrainer
from zofo.trainer.pairs import PairSource

ROWS = [
    {"prompt": prompt, "chosen": chosen, "rejected": rejected}
    for prompt, chosen, rejected in (
        ("the film is", " great and fine", " a mess"),
        ("What is it?", " good", " a dull, lifeless thing"),
        ("It was", " an actor", " badly acted and dull"),
        ("great", " film", " bad"),
        ("a dull", " and badly acted mess", " actor"),
    )
]
OPTIONS = PreferenceOptions(beta=0.5, batch_size=2)
BY_ROWS = {"distribution": "rank-one", "directions_per_step": "rows"}


@pytest.fixture(scope="module")
def loaded(decoder_folder):
    """A lively model with an adapter, and its tokenizer."""
    model, tokenizer = load_model(decoder_folder)
    enliven(model)
    return create_adapter(model, "lora", tokenizer=tokenizer), tokenizer


def model_of(loaded, method="hybrid"):
    model = copy.deepcopy(loaded[0])
    return model.unload() if method == "zo-ft" else model


def trainer_of(folder, loaded, method="hybrid", *, pairs=ROWS, reward=None, **changes):
    options = {"eps": 1e-2, "base_lr": 1e-3, "self_check": True, "max_steps": 4}
    options |= BY_ROWS | changes
    return HybridTrainer(
        model=model_of(loaded, method),
        args=arguments(folder, method=method, **options),
        train_dataset=None if method == "zo-ft" else Examples(loaded[1]),
        processing_class=loaded[1],
        preference_dataset=pairs,
        preference=OPTIONS,
        reward_funcs=reward,
        reward_dataset=ROWS,
    )


@pytest.mark.parametrize(
    "options",
    [BY_ROWS, {"distribution": "rank-one"}, {"distribution": "gaussian", "num_directions": 2}],
)
def test_the_scalars_are_the_slopes_of_the_losses(loaded, options):
    """In float64, against the gradient by autograd and directions from the recorded update."""
    model = model_of(loaded, "zo-ft").double()
    source = PairSource(ROWS, loaded[1], OPTIONS, seed=1)
    source.measure_reference(model)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.02)  # away from the reference, so that the pairs' slopes differ
    twin = copy.deepcopy(model).requires_grad_(True)
    base = dict(twin.named_parameters(remove_duplicate=False))
    shares = source.loss(twin, 0).closure()
    optimizer = HybridOptimizer(
        param_groups(model, "zo-ft", base_lr=1e-9),
        model,
        estimator="central",
        eps=3e-4,
        seed=3,
        **options,
    )
    optimizer.step(zeroth_loss=lambda: source.loss(model, 0))
    (update,), group = optimizer.trajectory.updates[0], optimizer.trajectory.groups[0]
    weights = [base[name] for name in group.names]
    rows = [torch.autograd.grad(share, weights, retain_graph=True) for share in shares]
    num = len(update.projected_grad)
    assert num == {"rows": 2}.get(
        optimizer.options.directions_per_step, optimizer.options.num_directions
    )
    for k, found in enumerate(update.projected_grad):
        only = replace(update, projected_grad=tuple(float(i == k) for i in range(num)), lr=-1.0)
        v = [torch.zeros_like(weight) for weight in weights]
        only.apply(
            [t.detach() for t in v],
            group.tensors,
            seed=3,
            distribution=optimizer.options.distribution,
            rank_one=optimizer.rank_one,
        )
        factor = num if optimizer.options.num_directions > 1 else 1  # the update takes the mean
        gradients = [rows[k]] if optimizer.options.directions_per_step == "rows" else rows
        slope = sum(
            float((g * t).sum()) * factor for row in gradients for g, t in zip(row, v, strict=True)
        )
        assert found == pytest.approx(slope, rel=5e-3, abs=2e-3)  # the model has float32 parts
        assert abs(slope) > 0.02


@pytest.mark.parametrize("method", ["hybrid", "zo-ft"])
def test_the_trainer_equals_a_loop_and_is_replayed(tmp_path, loaded, method):
    options = {"estimator": "central", "gradient_accumulation_steps": 2}
    rows = ROWS[:4]  # so that no epoch of pairs ends within a step
    trainer = trainer_of(tmp_path, loaded, method, pairs=rows, **options, max_steps=2)
    trainer.train()
    base, original = (
        split_parameters(model).base for model in (trainer.model, model_of(loaded, method))
    )
    assert any(not torch.equal(base[name], original[name]) for name in base)
    trainer.trajectory.replay(original)
    assert_same_bits(dict(base), dict(original))
    losses = history(trainer, "preference_loss")
    assert losses[0] == pytest.approx(math.log(2), abs=1e-4)
    assert set(history(trainer, "preference_ranked_right")) <= {0.0, 0.5, 1.0}
    if method == "hybrid":
        return
    assert history(trainer, "loss")[0] == pytest.approx(math.log(2), abs=1e-3)
    # The unperturbed losses and both sides of a central difference, of each micro-batch.
    assert trainer.forward_equivalents == 2 * 2 * 3
    model = model_of(loaded, method)
    source = PairSource(rows, loaded[1], OPTIONS, seed=trainer.args.seed)
    source.measure_reference(model, num_batches=4)
    groups = param_groups(model, "zo-ft", base_lr=1e-3)
    seed = trainer.args.seed
    optimizer = HybridOptimizer(groups, model, eps=1e-2, seed=seed, estimator="central", **BY_ROWS)
    for step in range(2):
        groups[0]["lr"] = optimizer.param_groups[0]["lr"] = 1e-3 * (1 - step / 2)  # linear decay
        for i in range(2):
            loss = source.loss(model, 2 * step + i, weight=1 / 2)
            optimizer.measure(None, None, zeroth_loss=loss)
        optimizer.step()
    assert_same_bits(bits(trainer.model), bits(model))


def test_the_mean_margin_of_the_pairs_rises(tmp_path, loaded):
    model = model_of(loaded, "zo-ft")
    source = PairSource(ROWS, loaded[1], replace(OPTIONS, batch_size=5))
    source.measure_reference(model)
    optimizer = HybridOptimizer(
        param_groups(model, "zo-ft", base_lr=3e-5), model, eps=1e-3, seed=0, **BY_ROWS
    )
    for step in range(20):
        optimizer.step(zeroth_loss=lambda i=step: source.loss(model, i))
    figures = source.compare(model).figures()
    assert figures["preference_margin"] > 0.1
    assert figures["preference_loss"] < math.log(2)


def test_a_rate_of_zero_leaves_exactly_fo_peft(tmp_path, loaded):
    hybrid = trainer_of(tmp_path / "a", loaded, base_lr=0.0)
    plain = HybridTrainer(
        model=model_of(loaded),
        args=arguments(tmp_path / "b", method="fo-peft", max_steps=4),
        train_dataset=Examples(loaded[1]),
        processing_class=loaded[1],
    )
    hybrid.train()
    plain.train()
    assert_same_bits(bits(hybrid.model), bits(plain.model))
    assert history(hybrid, "loss") == history(plain, "loss")


class StopAfter(TrainerCallback):
    """Interrupts the run at the end of a step."""

    def __init__(self, step):
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            raise KeyboardInterrupt


def test_an_interrupted_run_continues_bit_for_bit_with_its_reference(tmp_path, loaded):
    options = {"save_strategy": "steps", "save_steps": 2}
    whole = trainer_of(tmp_path / "whole", loaded, **options)
    whole.train()
    broken = trainer_of(tmp_path / "broken", loaded, **options)
    broken.add_callback(StopAfter(3))
    with pytest.raises(KeyboardInterrupt):
        broken.train()
    resumed = trainer_of(tmp_path / "broken", loaded, **options)
    resumed.train(resume_from_checkpoint=True)
    assert_same_bits(bits(whole.model), bits(resumed.model))
    assert untimed_logs(whole) == untimed_logs(resumed)
    assert torch.equal(whole._pairs.reference, resumed._pairs.reference)
    other = trainer_of(tmp_path / "broken", loaded, pairs=ROWS[1:], **options)
    with pytest.raises(UserError, match="belongs to other preference pairs"):
        other.train(resume_from_checkpoint=str(tmp_path / "broken" / "checkpoint-2"))
    path = tmp_path / "broken" / "checkpoint-2" / "preference_reference.safetensors"
    tensors, about = read_tensors(path)
    write_tensors(path, {"reference": tensors["reference"].float()}, about)
    with pytest.raises(UserError, match="is damaged"):
        resumed._pairs.load_reference(path)


def test_only_the_pairs_of_the_run_are_measured(tmp_path, loaded):
    trainer = trainer_of(tmp_path, loaded, max_steps=1)
    trainer.train()
    assert int((~trainer._pairs.reference.isnan()).all(1).sum()) == 2
    with pytest.raises(UserError, match="was not measured"):
        trainer._pairs.loss(trainer.model, 1)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"method": "fo-peft"}, "no zeroth-order block"),
        ({"base_batch_fraction": 0.5}, "base_batch_fraction"),
        ({"reward": "json"}, "keep one"),
        ({"pairs": []}, "no preference pairs"),
        ({"pairs": [{"prompt": "a"}]}, "no column 'chosen', 'rejected'"),
    ],
)
def test_what_does_not_fit_is_refused(tmp_path, loaded, changes, words):
    with pytest.raises(UserError, match=words):
        trainer_of(tmp_path, loaded, **changes)
    with pytest.raises(UserError, match="beta"):
        PairSource(ROWS, loaded[1], PreferenceOptions(beta=0.0))
