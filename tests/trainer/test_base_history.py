"""Resuming from a copy of the base equals replaying the whole trajectory."""

from __future__ import annotations

import shutil

import pytest
import torch

from tests.support.models import assert_same_bits, bits, build
from tests.support.trainers import trainer_for, untimed_logs
from tests.trainer.test_checkpoints import Kill, KilledError
from zofo.optim.trajectory import Trajectory
from zofo.trainer.base_history import SNAPSHOT_FILE

CHANGES = {"save_strategy": "steps", "save_steps": 2, "max_steps": 8, "snapshot_every": 3}


def model(dtype=torch.float32):
    return build("llama", "lora", dtype=dtype)


@pytest.fixture
def replayed(monkeypatch):
    """Return a list that receives the number of updates of each replay."""
    counts, real = [], Trajectory.replay

    def replay(self, parameters, *, start=0, **kwargs):
        counts.append(len(self) - start)
        return real(self, parameters, start=start, **kwargs)

    monkeypatch.setattr(Trajectory, "replay", replay)
    return counts


@pytest.mark.parametrize(
    ("dtype", "killed_at", "rest"),
    [
        (torch.float32, 3, 2),
        (torch.bfloat16, 5, 0),
        (torch.float32, 7, 2),
        # Steps and copies are counted alike in every dtype.
        pytest.param(torch.bfloat16, 3, 2, marks=pytest.mark.slow),
        pytest.param(torch.float32, 5, 0, marks=pytest.mark.slow),
        pytest.param(torch.bfloat16, 7, 2, marks=pytest.mark.slow),
    ],
)
def test_only_the_end_is_replayed(tmp_path, replayed, dtype, killed_at, rest):
    """Resuming replays only the updates after the last copy of the base.

    There are checkpoints at steps 2, 4 and 6. A copy is made at the first checkpoint that lies 3 or
    more updates after the previous copy.
    """
    whole, resumed = model(dtype), model(dtype)
    uninterrupted = trainer_for(tmp_path / "a", whole, **CHANGES)
    uninterrupted.train()
    assert not (tmp_path / "a" / SNAPSHOT_FILE).exists()
    with pytest.raises(KilledError):
        trainer_for(tmp_path / "b", model(dtype), callbacks=[Kill(killed_at)], **CHANGES).train()
    assert (tmp_path / "b" / SNAPSHOT_FILE).exists() == (killed_at > 4)
    trainer = trainer_for(tmp_path / "b", resumed, **CHANGES)
    trainer.train(resume_from_checkpoint=True)
    assert replayed == [rest]
    assert_same_bits(bits(resumed), bits(whole))
    assert untimed_logs(trainer) == untimed_logs(uninterrupted)
    assert not (tmp_path / "b" / SNAPSHOT_FILE).exists()


@pytest.fixture
def killed(tmp_path):
    with pytest.raises(KilledError):
        trainer_for(tmp_path / "b", model(), callbacks=[Kill(7)], **CHANGES).train()
    return tmp_path / "b"


@pytest.mark.parametrize("damage", ["truncated", "flipped", "empty"])
def test_a_damaged_copy_is_passed_over(tmp_path, killed, replayed, damage):
    path = killed / SNAPSHOT_FILE
    content = bytearray(path.read_bytes())
    if damage == "flipped":
        content[-9] ^= 1
    path.write_bytes({"truncated": content[:-5], "flipped": content, "empty": b""}[damage])
    rest, whole = model(), model()
    with pytest.warns(UserWarning, match="base_snapshot.safetensors is ignored"):
        trainer_for(killed, rest, **CHANGES).train(resume_from_checkpoint=True)
    assert replayed == [6]
    trainer_for(tmp_path / "a", whole, **CHANGES).train()
    assert_same_bits(bits(rest), bits(whole))


def test_a_copy_ahead_of_the_checkpoint_is_not_used(tmp_path, killed, replayed):
    whole, rest = model(), model()
    trainer_for(killed, rest, **CHANGES).train(resume_from_checkpoint=str(killed / "checkpoint-2"))
    assert replayed == [2]
    trainer_for(tmp_path / "a", whole, **CHANGES).train()
    assert_same_bits(bits(rest), bits(whole))


def test_a_copy_of_another_run_is_not_used(tmp_path, killed, replayed):
    other = {**CHANGES, "learning_rate": 3e-2, "snapshot_every": None}
    with pytest.raises(KilledError):
        trainer_for(tmp_path / "c", model(), callbacks=[Kill(7)], **other).train()
    shutil.copy(killed / SNAPSHOT_FILE, tmp_path / "c")
    rest, whole = model(), model()
    trainer_for(tmp_path / "c", rest, **other).train(resume_from_checkpoint=True)
    assert replayed == [6]
    trainer_for(tmp_path / "a", whole, **other).train()
    assert_same_bits(bits(rest), bits(whole))
