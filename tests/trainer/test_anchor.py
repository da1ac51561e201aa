"""An anchor in Trainer's loop: resume, replay and best step bit for bit, with w_0 on the disk."""

from __future__ import annotations

import pytest
from transformers import TrainerCallback

from tests.support.models import assert_same_bits, bits, build
from tests.support.trainers import trainer_for, untimed_logs
from zofo.errors import UserError
from zofo.optim.blocks import split_parameters
from zofo.saved.checkpoint import load_checkpoint

SAVING = {"save_strategy": "steps", "save_steps": 2, "base_lr": 1e-2, "base_anchor": 20.0}


def model_of(method):
    return build("llama", "lora" if method == "hybrid" else None)


def anchored(folder, method="hybrid", **changes):
    return trainer_for(folder, model_of(method), method=method, **{**SAVING, **changes})


@pytest.mark.parametrize("method", ["hybrid", "zo-ft"])
@pytest.mark.parametrize("has_source", [False, True])
def test_an_anchored_run_is_continued_and_replayed_bit_for_bit(tmp_path, method, has_source):
    whole = anchored(tmp_path / "whole", method)
    whole.train()
    assert whole.trajectory.has_anchor
    fresh = split_parameters(model_of(method)).base
    whole.trajectory.replay(fresh)
    assert_same_bits(dict(fresh), dict(split_parameters(whole.model).base))
    free = trainer_for(tmp_path / "free", model_of(method), method=method, base_lr=1e-2)
    free.train()
    assert any(
        not (p == q).all()
        for p, q in zip(free.model.parameters(), whole.model.parameters(), strict=True)
    )

    folder = tmp_path / "broken"
    snapshots = {"snapshot_every": 1} if method == "hybrid" and not has_source else {}
    with pytest.raises(KeyboardInterrupt):
        anchored(folder, method, callbacks=[_StopAt(3)], **snapshots).train()
    resumed = anchored(folder, method, **snapshots)
    if has_source:
        original = dict(split_parameters(model_of(method)).base)
        resumed._original_base = lambda: original
    resumed.train(resume_from_checkpoint=True)
    assert_same_bits(bits(whole.model), bits(resumed.model))
    assert whole.trajectory == resumed.trajectory
    assert untimed_logs(whole) == untimed_logs(resumed)
    names = [path.name for path in folder.iterdir() if not path.name.startswith("checkpoint-")]
    assert names == []
    if method == "hybrid":
        loaded = load_checkpoint(build("llama", None), folder / "checkpoint-4")
        assert_same_bits(
            dict(split_parameters(loaded).base), dict(split_parameters(whole.model).base)
        )


def test_the_best_step_of_an_anchored_run_comes_back(tmp_path):
    best = {"eval_strategy": "steps", "eval_steps": 2, "load_best_model_at_end": True}
    trainer = anchored(tmp_path, "hybrid", **best, metric_for_best_model="eval_runtime")
    trainer.train()
    fresh = split_parameters(model_of("hybrid")).base
    trainer.trajectory.replay(fresh)
    assert_same_bits(dict(fresh), dict(split_parameters(trainer.model).base))


def test_a_resume_on_another_base_is_refused(tmp_path):
    anchored(tmp_path, "zo-ft").train()
    other = trainer_for(tmp_path, build("llama", None, seed=5), method="zo-ft", **SAVING)
    with pytest.raises(UserError, match="fingerprint"):
        other.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"base_anchor": -1.0}, "at least 0"),
        ({"base_anchor": 200.0}, "at most 100"),
        ({"base_anchor": 200.0, "base_lr": {"*layers*": 1e-2}}, "at most 100"),
    ],
)
def test_a_trainer_refuses_what_an_anchor_cannot_do(tmp_path, changes, words):
    with pytest.raises(UserError, match=words):
        anchored(tmp_path, **changes)


def test_fo_peft_ignores_an_anchor(tmp_path):
    trainer = trainer_for(tmp_path, model_of("hybrid"), method="fo-peft", base_anchor=1.0)
    trainer.train()
    assert trainer.trajectory is None


class _StopAt(TrainerCallback):
    def __init__(self, step):
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            raise KeyboardInterrupt
