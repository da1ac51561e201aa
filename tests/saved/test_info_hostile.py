"""`zofo info` and `zofo report` on files of other types and depths: one message, no traceback."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import time
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from tests.support.damage import refused
from zofo.cli.app import app
from zofo.disk.files import read_tensors, write_tensors
from zofo.errors import UserError
from zofo.models.loading import resolve
from zofo.optim.trajectory import MAX_UPDATES, GroupSpec, Trajectory, Update, _digest
from zofo.results.table import read_runs
from zofo.saved.checkpoint_folders import find_damage
from zofo.saved.inspect import inspect

FILES = Path(__file__).parents[1] / "fixtures" / "written_by_50fe18a"
DEEP, ZEROS = "[" * 100_000, "\0" * 100_000
CONTENTS = (DEEP, ZEROS, "", "null", "[]", "[1]", "3", '"text"', "[" * 900 + "]" * 900)


@pytest.fixture
def run(tmp_path, monkeypatch):
    """A copy of a finished run."""
    shutil.copytree(FILES / "lora-float32", tmp_path / "run")
    monkeypatch.chdir(tmp_path)
    return tmp_path / "run"


@pytest.fixture
def checkpoint(tmp_path, monkeypatch):
    shutil.copytree(FILES / "lora-float32-interrupted", tmp_path / "stopped")
    monkeypatch.chdir(tmp_path)
    return tmp_path / "stopped" / "checkpoint-4"


def info(folder):
    done = CliRunner().invoke(app, ["info", str(folder)])
    assert done.exception is None or isinstance(done.exception, SystemExit), done.exception
    assert len(done.output) < 5000
    return done.output


SCORES = (
    *(3, "text", [1], {"before": 3}, {"before": [1]}, {"before": {}}, {"after": {"num_rows": "8"}}),
    *({"after": {"num_rows": 8, "loss": "0.5"}}, {"after": {"num_rows": 8, "auc": {}}}),
    {"after": {"num_rows": 8, "accuracy": True}},
)


@pytest.mark.parametrize("scores", SCORES, ids=str)
def test_a_result_with_other_types(run, scores):
    (run / "result.json").write_text(json.dumps({"test": scores}))
    assert "result.json is damaged" in info(run)


@pytest.mark.parametrize("rewards", [3, "text", [1], {"after": 3}, {"after": {"reward": "1"}}])
def test_rewards_with_other_types(run, rewards):
    (run / "result.json").write_text(json.dumps({"rewards": rewards}))
    assert "result.json is damaged" in info(run)


def test_rewards_of_a_run_are_shown(run):
    rewards = {"before": {"reward": 0.25, "reward_best": 1.0}, "after": {"reward": None}}
    (run / "result.json").write_text(json.dumps({"rewards": rewards}))
    shown = " ".join(info(run).split())
    assert "before reward 0.25 on held-out prompts after reward none on held-out prompts" in shown


@pytest.mark.parametrize("content", CONTENTS, ids=lambda text: text[:9])
def test_a_result_that_is_no_object(run, content):
    (run / "result.json").write_text(content)
    assert "result.json is damaged" in info(run)
    (row,) = read_runs([run]).table.to_dict("records")
    assert row["status"] == "damaged"


def test_scores_that_the_run_could_not_compute_are_left_out(run):
    result = {"test": {"after": {"num_rows": 8, "loss": None, "accuracy": 0.5}}}
    (run / "result.json").write_text(json.dumps(result))
    assert "accuracy 0.5000 on 8 test rows" in info(run)


@pytest.mark.parametrize("content", CONTENTS, ids=lambda text: text[:9])
def test_a_log_and_a_configuration_of_anything(run, content):
    (run / "metrics.jsonl").write_text(f"{content}\n" * 3 + '{"step": 6, "loss": NaN}\n')
    read_runs([run])
    assert "whole" in info(run)
    (run / "run.yaml").write_text(content)
    (row,) = read_runs([run]).table.to_dict("records")
    assert row["status"] in ("damaged", "done")
    info(run)


@pytest.mark.parametrize("content", CONTENTS, ids=lambda text: text[:9])
def test_a_state_that_is_no_object(checkpoint, content):
    (checkpoint / "trainer_state.json").write_text(content)
    assert "trainer_state.json" in find_damage(checkpoint)
    assert "4 (damaged)" in info(checkpoint.parent)
    assert "NOT whole" in info(checkpoint)


def test_nan_in_the_state_is_no_damage(checkpoint):
    """Transformers writes it after a step whose loss was not finite."""
    path = checkpoint / "trainer_state.json"
    state = json.loads(path.read_text())
    state["log_history"].append({"step": 4, "grad_norm": float("nan")})
    path.write_text(json.dumps(state))
    (checkpoint / "zofo_files.json").unlink()
    assert find_damage(checkpoint) is None


@pytest.mark.parametrize(
    "name", ["run.yaml", "result.json", "metrics.jsonl", "artifact/zofo.json", "environment.json"]
)
def test_pipes_in_place_of_files(run, name):
    (run / name).unlink()
    os.mkfifo(run / name)
    with contextlib.suppress(UserError):  # Without a configuration, it is no run.
        read_runs([run.parent])
    info(run)


INDICES = (
    *(3, [], "text", None, {"a": 1}, {"a": None}, {"a": ["b"]}, {"a": "../base/x.safetensors"}),
    *({"a": "/dev/zero"}, {"a": "b/c.safetensors"}, {"a": ".."}, {"a": ""}),
)


@pytest.mark.parametrize("weight_map", INDICES, ids=str)
def test_an_index_that_names_no_files_of_the_folder(tmp_path, weight_map):
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    refused(lambda: resolve(str(tmp_path)), "model.safetensors.index.json is damaged")


@pytest.mark.parametrize("content", ["3", "[]", "{}", DEEP, '{"method": 1}'])
def test_a_record_of_an_export_that_says_nothing(tmp_path, content):
    (tmp_path / "zofo_export.json").write_text(content)
    found = inspect(tmp_path)
    assert not found.is_whole
    assert "zofo_export.json is damaged" in found.problem
    done = CliRunner().invoke(app, ["verify", str(tmp_path)])
    assert done.exit_code == 2, done.output


def test_a_trajectory_of_very_many_groups(tmp_path):
    """Its steps and rates fill little of the file, and would fill all memory."""
    num_groups, num_steps = 5000, 1000
    assert num_groups * num_steps > MAX_UPDATES
    groups = tuple(GroupSpec((f"w{i}",), (i,)) for i in range(num_groups))
    row = tuple(Update(0, (0.5,), 1e-3, 0.0) for _ in groups)
    path = tmp_path / "t.safetensors"
    Trajectory(0, "rademacher", 1e-3, "forward", groups, [row]).save(path)
    tensors, metadata = read_tensors(path)
    tensors["projected_grad"] = torch.full((num_steps, 1), 0.5, dtype=torch.float64)
    header = {**json.loads(metadata["zofo"]), "num_steps": num_steps}
    header.pop("digest")
    header["digest"] = _digest(header, tensors)
    write_tensors(path, tensors, {"zofo": json.dumps(header)})
    start = time.process_time()
    refused(lambda: Trajectory.load(path), "groups")
    assert time.process_time() - start < 5
