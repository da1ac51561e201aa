"""A checkpoint is complete or absent, and damaged checkpoints are found and skipped."""

from __future__ import annotations

import errno
import json
import os
import shutil

import pytest
import torch

from tests.support.models import assert_same_bits, bits, build
from tests.support.trainers import trainer_for, untimed_logs
from zofo.disk.folders import LIST_FILE, writing_folder
from zofo.errors import UserError
from zofo.saved.checkpoint_folders import (
    checkpoints,
    find_damage,
    newest_whole,
    remove_leftovers,
    rotate,
)

SAVING = {"save_strategy": "steps", "save_steps": 2, "max_steps": 6, "optim": "adamw_torch"}


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("saved")
    trainer_for(folder, **SAVING).train()
    return folder


@pytest.fixture
def run(saved, tmp_path):
    shutil.copytree(saved, tmp_path / "run")
    return tmp_path / "run"


def test_a_saved_checkpoint_is_whole_and_lists_its_files(run):
    assert list(checkpoints(run)) == [2, 4, 6]
    for path in checkpoints(run).values():
        assert find_damage(path) is None
        listed = json.loads((path / LIST_FILE).read_text())["files"]
        assert {*listed, LIST_FILE} == {file.name for file in path.iterdir()}
    assert not list(run.glob(".*"))
    assert newest_whole(run) == run / "checkpoint-6"


@pytest.mark.parametrize("kept", [2, 6])
def test_a_kill_while_a_checkpoint_is_replaced_loses_nothing(run, monkeypatch, kept):
    """The old folder comes back if the process ended between the two renames."""
    place = run / f"checkpoint-{kept}"
    before = {path.name: path.read_bytes() for path in place.iterdir()}
    replace, moves = type(place).replace, []

    def replace_once(self, target):
        moves.append(target)
        if len(moves) > 1:
            raise KeyboardInterrupt
        return replace(self, target)

    def save():
        with writing_folder(place) as staged:
            (staged / "new").touch()
            monkeypatch.setattr(type(place), "replace", replace_once)
            monkeypatch.setattr("zofo.disk.folders.shutil.rmtree", lambda *_, **__: None)

    with pytest.raises(KeyboardInterrupt):
        save()
    monkeypatch.undo()
    assert not place.exists()
    assert list(checkpoints(run)) == [2, 4, 6]
    assert {path.name: path.read_bytes() for path in place.iterdir()} == before
    assert newest_whole(run) == run / "checkpoint-6"
    remove_leftovers(run)
    assert not list(run.glob(".*"))


@pytest.mark.parametrize("error", [OSError(errno.EIO, "broken"), KeyboardInterrupt()])
def test_a_failed_replacement_leaves_the_old_checkpoint(run, monkeypatch, error):
    place = run / "checkpoint-6"
    before = every_file(place)
    replace = type(place).replace

    def fail(self, target):
        if self.parent.name.endswith(".partial") and target == place:
            raise error
        return replace(self, target)

    monkeypatch.setattr(type(place), "replace", fail)
    with pytest.raises((UserError, KeyboardInterrupt)), writing_folder(place) as staged:
        (staged / "new").touch()
    assert every_file(place) == before
    assert not list(run.glob(".*"))


def every_file(folder):
    return sorted(path.name for path in folder.iterdir() if path.name != LIST_FILE)


def flip(path, offset):
    data = bytearray(path.read_bytes())
    data[offset % len(data)] ^= 4
    path.write_bytes(bytes(data))


@pytest.mark.parametrize("damage", ["removed", "emptied", "truncated", "flipped", "swapped"])
def test_damage_to_any_file_is_found(run, damage):
    newest, older = run / "checkpoint-6", run / "checkpoint-4"
    sound = {name: (newest / name).read_bytes() for name in every_file(newest)}
    for name, content in sound.items():
        path = newest / name
        if damage == "removed":
            path.unlink()
        elif damage == "emptied":
            path.write_bytes(b"")
        elif damage == "truncated":
            path.write_bytes(content[:-1])
        elif damage == "flipped":
            flip(path, len(content) // 2)
        else:
            path.write_bytes((older / name).read_bytes())
        if path.exists() and path.read_bytes() == content:
            continue  # This file is the same in both checkpoints.
        said = []
        assert newest_whole(run, said.append) == older, name
        assert "checkpoint-6 is skipped" in said[0]
        assert name in said[0]
        path.write_bytes(content)
    assert newest_whole(run) == newest


@pytest.mark.parametrize(
    "text", ["", "[]", "{", '{"files": 3}', '{"files": {"a": 1}}', "[" * 99999]
)
def test_a_list_that_is_none_is_damage(run, text):
    (run / "checkpoint-6" / LIST_FILE).write_text(text)
    assert LIST_FILE in find_damage(run / "checkpoint-6")


def test_without_a_list_the_files_themselves_are_read(run):
    newest = run / "checkpoint-6"
    (newest / LIST_FILE).unlink()
    assert find_damage(newest) is None
    for name in ("adapter_model.safetensors", "base_trajectory.safetensors", "optimizer.pt"):
        content = (newest / name).read_bytes()
        (newest / name).write_bytes(content[: len(content) // 2])
        assert find_damage(newest) is not None, name
        (newest / name).write_bytes(content)


def test_a_checkpoint_under_another_steps_name_is_damaged(run):
    shutil.copytree(run / "checkpoint-2", run / "checkpoint-8")
    assert "belongs to step 2" in find_damage(run / "checkpoint-8")


def test_resuming_passes_over_a_damaged_checkpoint(run):
    whole = build("llama", "lora")
    uninterrupted = trainer_for(run.parent / "whole", whole, **SAVING)
    uninterrupted.train()
    flip(run / "checkpoint-6" / "optimizer.pt", 3000)
    (run / "checkpoint-4" / "trainer_state.json").write_text("{")
    rest = build("llama", "lora")
    resumed = trainer_for(run, rest, **SAVING)
    with pytest.warns(UserWarning, match="is skipped") as seen:
        resumed.train(resume_from_checkpoint=True)
    assert len(seen) == 2
    assert_same_bits(bits(rest), bits(whole))
    assert untimed_logs(resumed) == untimed_logs(uninterrupted)
    assert all(find_damage(path) is None for path in checkpoints(run).values())


@pytest.mark.parametrize("step", [2, 4, 6])
@pytest.mark.parametrize("log_every", [1, 4, 5])
def test_logs_between_checkpoints_come_out_the_same(tmp_path, saved, step, log_every):
    """A resumed run logs the same values as an uninterrupted one.

    A logged loss is a mean over steps, and some of these steps lie before the checkpoint.
    """
    changes = {**SAVING, "logging_steps": log_every}
    trainers = [trainer_for(tmp_path / "a", **changes), trainer_for(tmp_path / "a", **changes)]
    first = trainers[0].train()
    second = trainers[1].train(resume_from_checkpoint=str(tmp_path / f"a/checkpoint-{step}"))
    assert untimed_logs(trainers[0]) == untimed_logs(trainers[1])
    assert first.training_loss == second.training_loss
    # The same holds for checkpoint-6, which lies in the middle of an epoch.
    assert trainers[1].state.global_step == 6


def test_the_interval_of_logs_may_change(run):
    trainer = trainer_for(run, **{**SAVING, "logging_steps": 2, "max_steps": 8})
    trainer.train(resume_from_checkpoint=True)
    losses = [row["step"] for row in trainer.state.log_history if "loss" in row]
    assert losses == [1, 2, 3, 4, 5, 6, 8]


def test_the_best_is_found_where_the_run_was_moved(tmp_path):
    best = {
        **SAVING,
        "eval_strategy": "steps",
        "eval_steps": 2,
        "load_best_model_at_end": True,
        "save_total_limit": 1,
        "metric_for_best_model": "eval_loss",
        "greater_is_better": True,
    }
    whole, rest = build("llama", "lora"), build("llama", "lora")
    first = trainer_for(tmp_path / "a", whole, **best)
    first.train()
    step = first.state.best_global_step
    shutil.move(tmp_path / "a", tmp_path / "b")
    resumed = trainer_for(tmp_path / "b", rest, **best)
    resumed.train(resume_from_checkpoint=True)
    assert resumed.state.best_model_checkpoint == str(tmp_path / "b" / f"checkpoint-{step}")
    assert_same_bits(bits(rest), bits(whole))


@pytest.mark.parametrize(
    ("limit", "newest", "best", "left"),
    [
        (None, 9, None, [2, 4, 6, 9]),
        (2, 9, None, [6, 9]),
        (2, 9, 2, [2, 9]),
        (1, 9, 2, [2, 9]),
        (1, 9, 9, [9]),
        (3, 9, 2, [2, 6, 9]),
        (2, 4, None, [2, 4]),  # Steps 6 and 9 are left from another attempt.
        (2, 4, 2, [2, 4]),
    ],
)
def test_rotation_keeps_the_newest_and_the_best(tmp_path, limit, newest, best, left):
    for step in (2, 4, 6, 9):
        (tmp_path / f"checkpoint-{step}").mkdir()
    rotate(tmp_path, limit, newest=newest, best=best)
    assert list(checkpoints(tmp_path)) == left
    assert len(list(tmp_path.iterdir())) == len(left)


def test_leftovers_are_removed_and_nothing_else(tmp_path):
    for name in (".checkpoint-4.partial", ".checkpoint-2.old.partial", "checkpoint-2", ".mine"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "file").write_text("x")
    for name in (".run.yaml.a1b2c3d_", ".base_snapshot.safetensors.12345678", ".run.yaml.mine"):
        (tmp_path / name).write_text("x")
    remove_leftovers(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        ".mine",
        ".run.yaml.mine",
        "checkpoint-2",
    ]


def test_training_begins_by_removing_leftovers(run):
    (run / ".checkpoint-8.partial").mkdir()
    trainer_for(run, **SAVING).train(resume_from_checkpoint=True)
    assert not list(run.glob(".*"))


class HaltError(Exception):
    pass


@pytest.mark.parametrize("error", [HaltError(), KeyboardInterrupt(), RuntimeError("CUDA")])
def test_an_exception_leaves_no_trace(tmp_path, error):
    place = tmp_path / "checkpoint-2"
    place.mkdir()
    (place / "old").write_text("old")

    def write():
        with writing_folder(place) as staged:
            (staged / "new").write_text("new")
            raise error

    with pytest.raises(type(error)):
        write()
    assert [p.name for p in tmp_path.rglob("*")] == ["checkpoint-2", "old"]


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    """Return the weights of a run that nothing disturbed."""
    whole = build("llama", "lora")
    trainer_for(tmp_path_factory.mktemp("whole"), whole, **SAVING).train()
    return bits(whole)


def full(*args, **kwargs):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def full_in_torch(*args, **kwargs):
    raise RuntimeError("[enforce fail at inline_container.cc:664] . unexpected pos 64 vs 0")


@pytest.mark.parametrize(
    ("where", "fault", "words"),
    [
        ("torch.save", full, "No space left"),
        ("torch.save", full_in_torch, "unexpected pos"),
        ("os.fsync", full, "No space left"),
        ("safetensors.torch.save_file", full, "No space left"),
        ("pathlib.Path.mkdir", full, "No space left"),
    ],
)
@pytest.mark.parametrize("at", [4, 6])
def test_a_full_disk_is_one_error_and_older_checkpoints_stay(
    tmp_path, monkeypatch, undisturbed, where, fault, words, at
):
    from transformers import TrainerCallback

    class Fill(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            if state.global_step == at:
                monkeypatch.setattr(where, fault)

    trainer = trainer_for(tmp_path / "a", callbacks=[Fill()], save_total_limit=1, **SAVING)
    with pytest.raises(UserError, match=rf"(?s)cannot write .*checkpoint-{at}: .*{words}") as seen:
        trainer.train()
    assert ".partial" not in str(seen.value)
    monkeypatch.undo()
    assert newest_whole(tmp_path / "a") == tmp_path / "a" / f"checkpoint-{at - 2}"
    assert not list((tmp_path / "a").glob(".*"))

    rest = build("llama", "lora")
    trainer_for(tmp_path / "a", rest, **SAVING).train(resume_from_checkpoint=True)
    assert_same_bits(bits(rest), undisturbed)


def test_a_vanished_folder_is_one_error(tmp_path):
    from transformers import TrainerCallback

    class Remove(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            if state.global_step == 3:
                shutil.rmtree(args.output_dir)

    trainer = trainer_for(tmp_path / "a", callbacks=[Remove()], **SAVING)
    with pytest.raises(UserError, match=r"cannot write .*checkpoint-4: No such file"):
        trainer.train()
    assert not (tmp_path / "a").exists()


def test_generators_come_back(saved):
    state = torch.load(saved / "checkpoint-4" / "rng_state.pth", weights_only=False)
    assert {"python", "numpy", "cpu"} <= state.keys()
