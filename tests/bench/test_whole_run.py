"""Tests of the peak memory of a whole run in each phase."""

import json

import pytest
from typer.testing import CliRunner

from zofo.bench import whole_run
from zofo.cli.app import app
from zofo.config.load import load_config


@pytest.fixture
def config(tmp_path, decoder_folder):
    rows = tmp_path / "reviews.csv"
    texts = [f"film {i} is {'great,good' if i % 2 else 'dull,bad'}" for i in range(40)]
    rows.write_text("\n".join(["text,label", *texts]) + "\n")
    path = tmp_path / "run.yaml"
    task = {"name": "classification", "train": str(rows), "num_dev": 8, "num_test": 8}
    values = {"model": decoder_folder, "task": task, "steps": 2, "eval_every": 1}
    path.write_text(json.dumps(values))  # JSON is valid YAML.
    return str(path)


@pytest.mark.parametrize("method", whole_run.METHODS_COMPARED)
def test_every_phase_of_a_run_has_its_peak(config, tmp_path, method, monkeypatch):
    # Registering each function makes monkeypatch restore it after the test.
    for module, path, _ in whole_run.PHASES:
        monkeypatch.setattr(f"{module}.{path}", whole_run.function_at(module, path)[2])
    run = tmp_path / method
    given = [f"method={method}", f"output_dir={run}", "device=cpu"]
    run.with_suffix(".yaml").write_text(load_config(config, overrides=given).to_yaml())
    for what in (method, "verify", "export"):
        found = whole_run.measure_here(str(run), what)
        wanted = {phase for _, _, phase in whole_run.PHASES} if what == method else {what}
        assert wanted < found["phases"].keys()
        assert min(found["phases"].values()) > 0


def test_a_phase_inside_another_counts_for_itself(monkeypatch):
    peaks = iter((1, 20, 300, 40, 5))
    monkeypatch.setattr(whole_run, "peak_bytes", lambda device: next(peaks))
    monkeypatch.setattr(whole_run, "reset_peak", lambda device: None)
    found = whole_run.PhasePeaks()
    with found.phase("training"), found.phase("evaluation"):
        pass
    assert found.bytes == {"between the phases": 1, "training": 40, "evaluation": 300}


def test_the_table_has_every_phase_and_the_ratios(capsys):
    from rich.console import Console

    found = {
        "fo-peft": {"phases": {"load": 100 * 2**20, "training": 200 * 2**20}, "kernels_bytes": 0},
        "hybrid": {"phases": {"load": 90 * 2**20, "training": 230 * 2**20}, "kernels_bytes": 2**20},
    }
    whole_run.show(found, Console(width=100))
    shown = capsys.readouterr().out
    assert "load" in shown
    assert "1.150" in shown
    assert "1.145" in shown


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["steps=3"], "--whole-run"),
        (["--whole-run", "nowhere.yaml"], "nowhere.yaml"),
        (["--whole-run", "CONFIG", "stepz=3"], "steps"),
    ],
)
def test_bad_input_is_one_error(config, arguments, words):
    done = CliRunner().invoke(app, ["bench", *(config if a == "CONFIG" else a for a in arguments)])
    assert done.exit_code == 2
    assert words in done.output
