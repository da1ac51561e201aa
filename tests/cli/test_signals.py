"""SIGTERM outside a training loop: the command removes what is incomplete and says what it did."""

from __future__ import annotations

import os
import shutil
import signal
from pathlib import Path
from unittest.mock import patch

import pytest
from typer.testing import CliRunner

from tests.support.forks import in_forks
from zofo.cli.app import app

FILES = Path(__file__).parents[1] / "fixtures" / "written_by_50fe18a"
NEW = ("task=classification", "task.train=rows.csv", "model=base", "task.num_dev=4")
CASES = {
    "export": (("export", "p-tuning", "--to", "new"), "zofo.saved.export._compare"),
    "new run": (("train", *NEW, "output_dir=new"), "zofo.run.train.prepare"),
    "resumed run": (("train", "--resume", "lora-float32-interrupted"), "zofo.run.train.evaluate"),
}
SAID = {
    "new run": "interrupted before anything was written",
    "resumed run": "interrupted; lora-float32-interrupted/checkpoint-4 is whole. Continue with: "
    "zofo train --resume lora-float32-interrupted",
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return Path(shutil.copytree(FILES, tmp_path_factory.mktemp("signals") / "files"))


def ended(folder, arguments, place):
    """In a process of its own: run the command, and send the signal at a place in the code."""
    os.chdir(folder)
    with patch(place, lambda *_, **__: os.kill(os.getpid(), signal.SIGTERM)):
        done = CliRunner().invoke(app, arguments)
    is_restored = signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    return done.exit_code, " ".join(done.stderr.split()), is_restored


@pytest.mark.parametrize("case", CASES)
def test_sigterm_is_answered(folder, case):
    ((code, said, is_restored),) = in_forks((ended, folder, *CASES[case]))
    assert code == 143, said
    assert SAID.get(case, "interrupted; what was not finished is removed") in said
    assert is_restored
    assert not (folder / "new").exists()
    assert {p.name for p in folder.rglob(".*")} <= {".lock"}


def ignored(folder):
    os.chdir(folder)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    with patch("zofo.saved.inspect.inspect", lambda _: os.kill(os.getpid(), signal.SIGTERM)):
        CliRunner().invoke(app, ["info", "p-tuning"])
    return signal.getsignal(signal.SIGTERM) is signal.SIG_IGN


def test_a_signal_that_is_ignored_stays_ignored(folder):
    assert in_forks((ignored, folder)) == [True]
