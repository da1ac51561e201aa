"""HybridTrainer keeps the promises of Trainer."""

from __future__ import annotations

import math
import warnings

import pytest
import torch
from transformers import TrainerCallback

from tests.support.models import assert_same_bits, bits, build
from tests.support.trainers import (
    SEED,
    Rows,
    arguments,
    history,
    trainer_for,
)
from zofo.optim.blocks import split_parameters
from zofo.optim.reshuffle import epoch_order
from zofo.trainer.mixin import HybridTrainer


@pytest.mark.parametrize(
    ("changes", "steps"),
    [
        ({"max_steps": 5}, 5),
        ({"max_steps": -1, "num_train_epochs": 2}, 12),
        ({"max_steps": -1, "num_train_epochs": 1, "gradient_accumulation_steps": 4}, 2),
    ],
)
def test_steps_and_epochs(tmp_path, changes, steps):
    trainer = trainer_for(tmp_path, **changes)
    trainer.train()
    assert trainer.state.global_step == steps == len(trainer._hybrid.trajectory)


def test_every_epoch_is_a_permutation(tmp_path):
    rows = Rows()
    trainer = trainer_for(tmp_path, rows=rows, max_steps=-1, num_train_epochs=3)
    trainer.train()
    epochs = [rows.seen[i : i + 12] for i in range(0, 36, 12)]
    for epoch, seen in enumerate(epochs):
        assert seen == epoch_order(12, seed=SEED, epoch=epoch, sampling="reshuffle").tolist()


def test_a_sampling_strategy_of_trainer_is_kept(tmp_path):
    rows = Rows()
    trainer_for(tmp_path, rows=rows, max_steps=6, train_sampling_strategy="sequential").train()
    assert rows.seen == list(range(12))


def test_logs(tmp_path):
    trainer = trainer_for(tmp_path, lr_scheduler_type="linear", eval_strategy="steps", eval_steps=2)
    trainer.train()
    rows = [row for row in trainer.state.log_history if "loss" in row]
    assert len(rows) == 4
    for row in rows:
        numbers = [
            row[key] for key in ("loss", "projected_grad", "base_lr", "learning_rate", "grad_norm")
        ]
        assert all(map(math.isfinite, numbers))
    # Both learning rates are those of the step that the row reports.
    assert [row["learning_rate"] for row in rows] == pytest.approx([1e-2, 7.5e-3, 5e-3, 2.5e-3])
    assert [row["base_lr"] for row in rows] == pytest.approx([1e-3, 7.5e-4, 5e-4, 2.5e-4])
    updates = trainer._hybrid.trajectory.updates
    assert [row["base_lr"] for row in rows] == [row[0].lr for row in updates]
    assert [row["projected_grad"] for row in rows] == [row[0].projected_grad[0] for row in updates]
    assert not any("projected_grad" in row for row in trainer.state.log_history if row not in rows)


def test_tensorboard(tmp_path, monkeypatch):
    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "board"))
    trainer = trainer_for(tmp_path, report_to=["tensorboard"])
    trainer.train()
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    accumulator = EventAccumulator(str(tmp_path / "board")).Reload()
    for key in ("loss", "projected_grad", "base_lr", "learning_rate", "grad_norm"):
        events = accumulator.Scalars(f"train/{key}")
        assert [event.step for event in events] == [1, 2, 3, 4]
        assert [event.value for event in events] == pytest.approx(history(trainer, key))


def test_callbacks_run_and_can_stop(tmp_path):
    class Stop(TrainerCallback):
        calls = 0

        def on_step_end(self, args, state, control, **kwargs):
            self.calls += 1
            control.should_training_stop = state.global_step == 2

    stop = Stop()
    trainer = trainer_for(tmp_path, callbacks=[stop])
    trainer.train()
    assert stop.calls == trainer.state.global_step == len(trainer._hybrid.trajectory) == 2


def test_gradient_checkpointing_gives_the_same_bits(tmp_path):
    models = [build("llama", "lora", lora_dropout=0.3) for _ in range(2)]
    for model, checkpointing in zip(models, (False, True), strict=True):
        trainer_for(tmp_path, model, gradient_checkpointing=checkpointing).train()
        assert model.get_base_model().model.gradient_checkpointing == checkpointing
    assert_same_bits(bits(models[0]), bits(models[1]))


def test_worker_processes_give_the_same_bits(tmp_path):
    models = [build("llama", "lora") for _ in range(2)]
    for model, workers in zip(models, (0, 2), strict=True):
        changes = {"dataloader_num_workers": workers, "max_steps": -1, "num_train_epochs": 2}
        trainer_for(tmp_path, model, **changes).train()
    assert_same_bits(bits(models[0]), bits(models[1]))


def test_bf16_autocast(tmp_path):
    model = build("llama", "lora")
    trainer = trainer_for(tmp_path, model, bf16=True, eps=1e-2)
    trainer.train()
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert all(map(math.isfinite, history(trainer, "projected_grad")))


def test_a_model_in_bfloat16(tmp_path):
    model = build("llama", "lora", dtype=torch.bfloat16)
    before = {n: p.clone() for n, p in split_parameters(model).base.items()}
    trainer_for(tmp_path, model, eps=1e-2).train()
    after = split_parameters(model).base
    assert {p.dtype for p in after.values()} == {torch.bfloat16}
    assert any(not torch.equal(before[n], after[n]) for n in before)


def test_a_model_made_by_model_init_is_trained_anew(tmp_path):
    made = []

    def model_init():
        made.append(build("llama", "lora"))
        return made[-1]

    trainer = HybridTrainer(model_init=model_init, args=arguments(tmp_path), train_dataset=Rows())
    trainer.train()
    first = bits(trainer.model)
    trainer.train()
    assert trainer.model is made[-1]
    assert_same_bits(bits(trainer.model), first)
    assert len(trainer._hybrid.trajectory) == 4


def test_a_step_that_was_skipped_leaves_nothing_to_the_next(tmp_path):
    """A skipped step leaves no measurement to the next step.

    A gradient scaler skips a step on overflow.
    """
    model, twin = build("llama", "lora"), build("llama", "lora")

    class Skip(TrainerCallback):
        def on_pre_optimizer_step(self, args, state, control, optimizer=None, **kwargs):
            if state.global_step == 0:
                optimizer.step = lambda *a, **k: None
            else:
                vars(optimizer).pop("step", None)

    trainer = trainer_for(tmp_path, model, callbacks=[Skip()], max_steps=2, learning_rate=0.0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # torch warns that the scheduler steps first.
        trainer.train()
    rows = Rows()
    order = epoch_order(12, seed=SEED, epoch=0, sampling="reshuffle")[2:4]
    other = trainer_for(tmp_path, twin, rows=torch.utils.data.Subset(rows, order), max_steps=1)
    other.train()
    assert history(trainer, "projected_grad")[-1] == history(other, "projected_grad")[0]
