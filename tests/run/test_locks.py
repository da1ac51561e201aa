"""One run folder, one process: runs that begin together, and what a lock leaves behind."""

from __future__ import annotations

import os
import signal
import tempfile
import time
from pathlib import Path

import pytest
from typer.testing import CliRunner

from tests.support.forks import in_forks
from tests.support.run_folders import write_run
from zofo.cli.app import app
from zofo.config.load import load_config
from zofo.disk.locks import LOCK_FILE, take_lock
from zofo.errors import UserError
from zofo.results.table import read_runs
from zofo.run.prepare import run_folder
from zofo.saved.inspect import inspect

CONFIG = load_config(overrides=["task=sst2"])


def invoke(*arguments):
    done = CliRunner().invoke(app, [str(a) for a in arguments])
    return done.exit_code, done.output


def begin(folder, seed, gate, config):
    """In a process: wait for the others, take a run folder, and write there for a while."""
    os.chdir(folder)
    os.read(gate, 1)
    try:
        with run_folder(config) as taken:
            for _ in range(5):
                with (taken / "metrics.jsonl").open("a") as file:
                    file.write(f"{seed}\n")
                time.sleep(0.02)
            return str(taken)
    except UserError as error:
        return f"error: {error}"


def begin_together(folder, num, **options):
    reader, writer = os.pipe()
    os.write(writer, b"x" * num)
    config = CONFIG.model_copy(update=options)
    said = in_forks(*((begin, folder, seed, reader, config) for seed in range(num)))
    os.close(reader)
    os.close(writer)
    return said


def test_runs_that_begin_together_take_different_default_folders(tmp_path):
    said = begin_together(tmp_path, 4)
    names = [f"runs/sst2-hybrid-lora{end}" for end in ("", "-2", "-3", "-4")]
    assert sorted(said) == names
    for seed, name in enumerate(said):
        assert (tmp_path / name / "metrics.jsonl").read_text() == f"{seed}\n" * 5


def test_of_runs_that_begin_together_in_a_named_folder_one_is_served(tmp_path):
    said = begin_together(tmp_path, 4, output_dir="one")
    (seed,) = [i for i, text in enumerate(said) if text == "one"]
    assert (tmp_path / "one" / "metrics.jsonl").read_text() == f"{seed}\n" * 5
    others = [text for text in said if text != "one"]
    assert all("one is in use" in text or "one exists and is not empty" in text for text in others)


def go_on(folder):
    """In a process: continue a run until the other process has been refused."""
    try:
        with run_folder(CONFIG, resume=folder):
            end = time.monotonic() + 60
            while not (folder / "refused").exists() and time.monotonic() < end:
                time.sleep(0.01)
            return "served"
    except UserError as error:
        (folder / "refused").touch()
        return str(error)


def test_of_two_processes_that_continue_a_run_one_is_served(tmp_path):
    folder = write_run(tmp_path / "run", result=False)
    refused, served = sorted(in_forks((go_on, folder), (go_on, folder)))
    assert served == "served"
    assert f"{folder} is in use: another process trains in it" in refused


def test_the_command_line_refuses_a_folder_in_use(tmp_path):
    folder = write_run(tmp_path / "run", result=False)
    before = {path: path.read_bytes() for path in folder.iterdir()}
    (tmp_path / "new").mkdir()
    for arguments in (["--resume", folder], [f"output_dir={tmp_path / 'new'}"]):
        place = folder if "--resume" in arguments else tmp_path / "new"
        with take_lock(place / LOCK_FILE):
            # Another process, because a process may take its own lock again.
            ((code, said),) = in_forks((invoke, "train", *arguments))
        assert code == 2
        assert said.replace("\n", " ").startswith(f"error: {place} is in use: another process")
        assert "wait until it has ended" in said.replace("\n", " ")
    assert {p: p.read_bytes() for p in folder.iterdir() if p.name != LOCK_FILE} == before


def test_the_lock_is_no_content(tmp_path):
    folder = write_run(tmp_path / "run")
    before = inspect(folder), read_runs([tmp_path]).table
    (folder / LOCK_FILE).touch()
    after = inspect(folder), read_runs([tmp_path]).table
    assert after[0] == before[0]
    assert after[1].equals(before[1])


def hold(folder, how):
    with run_folder(CONFIG.model_copy(update={"output_dir": str(folder)})) as taken:
        (taken / "run.yaml").write_text("seed: 1\n")
        if how == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        raise KeyboardInterrupt


@pytest.mark.parametrize("how", ["kill", "error"])
def test_a_lock_ends_with_its_process(tmp_path, how):
    in_forks((hold, tmp_path / "a", how))
    with run_folder(CONFIG, resume=tmp_path / "a") as folder:
        assert (folder / "run.yaml").is_file()


def test_a_folder_without_content_can_be_used_and_goes_again(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine").mkdir()
    (tmp_path / "locked").mkdir()
    (tmp_path / "locked" / LOCK_FILE).touch()
    for name in ("mine", "locked", "new/inner", None):
        with run_folder(CONFIG.model_copy(update={"output_dir": name})) as folder:
            assert (folder / LOCK_FILE).is_file()
    assert sorted(p.name for p in tmp_path.rglob("*")) == ["locked", "mine"]


def test_default_names_go_on_counting(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for number in (1, 2, 3):
        with run_folder(CONFIG) as folder:
            (folder / "run.yaml").touch()
        assert folder.name.endswith("-lora" if number == 1 else f"-lora-{number}")
    Path("runs/sst2-hybrid-lora-4").write_text("a file")
    with run_folder(CONFIG) as folder:
        assert folder.name == "sst2-hybrid-lora-5"


def refused(name, words):
    config = CONFIG.model_copy(update={"output_dir": name})
    with pytest.raises(UserError, match=words), run_folder(config):
        pass


def test_places_that_cannot_be_written(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "link").symlink_to("nowhere")
    (tmp_path / "file").touch()
    (tmp_path / "lock").mkdir()
    (tmp_path / "lock" / LOCK_FILE).mkdir()
    refused("link", "is a link to nowhere, which does not exist")
    refused("file", "name a folder")
    refused("file/inner", "is a file")
    refused("lock", "cannot be taken")
    refused("x" * 300, "too long")
    (tmp_path / "runs").touch()
    refused(None, "output_dir=FOLDER")
    (tmp_path / "runs").unlink()
    (tmp_path / "runs").symlink_to("nowhere")
    refused(None, "is a link")


def without_rights(folder):
    os.chdir(folder)
    os.setuid(65534)
    try:
        with run_folder(CONFIG):
            return "taken"
    except UserError as error:
        return str(error)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become another user")
def test_a_working_folder_that_cannot_be_written():
    # Other users cannot enter pytest's own folder.
    with tempfile.TemporaryDirectory() as folder:
        Path(folder).chmod(0o755)
        (said,) = in_forks((without_rights, folder))
    assert "Permission denied" in said
    assert "output_dir=FOLDER" in said


@pytest.mark.parametrize(("signum", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_during_the_preparation_leaves_no_folder(monkeypatch, tmp_path, signum, code):
    def prepare(*_, **__):
        assert (tmp_path / "in" / "run").is_dir()
        os.kill(os.getpid(), signum)
        time.sleep(10)

    monkeypatch.setattr("zofo.run.train.prepare", prepare)
    before = signal.getsignal(signal.SIGTERM)
    found = invoke("train", "task=sst2", f"output_dir={tmp_path / 'in' / 'run'}")
    assert (found[0], "before anything was written" in found[1]) == (code, True)
    assert list(tmp_path.iterdir()) == []
    assert signal.getsignal(signal.SIGTERM) is before
