"""The examples run offline with the commands in their docstrings."""

from __future__ import annotations

import io
import os
import re
import runpy
import subprocess
import sys
import tomllib
from contextlib import redirect_stdout
from pathlib import Path

import pytest

from tests.support.groups import in_group
from zofo.optim.trajectory import TRAJECTORY_FILE, Trajectory

FOLDER = Path(__file__).parents[2] / "examples"
NAMES = ["minimal_loop", "hf_trainer", "trl_sft"]
SHARDED = "sharded_loop"


def run(folder, *command):
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, *command],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    assert "/zofo/" not in done.stderr  # zofo itself must not warn.
    return done.stdout


def accuracies(output):
    return [float(number) for number in re.findall(r"dev accuracy (\d\.\d\d)", output)]


def test_every_example_is_listed():
    assert {path.stem for path in FOLDER.glob("*.py")} == {*NAMES, SHARDED, "tiny"}


@pytest.mark.parametrize(
    "name", ["minimal_loop", "hf_trainer", pytest.param("trl_sft", marks=pytest.mark.slow)]
)
def test_the_command_in_the_header(tmp_path, monkeypatch, capsys, name):
    """The script runs in this process, which has imported the libraries and fails at a warning."""
    path = FOLDER / f"{name}.py"
    assert f"\n    python examples/{name}.py\n" in path.read_text(encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(FOLDER)
    monkeypatch.setattr(sys, "argv", [str(path)])
    runpy.run_path(str(path), run_name="__main__")
    found = accuracies(capsys.readouterr().out)
    assert max(found) > 0.5
    if name == "hf_trainer":
        assert found[-1] == found[-2]  # The reloaded model has the same accuracy.


def sharded(out, *arguments):
    """Run the sharded loop in this process, which has joined the others."""
    sys.path.insert(0, str(FOLDER))
    sys.argv = [f"{SHARDED}.py", "--epochs", "5", "--out", str(out), *arguments]
    with redirect_stdout(io.StringIO()) as output:
        runpy.run_path(str(FOLDER / f"{SHARDED}.py"), run_name="example")["main"]()
    return output.getvalue()


def test_the_sharded_loop(tmp_path):
    assert f"torchrun --nproc-per-node 2 examples/{SHARDED}.py" in (
        FOLDER / f"{SHARDED}.py"
    ).read_text(encoding="utf-8")
    first, second = in_group(2, sharded, tmp_path)
    assert accuracies(first)
    assert second == ""  # only the first process writes
    trajectory, _ = Trajectory.load(tmp_path / TRAJECTORY_FILE)
    assert accuracies(in_group(2, sharded, tmp_path, "--resume")[0])
    resumed, _ = Trajectory.load(tmp_path / TRAJECTORY_FILE)
    assert resumed.updates[: len(trajectory)] == trajectory.updates
    assert len(resumed) == 2 * len(trajectory) > 0


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_with_a_model_from_a_folder(tmp_path, name):
    save = (
        "import sys; sys.path.insert(0, sys.argv[1]); import tiny\n"
        "model, tokenizer = tiny.load(None)\n"
        "model.save_pretrained('model'); tokenizer.save_pretrained('model')"
    )
    run(tmp_path, "-c", save, str(FOLDER))
    command = ("--model", "model", "--base-lr", "1e-4", "--epochs", "5")
    assert accuracies(run(tmp_path, str(FOLDER / f"{name}.py"), *command))


def test_the_flower_app_declares_the_settings_that_it_reads():
    folder = FOLDER / "federated"
    flower = tomllib.loads((folder / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["flwr"]
    text = "".join(path.read_text(encoding="utf-8") for path in folder.rglob("*.py"))
    assert set(re.findall(r'config\["([\w-]+)"\]', text)) == {
        *flower["app"]["config"],
        "partition-id",  # of a node
    }
    for component in flower["app"]["components"].values():
        module, _, name = component.partition(":")
        path = (folder / module.replace(".", "/")).with_suffix(".py")
        assert f"\n{name} = " in path.read_text(encoding="utf-8")
