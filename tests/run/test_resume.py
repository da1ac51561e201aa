"""Tests of which runs can be resumed, and with which configuration."""

from __future__ import annotations

import errno
import json
import os
import shutil

import pytest
from rich.console import Console
from typer.testing import CliRunner

from tests.support.trainers import untimed_metrics
from zofo.cli.app import app
from zofo.config.load import load_config
from zofo.config.schema import (
    AdapterConfig,
    ModelConfig,
    PreferenceConfig,
    RewardConfig,
    RunConfig,
)
from zofo.run.resume import FREE, differences, is_finished, newest_checkpoint, resumed_config
from zofo.run.train import train
from zofo.tasks.spec import TaskSpec


def invoke(*arguments):
    return CliRunner().invoke(app, [str(a) for a in arguments])


@pytest.fixture(scope="module")
def finished(tmp_path_factory, decoder_folder):
    folder = tmp_path_factory.mktemp("resume")
    rows = [f"film {i} is {('great', 'dull')[i % 2]},{i % 2}" for i in range(60)]
    (folder / "a.csv").write_text("\n".join(["text,label", *rows]) + "\n")
    config = load_config(
        overrides=[
            f"model={decoder_folder}",
            "task=classification",
            f"task.train={folder / 'a.csv'}",
            "task.num_dev=10",
            "task.num_test=10",
            "steps=6",
            "eval_every=2",
            "log_every=1",
            "batch_size=4",
            f"output_dir={folder / 'run'}",
        ]
    )
    train(config, console=Console(quiet=True))
    return folder / "run"


@pytest.fixture
def run(finished, tmp_path):
    """Return a copy of the run at step 6, before it wrote its result."""
    shutil.copytree(finished, tmp_path / "run")
    (tmp_path / "run" / "result.json").unlink()
    shutil.rmtree(tmp_path / "run" / "artifact")
    return tmp_path / "run"


def test_a_finished_run_says_so(finished):
    before = {path: path.stat().st_mtime_ns for path in finished.rglob("*")}
    done = invoke("train", "--resume", finished)
    assert done.exit_code == 0
    assert "is finished" in done.stdout
    assert str(finished / "result.json") in done.stdout
    assert before == {path: path.stat().st_mtime_ns for path in finished.rglob("*")}


def test_every_difference_is_listed(finished):
    done = invoke("train", "--resume", finished, "steps=9", "adapter.r=4", "model.dtype=bfloat16")
    assert done.exit_code == 2
    assert done.stderr.startswith("error: ")
    for line in ("steps: 6 -> 9", "adapter.r: 8 -> 4", 'model.dtype: "float32" -> "bfloat16"'):
        assert f"  - {line}\n" in done.stderr
    assert done.stderr.count("  - ") == 3


def test_a_configuration_file_may_come_along(finished, tmp_path):
    text = (finished / "run.yaml").read_text()
    (tmp_path / "same.yaml").write_text(text)
    (tmp_path / "other.yaml").write_text(text.replace("seed: 0", "seed: 1"))
    assert resumed_config(finished, tmp_path / "same.yaml") == resumed_config(finished)
    done = invoke("train", "--resume", finished, tmp_path / "other.yaml", "log_every=3")
    assert done.exit_code == 2
    assert "  - seed: 0 -> 1\n" in done.stderr
    assert "log_every" not in done.stderr


def test_what_does_not_change_the_result_may_differ(run):
    options = ["log_every=2", "eval_batch_size=3", "device=cpu", "num_threads=1"]
    config = resumed_config(run, None, [*options, "output_dir=elsewhere", "report_to=[]"])
    assert config.log_every == 2
    assert config.output_dir == resumed_config(run).output_dir


def test_every_key_is_either_compared_or_free():
    sections = {"model": ModelConfig, "adapter": AdapterConfig, "task": TaskSpec}
    sections |= {"reward": RewardConfig, "preference": PreferenceConfig}

    def other(section, **kept):
        fields = {name: f"another {name}" for name in section.model_fields if name not in kept}
        return section.model_construct(**fields, **kept)

    changed = other(RunConfig, **{name: other(section) for name, section in sections.items()})
    expected = RunConfig.model_fields.keys() - sections - FREE
    expected |= {f"{name}.{key}" for name, part in sections.items() for key in part.model_fields}
    with pytest.warns(UserWarning, match="serializer"):
        found = differences(load_config(), changed)
    assert found.keys() == expected


def test_a_run_without_a_checkpoint_starts_from_its_beginning(run, finished):
    for folder in run.glob("checkpoint-*"):
        shutil.rmtree(folder)
    done = invoke("train", "--resume", run)
    assert done.exit_code == 0, done.output
    assert "starts from the beginning" in done.stderr.replace("\n", " ")
    assert untimed_metrics(run / "metrics.jsonl") == untimed_metrics(finished / "metrics.jsonl")


def test_a_damaged_checkpoint_is_passed_over(run, finished):
    newest = newest_checkpoint(run)
    assert newest.name == "checkpoint-6"
    (newest / "optimizer.pt").write_bytes(b"PK")
    done = invoke("train", "--resume", run)
    assert done.exit_code == 0, done.output
    assert "checkpoint-6 is skipped: optimizer.pt is damaged" in done.stderr
    assert untimed_metrics(run / "metrics.jsonl") == untimed_metrics(finished / "metrics.jsonl")
    scores = [json.loads((f / "result.json").read_text())["test"] for f in (run, finished)]
    assert scores[0] == scores[1]


@pytest.mark.parametrize("text", [None, "", "{", '{"step": 99, "loss": 1}\n', "\0" * 50])
def test_metrics_that_were_lost_come_back(run, finished, text):
    shutil.rmtree(run / "checkpoint-6")
    (run / "metrics.jsonl").unlink() if text is None else (run / "metrics.jsonl").write_text(text)
    assert invoke("train", "--resume", run).exit_code == 0
    assert untimed_metrics(run / "metrics.jsonl") == untimed_metrics(finished / "metrics.jsonl")


@pytest.fixture
def data(finished):
    """The file of the run's rows, which is put back after the test."""
    path = finished.parent / "a.csv"
    text = path.read_text()
    yield path
    path.write_text(text)


def test_new_rows_in_another_order_change_nothing(run, finished, data):
    header, *rows = data.read_text().splitlines()
    data.write_text("\n".join([header, "a new film,1", *rows[::-1], "another,0"]) + "\n")
    done = invoke("train", "--resume", run)
    assert done.exit_code == 0, done.output
    assert "2 other rows, which are new or were not used" in done.stderr.replace("\n", " ")
    assert untimed_metrics(run / "metrics.jsonl") == untimed_metrics(finished / "metrics.jsonl")
    scores = [json.loads((f / "result.json").read_text())["test"] for f in (run, finished)]
    assert scores[0] == scores[1]
    files = [f / "artifact" / "rows.safetensors" for f in (run, finished)]
    assert files[0].read_bytes() == files[1].read_bytes()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda rows: rows[1:], "1 of "),
        (lambda rows: rows[:5], "36 of 40 train rows missing"),
        (lambda rows: [row[:-1] + "10"[int(row[-1])] for row in rows], "40 of 40 train rows with"),
        (lambda rows: [row.replace("film", "book") for row in rows], "10 of 10 test rows missing"),
        (lambda rows: [*rows, "a new film,2"], "does not know these labels: '2'"),
    ],
)
def test_changed_rows_are_refused_before_any_work(run, data, change, words):
    header, *rows = data.read_text().splitlines()
    data.write_text("\n".join([header, *change(rows)]) + "\n")
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    done = invoke("train", "--resume", run)
    assert done.exit_code == 2
    assert words in done.stderr.replace("\n", " ")
    assert before == {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}


@pytest.mark.parametrize(
    "text", ["", "[]", "{", "7", "null", '{"dev": 3, "cost": {}}', '{"dev": {"after": []}}']
)
def test_a_damaged_result_is_none(run, text):
    (run / "result.json").write_text(text)
    assert not is_finished(run)


@pytest.mark.parametrize("text", ["", "steps: [", "stepss: 3", "- 1"])
def test_a_damaged_configuration_is_one_error(run, text):
    (run / "run.yaml").write_text(text or "seed: [")
    done = invoke("train", "--resume", run)
    assert done.exit_code == 2
    assert done.stderr.startswith("error: ")


@pytest.mark.parametrize(("number", "word"), [(errno.EROFS, "Read-only"), (errno.ENOSPC, "space")])
def test_a_folder_that_cannot_be_written_is_one_error(run, monkeypatch, number, word):
    before = {path.name for path in run.iterdir()}

    def fail(*args, **kwargs):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr("os.fsync", fail)
    done = invoke("train", "--resume", run)
    assert done.exit_code == 2
    (error,) = [line for line in done.stderr.splitlines() if not line.startswith("note: ")]
    assert error.startswith("error: ")
    assert word in error
    assert before == {path.name for path in run.iterdir()}


def test_a_full_disk_in_the_middle_of_a_run(run, finished, monkeypatch):
    shutil.rmtree(run / "checkpoint-6")
    kept = newest_checkpoint(run)

    def fail(*args, **kwargs):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("torch.save", fail)
    done = invoke("train", "--resume", run)
    assert done.exit_code == 2
    assert "No space left" in done.stderr
    assert "Traceback" not in done.output
    assert newest_checkpoint(run) == kept
    monkeypatch.undo()
    assert invoke("train", "--resume", run).exit_code == 0
    assert untimed_metrics(run / "metrics.jsonl") == untimed_metrics(finished / "metrics.jsonl")


def test_a_run_folder_that_vanishes_is_one_error(run, monkeypatch):
    import zofo.run.task_trainer

    real = zofo.run.task_trainer.TaskTrainer.compute_loss

    def compute_loss(self, *args, **kwargs):
        shutil.rmtree(run, ignore_errors=True)
        return real(self, *args, **kwargs)

    for folder in run.glob("checkpoint-*"):
        shutil.rmtree(folder)
    monkeypatch.setattr(zofo.run.task_trainer.TaskTrainer, "compute_loss", compute_loss)
    done = invoke("train", "--resume", run)
    assert done.exit_code == 2
    assert f"{run} was removed during the run" in done.stderr


@pytest.mark.parametrize(
    ("moment", "is_begun_again"),
    [("evaluate", False), ("save_artifact", False), ("write_card", True)],
)
def test_a_run_folder_that_vanishes_beside_training_is_one_error(
    run, monkeypatch, moment, is_begun_again
):
    import zofo.run.result
    import zofo.run.train

    home = zofo.run.train if moment == "evaluate" else zofo.run.result
    real = getattr(home, moment)

    def vanish(*args, **kwargs):
        found = real(*args, **kwargs)
        shutil.rmtree(run, ignore_errors=True)
        if is_begun_again:  # by another process, which writes its own files
            run.mkdir()
            for name in (".lock", "run.yaml", "metrics.jsonl"):
                (run / name).write_text("of another run")
        return found

    monkeypatch.setattr(home, moment, vanish)
    done = invoke("train", "--resume", run)
    assert done.exit_code == 2
    (error,) = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert f"{run} was removed during the run" in error
    if not is_begun_again:
        assert not (run / "result.json").exists()
