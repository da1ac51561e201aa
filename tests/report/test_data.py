"""Tests of the report as JSON."""

import json
import math

from typer.testing import CliRunner

from tests.support.run_folders import write_run, write_study
from zofo.cli.app import app
from zofo.results.table import read_runs


def run(*arguments):
    return CliRunner().invoke(app, [str(a) for a in arguments])


def test_the_json_holds_every_run_and_every_evaluation(tmp_path):
    study, to = write_study(tmp_path / "study"), tmp_path / "results.json"
    for _ in range(2):  # An earlier file is replaced.
        done = run("report", study, "--to", tmp_path / "page.html", "--json", to)
        assert done.exit_code == 0, done.output
    found, runs = json.loads(to.read_text()), read_runs([study])
    assert [row["run"] for row in found["runs"]] == list(runs.table["run"])
    scores = [None if math.isnan(score) else score for score in runs.table["accuracy"]]
    assert [row["accuracy"] for row in found["runs"]] == scores
    losses = [(point["run"], point["dev_loss"]) for point in found["curves"]]
    assert losses == list(zip(runs.curves["run"], runs.curves["dev_loss"], strict=True))
    assert len(found["pairs"]) >= 1
    assert found["verdict"]["sentence"] in done.output.replace("\n", " ")
    # The file may be published, so it does not say where the runs lie.
    assert str(tmp_path) not in to.read_text()


def test_other_files_stay(tmp_path):
    folder, page = write_run(tmp_path / "run"), tmp_path / "page.html"
    (tmp_path / "mine.json").write_text('{"mine": 1}')
    for to in (tmp_path / "mine.json", tmp_path):
        done = run("report", folder, "--to", page, "--json", to)
        assert done.exit_code == 2
        assert "--json" in done.stderr
    done = run("report", folder, "--to", page, "--json", page)
    assert done.exit_code == 2
    assert "both" in done.stderr
    assert not page.exists()
    assert (tmp_path / "mine.json").read_text() == '{"mine": 1}'
