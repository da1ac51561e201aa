"""Tests of `zofo study` as a user runs it."""

import json
import sys
import time
from pathlib import Path

import pytest
from typer.testing import CliRunner

from docs import hooks
from tests.support.tiny_study import complete, kill_all, num_ended, results, start, write_rows
from tests.support.tiny_study import write_study as write
from zofo.cli.app import app
from zofo.study.process import Child
from zofo.study.spec import StudySpec

FAKE = (sys.executable, "-S", "-E", str(Path(__file__).with_name("fake_run.py")))


def run(*arguments):
    return CliRunner().invoke(app, ["study", *map(str, arguments)])


@pytest.fixture
def fake(monkeypatch):
    monkeypatch.setattr(Child, "program", FAKE)
    monkeypatch.setenv("FAKE_STEP_S", "0")


def test_from_plan_to_results(tmp_path, fake):
    rates = [{"base_lr": [1e-4], "adapter_lr": [1e-3, 13.0]}]
    path = write(tmp_path, "some/model", write_rows(tmp_path), rates=rates)
    plan = run(path, "--dry-run")
    assert plan.exit_code == 0, plan.output
    for words in ("6 runs in 2 cells", "forward-equivalents", "hours are not known", "hybrid"):
        assert words in plan.stdout
    assert not (tmp_path / "study").exists()
    assert run(path, "--status").exit_code == 2
    assert "no study in" in run(path, "--join").stderr

    done = run(path, "--workers", "2")
    assert done.exit_code == 1  # One of the rates fails.
    assert "dev loss 0." in done.stderr
    assert "everything has ended" in done.stdout
    assert "no such thing" in done.stdout
    assert "--retry-failed" in done.stderr
    status = run(tmp_path / "study", "--status")
    assert status.exit_code == 0
    assert "everything has ended" in status.stdout
    assert "error: no such thing" in status.stdout
    assert "s per forward" in run(tmp_path / "study", "--dry-run").stdout
    first = results(tmp_path)

    # A study that was moved continues at its new place.
    (tmp_path / "study").rename(tmp_path / "moved")
    assert run(tmp_path / "moved", "--join").exit_code == 1
    assert not (tmp_path / "study").exists()
    (tmp_path / "moved").rename(tmp_path / "study")
    assert results(tmp_path) == first


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["nowhere"], "does not exist"),
        (["laptop", "sseds=[1]"], "did you mean seeds"),
        (["laptop", "tasks=[boolk]", "--dry-run"], "did you mean 'boolq'"),
        (["laptop", "seeds=none"], "valid list"),
    ],
)
def test_bad_input_is_one_message(arguments, words):
    done = run(*arguments)
    assert done.exit_code == 2
    assert done.stderr.startswith("error: ")
    assert words in done.stderr


def test_every_key_is_documented():
    page = Path(__file__).parents[2] / "docs" / "reference" / "options.md"
    text = hooks.fill(page.read_text())
    for name, field in StudySpec.model_fields.items():
        assert f"| `{name}` |" in text, name
        assert str(field.description) in text, name


@pytest.mark.slow
def test_real_runs_killed_twice_and_continued_with_two_workers(tmp_path, decoder_folder):
    """A study of 24 real runs gives the same results with and without kills."""
    changes = {
        "methods": ["hybrid", "fo-peft", "zo-ft"],
        "adapters": ["lora", "prompt"],
        "seeds": [0, 1, 2],
        "rates": [{"base_lr": [1e-5, 1e-4], "adapter_lr": [1e-3, 1e-2]}],
    }
    rows = write_rows(tmp_path)
    for name in ("whole", "killed"):
        (tmp_path / name).mkdir()
    complete(write(tmp_path / "whole", decoder_folder, rows, **changes), "--workers", "2")
    path = write(tmp_path / "killed", decoder_folder, rows, **changes)
    for wanted in (3, 17):
        process = start(path, "--workers", "2")
        while num_ended(tmp_path / "killed") < wanted and process.poll() is None:
            time.sleep(0.2)
        assert process.poll() is None, process.communicate()
        kill_all(process)
    complete(path, "--workers", "2")
    whole = results(tmp_path / "whole")
    assert len(whole["runs"]) == 24
    assert results(tmp_path / "killed") == whole
    for run_ in whole["runs"]:
        folders = [tmp_path / name / "study/runs" / run_["id"] for name in ("whole", "killed")]
        texts = [json.loads((f / "result.json").read_text()) for f in folders]
        assert texts[0]["dev"] == texts[1]["dev"]
        assert texts[0].get("test") == texts[1].get("test")
