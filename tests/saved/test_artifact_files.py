"""Files of artefacts: the same bytes for the same run, permissions, a full disk."""

from __future__ import annotations

import json
import os
import stat

import peft
import pytest
from safetensors import SafetensorError

from tests.support.models import build
from tests.support.trainers import trainer_for
from zofo.errors import UserError
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


@pytest.mark.parametrize("umask", [0o077, 0o002])
def test_an_artefact_has_the_permissions_that_the_umask_allows(model, tmp_path, umask):
    before = os.umask(umask)
    try:
        save_artifact(tmp_path / "a", model, base=BaseSpec("base"), method="fo-peft")
    finally:
        os.umask(before)
    for path in (tmp_path / "a", *(tmp_path / "a").rglob("*")):
        wanted = (0o777 if path.is_dir() else 0o666) & ~umask
        assert stat.S_IMODE(path.stat().st_mode) == wanted, path


@pytest.mark.parametrize("method", ["fo-peft", "fo-ft"])
def test_a_full_disk_is_one_error(model, tmp_path, monkeypatch, method):
    def full(*args, **kwargs):
        raise SafetensorError("Error while serializing: I/O error: No space left on device")

    monkeypatch.setattr("transformers.modeling_utils.safe_save_file", full)
    monkeypatch.setattr("peft.peft_model.safe_save_file", full)
    whole = build("llama", None) if method == "fo-ft" else model
    with pytest.raises(UserError, match=r"cannot write .*a: No space left on device; free space"):
        save_artifact(tmp_path / "a", whole, base=BaseSpec("base"), method=method)
    assert not (tmp_path / "a" / "zofo.json").exists()
