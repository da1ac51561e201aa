"""Tests of the report command on real runs of a tiny model."""

import io
import json

import pandas as pd
import pytest
from rich.console import Console
from typer.testing import CliRunner

from tests.support.pages import read_page
from tests.support.run_folders import write_run, write_study
from zofo.cli.app import app
from zofo.cli.output import one_line
from zofo.cli.report import show
from zofo.config.load import load_config
from zofo.report.data import make_report
from zofo.results.table import read_runs
from zofo.run.train import train


def run(*arguments):
    return CliRunner().invoke(app, [str(a) for a in arguments])


@pytest.fixture(scope="module")
def trained(tmp_path_factory, decoder_folder):
    folder = tmp_path_factory.mktemp("real")
    lines = [f"film {i} is {('great', 'dull')[i % 2]},{('good', 'bad')[i % 2]}" for i in range(60)]
    (folder / "reviews.csv").write_text("text,label\n" + "\n".join(lines) + "\n")
    for method in ("hybrid", "fo-peft"):
        config = load_config(
            overrides=[
                f"model={decoder_folder}",
                "task=classification",
                f"task.train={folder / 'reviews.csv'}",
                "task.num_dev=10",
                "task.num_test=20",
                "steps=4",
                "eval_every=2",
                "log_every=3",
                "batch_size=4",
                f"method={method}",
                f"output_dir={folder / method}",
            ]
        )
        train(config, console=Console(quiet=True))
    return folder


def test_the_command_reports_what_the_runs_measured(trained):
    done = run("report", trained / "hybrid", trained / "fo-peft", "--to", trained / "page.html")
    assert done.exit_code == 0, done.output
    page = read_page(trained / "page.html")
    rows = {r["method"][0]: r for r in page.table("differ in nothing but the seed")}
    for method in ("hybrid", "fo-peft"):
        result = json.loads((trained / method / "result.json").read_text())
        row = rows[f"{method} lora"]
        assert row["accuracy"][1] == result["test"]["after"]["accuracy"]
        assert row["auc"][1] == result["test"]["after"]["auc"]
        assert row["forward_equivalents"][1] == result["cost"]["forward_equivalents"]
        assert row["artifact_bytes"][1] == result["cost"]["artifact_bytes"]
        assert f"{100 * row['accuracy'][1]:.2f} no interval" in done.output
    assert "Undecided" in done.output
    assert "1 seed. Too few seeds for an interval." in " ".join(done.output.split())
    assert done.output.strip().endswith("page.html")


def test_every_line_of_the_log_says_what_training_has_cost(trained):
    for method, per_step in (("hybrid", 3), ("fo-peft", 2)):
        log = (trained / method / "metrics.jsonl").read_text().splitlines()
        entries = pd.DataFrame([json.loads(line) for line in log])
        # Four steps give lines at steps 3 and 4, evaluations at 2 and 4, and Trainer's summary.
        assert entries["step"].tolist() == [2, 3, 4, 4, 4]
        assert (entries["forward_equivalents"] == per_step * entries["step"]).all()
        assert entries["elapsed_s"].is_monotonic_increasing
        curve = read_runs([trained / method]).curves
        assert curve["forward_equivalents"].tolist() == [2 * per_step, 4 * per_step]
        seconds = json.loads((trained / method / "result.json").read_text())["cost"]["train_s"]
        assert 0 < curve["elapsed_s"].iloc[0] < curve["elapsed_s"].iloc[1] < seconds


def test_a_study_is_shown_on_the_terminal_as_on_the_page(tmp_path):
    study = write_study(tmp_path / "study", tasks=("rte",))
    done = run("report", study, "--to", tmp_path / "page.html")
    assert done.exit_code == 0, done.output
    for row in read_page(tmp_path / "page.html").table("differ in nothing but the seed"):
        (line,) = [x for x in done.output.splitlines() if x.startswith(row["method"][0])]
        for key in ("accuracy", "auc", "majority", "forward_equivalents", "train_s"):
            assert row[key][0] in line
    assert "23 runs: 21 done, 1 unfinished, 1 failed" in done.output.replace("\n", " ")


def test_names_do_not_move_a_terminals_cursor(tmp_path):
    folder = write_run(tmp_path / "run", task="[red]x\x1b[2J\x07")
    console = Console(record=True, width=200, file=io.StringIO())
    show(make_report([folder]), console)
    text = console.export_text()
    assert "[red]x\ufffd[2J\ufffd" in text
    assert "\x1b" not in text
    assert one_line("a\nb\u202ec").plain == "a\ufffdb\ufffdc"


@pytest.mark.parametrize("runs", [["nowhere"], ["notes"], ["notes.txt"]])
def test_wrong_folders_are_one_message(tmp_path, monkeypatch, runs):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes.txt").write_text("")
    done = run("report", *runs)
    assert done.exit_code == 2
    assert done.output.startswith("error: ")
    assert "name run folders, or a study's folder" in done.output
    assert not (tmp_path / "report.html").exists()
