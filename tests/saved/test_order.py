"""What is written is a function of the run, and not of the order of a set in a process."""

from __future__ import annotations

import json

import peft
import pytest

from tests.support.models import build
from tests.support.trainers import trainer_for
from zofo.saved.artifact import BaseSpec, save_artifact

TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "up_proj", "down_proj", "gate_proj"]


class Backwards(set):
    """Stands for a set in a process with another hash seed."""

    def __iter__(self):
        return iter(sorted(super().__iter__(), reverse=True))


class Forwards(set):
    def __iter__(self):
        return iter(sorted(super().__iter__()))


@pytest.fixture
def model():
    config = peft.LoraConfig(
        task_type="CAUSAL_LM", r=2, target_modules=TARGETS, exclude_modules=["lm_head", "x", "y"]
    )
    return peft.get_peft_model(build("llama", None), config)


def folders(model, tmp_path, save):
    config = model.peft_config["default"]
    for kind in (Forwards, Backwards):
        for key in ("target_modules", "exclude_modules"):
            assert isinstance(getattr(config, key), set)
            setattr(config, key, kind(getattr(config, key)))
        place = tmp_path / kind.__name__
        save(place)
        yield {p.relative_to(place).as_posix(): p.read_bytes() for p in place.rglob("*.json")}


def test_artefacts_of_one_run_have_the_same_bytes(model, tmp_path):
    def save(place):
        save_artifact(place, model, base=BaseSpec("base"), method="fo-peft")

    one, other = folders(model, tmp_path, save)
    assert one == other
    written = json.loads(one["adapter/adapter_config.json"])
    assert written["target_modules"] == sorted(TARGETS)
    assert written["exclude_modules"] == ["lm_head", "x", "y"]


@pytest.mark.parametrize("base_lr", [0.0, 1e-3])
def test_checkpoints_of_one_run_have_the_same_bytes(model, tmp_path, base_lr):
    trainer = trainer_for(tmp_path / "run", model, base_lr=base_lr)
    one, other = folders(model, tmp_path, lambda place: trainer.save_model(str(place)))
    assert one == other
    assert "adapter_config.json" in one
