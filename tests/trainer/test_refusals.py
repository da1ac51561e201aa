"""What a trainer refuses when it is made or resumed, with one error and before any step."""

from __future__ import annotations

import os
import shutil

import pytest
import torch
from transformers import Seq2SeqTrainer, Trainer

from tests.support.damage import NEVER, refused
from tests.support.models import assert_same_bits, bits, build
from tests.support.trainers import Rows, trainer_for
from zofo.errors import UserError
from zofo.trainer.mixin import HybridMixin, HybridTrainer

# The order of the bases.


@pytest.mark.parametrize("trainer", [Trainer, Seq2SeqTrainer])
def test_the_mixin_after_the_trainer_is_refused(trainer):
    with pytest.raises(UserError, match=rf"write class T\(HybridMixin, {trainer.__name__}\)"):
        type("T", (trainer, HybridMixin), {})


def test_the_mixin_before_the_trainer_is_not():
    own = type("Own", (HybridMixin,), {})
    assert issubclass(type("T", (own, Seq2SeqTrainer), {}), Trainer)
    assert issubclass(type("U", (HybridTrainer, Seq2SeqTrainer), {}), HybridMixin)


# Checkpoints of another run.

STEP = {"max_steps": 1, "save_strategy": "steps", "save_steps": 1}


@pytest.fixture(scope="module", params=["hybrid", "fo-peft", "zo-peft"])
def run(request, tmp_path_factory):
    """A method, and its checkpoint after one step."""
    folder = tmp_path_factory.mktemp("run")
    trainer_for(folder, method=request.param, **STEP).train()
    return request.param, str(folder / "checkpoint-1")


def resumed(tmp_path, run, model=None, **changes):
    trainer = trainer_for(tmp_path, model, method=run[0], max_steps=2, **changes)
    before = bits(trainer.model)
    with pytest.raises(UserError) as caught:
        trainer.train(resume_from_checkpoint=run[1])
    return str(caught.value), before, bits(trainer.model)


def test_another_base_is_refused(tmp_path, run):
    said, _, _ = resumed(tmp_path, run, build("llama", "lora", seed=7))
    assert "load the base that the run began with" in said


@pytest.mark.parametrize(
    ("change", "words"), [({"eps": 1e-2}, "eps"), ({"estimator": "central"}, "estimator")]
)
def test_another_estimate_is_refused(tmp_path, run, change, words):
    if run[0] == "fo-peft":
        pytest.skip("it has no estimate")
    said, _, _ = resumed(tmp_path, run, **change)
    assert words in said


# Hostile and damaged files of Trainer's own.


class Evil:
    """Runs a command when it is unpickled."""

    def __reduce__(self):
        return os.system, (f"touch {NEVER}",)


def hostile(path):
    torch.save(Evil(), path)


def hidden(path):
    torch.save({"state": {}, "param_groups": [Evil()]}, path)


def cut(path):
    path.write_bytes(path.read_bytes()[:-100])


def empty(path):
    path.write_bytes(b"")


@pytest.fixture(scope="module")
def whole_run(tmp_path_factory):
    """A trainer of a model without adapter after one step, and its checkpoint."""
    folder = tmp_path_factory.mktemp("whole")
    trainer = trainer_for(folder, build("bert", None), rows=Rows(classes=2), method="fo-ft", **STEP)
    trainer.train()
    return trainer, folder / "checkpoint-1"


FILES = ("optimizer.pt", "scheduler.pt", "rng_state.pth", "pytorch_model.bin")


@pytest.mark.parametrize("damage", [hostile, hidden, cut, empty])
@pytest.mark.parametrize("name", FILES)
def test_a_file_that_runs_code_is_refused_by_name(tmp_path, monkeypatch, whole_run, name, damage):
    monkeypatch.chdir(tmp_path)
    trainer, checkpoint = whole_run
    folder = shutil.copytree(checkpoint, tmp_path / "checkpoint-1")
    if name == "pytorch_model.bin":
        (folder / "model.safetensors").unlink()
        torch.save(trainer.model.state_dict(), folder / name)
    damage(folder / name)
    read = {
        "rng_state.pth": trainer._load_rng_state,
        "pytorch_model.bin": trainer._load_from_checkpoint,
    }.get(name, trainer._load_optimizer_and_scheduler)
    refused(lambda: read(str(folder)), str(folder / name), "another checkpoint")


def test_a_whole_resume_refuses_it_before_the_first_step(tmp_path, monkeypatch, whole_run):
    monkeypatch.chdir(tmp_path)
    folder = shutil.copytree(whole_run[1], tmp_path / "checkpoint-1")
    hidden(folder / "optimizer.pt")
    model = build("bert", None)
    trainer = trainer_for(
        tmp_path / "more", model, rows=Rows(classes=2), method="fo-ft", max_steps=2
    )
    refused(lambda: trainer.train(resume_from_checkpoint=str(folder)), str(folder / "optimizer.pt"))
    assert_same_bits(bits(model), bits(whole_run[0].model))  # restored, and not trained


@pytest.mark.parametrize(
    ("name", "content"),
    [("scheduler.pt", [1, 2]), ("rng_state.pth", {"cpu": 1}), ("optimizer.pt", {"zofo": 3})],
)
def test_so_are_files_with_other_contents(tmp_path, whole_run, name, content):
    trainer, checkpoint = whole_run
    folder = shutil.copytree(checkpoint, tmp_path / "checkpoint-1")
    torch.save(content, folder / name)
    load = (
        trainer._load_rng_state
        if name == "rng_state.pth"
        else trainer._load_optimizer_and_scheduler
    )
    refused(lambda: load(str(folder)), str(folder))
