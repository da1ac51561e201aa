"""A checkpoint is small, and returning to it gives the same bits."""

from __future__ import annotations

import peft
import pytest
import torch
from transformers import TrainerCallback

from tests.support.models import ADAPTERS, assert_same_bits, batch_for, bits, build, loss_of
from tests.support.trainers import (
    Recorder,
    Rows,
    arguments,
    trainer_for,
)
from zofo.errors import UserError
from zofo.optim.blocks import split_parameters
from zofo.optim.trajectory import Trajectory
from zofo.saved.checkpoint import load_checkpoint
from zofo.trainer.base_history import ORIGINAL_BASE_FILE, TRAJECTORY_FILE
from zofo.trainer.mixin import HybridTrainer


@pytest.mark.parametrize("adapter", ADAPTERS)
def test_checkpoints_hold_adapter_and_trajectory_and_no_base(tmp_path, adapter):
    model = build("llama", adapter)
    trainer_for(tmp_path, model, save_strategy="steps", save_steps=2).train()
    folder = tmp_path / "checkpoint-4"
    files = {path.name: path.stat().st_size for path in folder.iterdir()}
    assert {"adapter_model.safetensors", "adapter_config.json", TRAJECTORY_FILE} <= files.keys()
    assert "model.safetensors" not in files
    base_bytes = sum(p.numel() * 4 for p in split_parameters(model).base.values())
    weights = [size for name, size in files.items() if name.endswith((".safetensors", ".bin"))]
    assert max(weights) < base_bytes
    trajectory, header = Trajectory.load(folder / TRAJECTORY_FILE)
    assert len(trajectory) == 4
    assert header["base_fingerprint"]

    fresh = build("llama", adapter)
    trajectory.replay(split_parameters(fresh).base)
    assert_same_bits(dict(split_parameters(fresh).base), dict(split_parameters(model).base))


@pytest.mark.parametrize("adapter", ADAPTERS)
def test_the_best_checkpoint_comes_back_bit_for_bit(tmp_path, adapter):
    class Worsening(HybridTrainer):
        """Makes the second evaluation the best."""

        def evaluate(self, *args, **kwargs):
            assert (tmp_path / ORIGINAL_BASE_FILE).exists()
            metrics = super().evaluate(*args, **kwargs)
            metrics["eval_loss"] = abs(self.state.global_step - 2.0)
            return metrics

    recorder, model = Recorder(), build("llama", adapter)
    trainer = trainer_for(
        tmp_path,
        model,
        cls=Worsening,
        callbacks=[recorder],
        eval_strategy="steps",
        eval_steps=1,
        save_strategy="steps",
        save_steps=1,
        load_best_model_at_end=True,
        save_total_limit=1,
    )
    existed = []
    trainer.add_callback(
        type(
            "Look",
            (TrainerCallback,),
            {
                "on_step_end": lambda *a, **k: existed.append(
                    (tmp_path / ORIGINAL_BASE_FILE).exists()
                )
            },
        )
    )
    trainer.train()
    assert trainer.state.best_model_checkpoint.endswith("checkpoint-2")
    assert_same_bits(bits(model), recorder.weights[2])
    assert not torch.equal(
        torch.cat([p.flatten() for p in recorder.weights[2].values()]),
        torch.cat([p.flatten() for p in recorder.weights[4].values()]),
    )
    assert not (tmp_path / ORIGINAL_BASE_FILE).exists()

    # Saving afterwards saves the best model, and a second run starts from it.
    trainer.save_model(str(tmp_path / "final"))
    assert len(Trajectory.load(tmp_path / "final" / TRAJECTORY_FILE)[0]) == 2
    trainer.train()
    assert_same_bits(bits(model), recorder.weights[2])
    assert len(trainer._hybrid.trajectory) == 4
    assert not (tmp_path / ORIGINAL_BASE_FILE).exists()


def test_the_best_checkpoint_with_the_original_base_from_the_user(tmp_path):
    recorder, model = Recorder(), build("llama", "lora")
    trainer = HybridTrainer(
        model=model,
        args=arguments(
            tmp_path,
            eval_strategy="steps",
            eval_steps=1,
            save_strategy="steps",
            save_steps=1,
            load_best_model_at_end=True,
            greater_is_better=True,
            metric_for_best_model="eval_loss",
        ),
        train_dataset=Rows(),
        eval_dataset=Rows(4, seed=2),
        callbacks=[recorder],
        original_base=lambda: split_parameters(build("llama", "lora")).base,
    )
    trainer.train()
    assert_same_bits(bits(model), recorder.weights[trainer.state.best_global_step])
    assert not (tmp_path / ORIGINAL_BASE_FILE).exists()


@pytest.mark.parametrize("adapter", ADAPTERS)
def test_a_checkpoint_loads_as_the_trained_model_and_not_silently_as_another(tmp_path, adapter):
    model = build("llama", adapter)
    trainer = trainer_for(tmp_path, model)
    trainer.train()
    trainer.save_model(str(tmp_path / "final"))
    loaded = load_checkpoint(build("llama", None), tmp_path / "final")
    assert_same_bits(dict(split_parameters(loaded).base), dict(split_parameters(model).base))
    with torch.no_grad():
        batch = batch_for("llama")
        assert torch.equal(loss_of(loaded, batch), loss_of(model.eval(), batch))

    with pytest.raises(UserError, match="load the base that the run began with"):
        load_checkpoint(build("llama", None, seed=7), tmp_path / "final")
    with pytest.warns(UserWarning, match="zofo_load_with"):
        peft.PeftModel.from_pretrained(build("llama", None), str(tmp_path / "final"))


def test_an_adapter_of_another_name_comes_back(tmp_path):
    def model():
        with torch.random.fork_rng():
            torch.manual_seed(0)
            config = peft.LoraConfig(
                task_type="CAUSAL_LM", target_modules=["q_proj"], init_lora_weights=False
            )
            return peft.get_peft_model(build("llama", None), config, adapter_name="mine")

    whole, rest = model(), model()
    trainer_for(tmp_path, whole, save_strategy="steps", save_steps=2).train()
    trainer = trainer_for(tmp_path, rest)
    trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert_same_bits(bits(rest), bits(whole))


class KilledError(Exception):
    pass


class Kill(TrainerCallback):
    def __init__(self, step):
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            raise KilledError


@pytest.mark.parametrize(
    ("adapter", "method", "killed_at"),
    [
        ("lora", "hybrid", 3),
        ("lora", "hybrid", 4),
        ("lora", "hybrid", 5),
        ("prompt", "hybrid", 4),
        ("prompt", "hybrid", 5),
        ("prefix", "hybrid", 5),
        ("lora", "zo-peft", 5),
        ("prompt", "fo-peft", 5),
    ],
)
def test_interrupted_equals_uninterrupted(tmp_path, adapter, method, killed_at):
    """A resumed run equals an uninterrupted one, bit for bit.

    The 12 rows in batches of 2 × 2 make 3 steps per epoch. The kill comes within an epoch, at its
    end, or after it.
    """
    changes = {
        "method": method,
        "gradient_accumulation_steps": 2,
        "max_steps": 8,
        "save_strategy": "steps",
        "save_steps": 1,
        "optim": "adamw_torch",
        "eval_strategy": "steps",
        "eval_steps": 1,
        "load_best_model_at_end": True,
    }
    recorders = Recorder(), Recorder()
    whole, whole_rows = build("llama", adapter, lora_dropout=0.3), Rows()
    uninterrupted = trainer_for(
        tmp_path / "a", whole, rows=whole_rows, callbacks=[recorders[0]], **changes
    )
    uninterrupted.train()

    first = build("llama", adapter, lora_dropout=0.3)
    with pytest.raises(KilledError):
        trainer_for(tmp_path / "b", first, callbacks=[Kill(killed_at)], **changes).train()
    torch.manual_seed(1234)
    rest, rest_rows = build("llama", adapter, lora_dropout=0.3), Rows()
    resumed = trainer_for(tmp_path / "b", rest, rows=rest_rows, callbacks=[recorders[1]], **changes)
    resumed.train(resume_from_checkpoint=True)

    assert min(recorders[1].weights) == killed_at
    for step in range(killed_at, 9):
        assert_same_bits(recorders[1].weights[step], recorders[0].weights[step])
    assert_same_bits(bits(rest), bits(whole))  # These are the bits of the best checkpoint.
    drop = ("runtime", "per_second", "memory")
    logs = [
        [
            {k: v for k, v in row.items() if not any(d in k for d in drop)}
            for row in t.state.log_history
        ]
        for t in (uninterrupted, resumed)
    ]
    assert logs[0] == logs[1]
    assert resumed._hybrid.trajectory == uninterrupted._hybrid.trajectory
    assert whole_rows.seen[-len(rest_rows.seen) :] == rest_rows.seen
    assert not (tmp_path / "b" / ORIGINAL_BASE_FILE).exists()


@pytest.mark.parametrize("method", ["zo-ft", "fo-ft"])
def test_full_fine_tuning_resumes_from_its_weights(tmp_path, method):
    changes = {"method": method, "save_strategy": "steps", "save_steps": 1, "max_steps": 6}
    whole = build("llama", None)
    uninterrupted = trainer_for(tmp_path / "a", whole, **changes)
    uninterrupted.train()
    with pytest.raises(KilledError):
        trainer_for(tmp_path / "b", build("llama", None), callbacks=[Kill(4)], **changes).train()
    rest = build("llama", None)
    resumed = trainer_for(tmp_path / "b", rest, **changes)
    resumed.train(resume_from_checkpoint=True)
    assert_same_bits(bits(rest), bits(whole))
    assert resumed._hybrid.trajectory == uninterrupted._hybrid.trajectory
    if method == "zo-ft":
        assert resumed._history.fingerprint == uninterrupted._history.fingerprint


@pytest.mark.parametrize("method", ["zo-ft", "fo-ft"])
def test_full_fine_tuning_goes_back_to_the_best(tmp_path, method):
    recorder, model = Recorder(), build("llama", None)
    trainer = trainer_for(
        tmp_path,
        model,
        callbacks=[recorder],
        method=method,
        eval_strategy="steps",
        eval_steps=1,
        save_strategy="steps",
        save_steps=1,
        load_best_model_at_end=True,
        greater_is_better=True,
        metric_for_best_model="eval_loss",
    )
    trainer.train()
    best = trainer.state.best_global_step
    assert_same_bits(bits(model), recorder.weights[best])
    if method == "zo-ft":
        assert len(trainer._hybrid.trajectory) == best


def test_a_reparametrised_prefix_resumes(tmp_path):
    def model():
        with torch.random.fork_rng():
            torch.manual_seed(0)
            config = peft.PrefixTuningConfig(
                task_type="CAUSAL_LM",
                num_virtual_tokens=3,
                prefix_projection=True,
                encoder_hidden_size=8,
            )
            return peft.get_peft_model(build("llama", None), config)

    changes = {"save_strategy": "steps", "save_steps": 2}
    whole, rest = model(), model()
    trainer_for(tmp_path / "a", whole, **changes).train()
    with pytest.raises(KilledError):
        trainer_for(tmp_path / "b", model(), callbacks=[Kill(3)], **changes).train()
    trainer_for(tmp_path / "b", rest, **changes).train(resume_from_checkpoint=True)
    assert_same_bits(bits(rest), bits(whole))


def test_a_checkpoint_of_weights_only_continues_with_fresh_directions(tmp_path):
    trainer_for(tmp_path, save_strategy="steps", save_steps=2, save_only_model=True).train()
    trainer = trainer_for(tmp_path, max_steps=6)
    trainer.train(resume_from_checkpoint=True)
    assert [row[0].step for row in trainer._hybrid.trajectory.updates] == list(range(6))


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"zo_seed": 8}, "another seed"),
        ({"distribution": "gaussian"}, "another distribution"),
        ({"base_lr": {"*layers.0.*": 1e-3}}, "another groups"),
    ],
)
def test_resuming_with_other_directions_is_refused(tmp_path, change, match):
    trainer_for(tmp_path, save_strategy="steps", save_steps=2).train()
    with pytest.raises(UserError, match=match):
        trainer_for(tmp_path, max_steps=6, **change).train(resume_from_checkpoint=True)


def test_resuming_on_another_base_is_refused(tmp_path):
    trainer_for(tmp_path, save_strategy="steps", save_steps=2).train()
    other = build("llama", "lora", seed=7)
    with pytest.raises(UserError, match="load the base that the run began with"):
        trainer_for(tmp_path, other, max_steps=6).train(resume_from_checkpoint=True)


def test_resuming_in_the_same_process(tmp_path):
    """Resuming in the same process needs a copy of the original base, because the base has moved.

    Without such a copy, resuming is refused.
    """
    changes = {"save_strategy": "steps", "save_steps": 2, "max_steps": 6}
    best = {"load_best_model_at_end": True, "eval_strategy": "steps", "eval_steps": 2}
    whole = build("llama", "lora")
    trainer_for(tmp_path / "a", whole, **changes, **best).train()

    for folder, more in (("b", best), ("c", {})):
        model, kill = build("llama", "lora"), Kill(3)
        trainer = trainer_for(tmp_path / folder, model, callbacks=[kill], **changes, **more)
        with pytest.raises(KilledError):
            trainer.train()
        kill.step = None
        if more:
            trainer.train(resume_from_checkpoint=True)
            assert_same_bits(bits(model), bits(whole))
        else:
            with pytest.raises(UserError, match="has moved since the checkpoint"):
                trainer.train(resume_from_checkpoint=True)
