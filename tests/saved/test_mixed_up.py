"""Folders that hold files of several runs, and checkpoints with hostile pickles, are refused."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from tests.support.damage import NEVER
from zofo.cli.app import app
from zofo.errors import UserError
from zofo.saved.artifact import load
from zofo.saved.inspect import inspect
from zofo.saved.source import open_source
from zofo.saved.verify import verify

pytestmark = pytest.mark.usefixtures("own_working_folder")


@pytest.fixture
def run(made, tmp_path):
    return Path(shutil.copytree(made / "a", tmp_path / "run"))


def checkpoint_of(run):
    return max(run.glob("checkpoint-*"), key=lambda path: int(path.name.partition("-")[2]))


def unfinished(run):
    (run / "result.json").unlink()
    shutil.rmtree(run / "artifact")
    return run


def content_of(run):
    return {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}


def resume(run):
    """Continue a run that must be refused; return the one error."""
    before = content_of(run)
    done = CliRunner().invoke(app, ["train", "--resume", str(run)])
    assert done.exit_code == 2, done.output
    assert [line[:7] for line in done.stderr.splitlines()].count("error: ") == 1
    assert content_of(run) == before
    return done.stderr


@pytest.mark.parametrize(
    ("other", "name"),
    [
        ("b", "artifact"),
        ("c", "artifact"),
        ("whole", "artifact"),
        ("b", "run.yaml"),
        ("whole", "run.yaml"),
        ("b", "base.json"),
        ("b", "result.json"),
    ],
)
def test_a_run_with_a_part_of_another(made, run, other, name):
    assert inspect(run).is_whole
    if name == "artifact":
        shutil.rmtree(run / name)
        shutil.copytree(made / other / name, run / name)
    else:
        shutil.copy(made / other / name, run)
    info = inspect(run)
    assert not info.is_whole
    assert "belongs to another run" in info.problem
    header, *rest = verify(run)
    assert header.is_sound is False
    assert header.detail == info.problem
    assert not any(check.is_sound for check in rest)
    with pytest.raises(UserError, match="belongs to another run"):
        load(run)


def test_a_run_with_the_checkpoint_of_another(made, run):
    checkpoint = checkpoint_of(run)
    assert open_source(checkpoint).method == "hybrid"
    shutil.rmtree(checkpoint)
    shutil.copytree(made / "b" / checkpoint.name, checkpoint)
    with pytest.raises(UserError, match="belongs to another run"):
        open_source(checkpoint)
    assert "belongs to another run" in inspect(checkpoint).problem
    assert inspect(run).checkpoints[3] is False
    assert "belongs to another run" in resume(unfinished(run))


@pytest.mark.parametrize(("owner", "other"), [("whole", "a"), ("a", "whole")])
def test_a_checkpoint_of_another_method_without_the_name_of_its_run(made, tmp_path, owner, other):
    """Checkpoints of older versions name no run, but what they hold tells their method."""
    run = Path(shutil.copytree(made / owner, tmp_path / "run"))
    shutil.rmtree(checkpoint := checkpoint_of(run))
    shutil.copytree(made / other / checkpoint.name, checkpoint)
    (checkpoint / "zofo_accounts.json").unlink()
    (checkpoint / "zofo_files.json").unlink()
    assert "adapter, and the method is" in inspect(checkpoint).problem
    with pytest.raises(UserError, match="belongs to another run"):
        open_source(checkpoint)
    assert "belongs to another run" in resume(unfinished(run))


@pytest.mark.parametrize("text", ["[" * 100_000, "", '{"dev": 3}'])
def test_a_damaged_result_is_one_error_when_the_run_is_continued(run, text):
    (run / "result.json").write_text(text)
    assert "result.json is damaged" in resume(run)


class Command:
    """Runs a command when it is unpickled."""

    def __reduce__(self):
        return os.system, (f"touch {NEVER}",)


@pytest.mark.parametrize("name", ["optimizer.pt", "scheduler.pt", "rng_state.pth"])
def test_verify_finds_a_hostile_pickle_of_a_checkpoint_and_runs_nothing(run, name):
    checkpoint = checkpoint_of(run)
    checks = {check.name: check for check in verify(checkpoint)}
    assert checks["state"].is_sound
    torch.save({"state": Command()}, checkpoint / name)
    files = json.loads((checkpoint / "zofo_files.json").read_text())
    del files["files"][name]
    (checkpoint / "zofo_files.json").write_text(json.dumps(files))
    checks = {check.name: check for check in verify(checkpoint)}
    assert checks["state"].is_sound is False
    assert name in checks["state"].detail
    assert checks["model"].is_sound is None
    assert not NEVER.exists()
