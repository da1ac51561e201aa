"""Tests of a study's runs that skip the test rows, end early, or are measured later."""

import json
import math
import shutil

import pytest
from rich.console import Console

from tests.support.tiny_study import write_rows
from zofo.cli.train import _show
from zofo.config.load import load_config
from zofo.errors import TrainingStoppedError
from zofo.run.stopping import is_hopeless, is_out_of_patience, stop_reason
from zofo.run.train import train
from zofo.study.measure import main

QUIET = Console(quiet=True)


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    return write_rows(tmp_path_factory.mktemp("rows"))


@pytest.fixture
def run(tmp_path, rows, decoder_folder):
    def begin(name, *more):
        config = load_config(
            overrides=[
                f"model={decoder_folder}",
                "task=classification",
                f"task.train={rows}",
                *("task.num_train=40", "task.num_dev=20", "task.num_test=20"),
                *("steps=6", "eval_every=2", "log_every=1", "batch_size=4", "device=cpu"),
                f"output_dir={tmp_path / name}",
                *more,
            ]
        )
        return train(config, console=QUIET)

    return begin


def result_of(folder):
    return json.loads((folder / "result.json").read_text())


def test_a_run_that_leaves_the_test_rows_alone_is_the_same_run(tmp_path, run, capsys):
    run("with")
    result = run("without", "measure_test=false")
    one, other = result_of(tmp_path / "with"), result_of(tmp_path / "without")
    assert (result.before, result.after) == (None, None)
    assert "test" not in other
    for key in ("best_dev", "best_checkpoint", "dev"):
        assert one[key] == other[key], key
    assert other["dev"]["after"]["loss"] == other["best_dev"]
    _show(result)
    assert "held-out" not in capsys.readouterr().out
    assert "test rows" not in (tmp_path / "without" / "artifact" / "README.md").read_text()

    # A later measurement gives the scores that the other run measured itself.
    folder, start = tmp_path / "without", tmp_path / "start.json"
    assert main(["start", str(folder / "run.yaml"), str(start)]) == 0
    assert main(["run", str(folder), str(start)]) == 0
    assert result_of(folder)["test"] == one["test"]
    assert main(["run", str(tmp_path / "nowhere"), str(start)]) == 2
    assert "error: " in capsys.readouterr().err


def test_dev_scores_are_those_of_the_model_that_is_left(tmp_path, run):
    run("last", "select_best=false", "measure_test=false")
    assert result_of(tmp_path / "last")["dev"]["after"]["step"] == 6


@pytest.mark.parametrize(
    ("loss", "step", "expected"),
    [
        (1.4, 50, False),
        (1.6, 50, True),
        (1.6, 49, False),
        (math.nan, 1, True),
        (math.inf, 1, True),
        (0.2, 100, False),
    ],
)
def test_the_rule(loss, step, expected):
    assert is_hopeless(loss, 1.0, 0.5, step, 100) is expected


def test_a_hopeless_run_ends_at_its_half(tmp_path, run):
    high = ["measure_test=false", "adapter_lr=30", "optimizer=sgd", "max_grad_norm=null"]
    run("on", *high)
    assert stop_reason(tmp_path / "on") is None
    with pytest.raises(TrainingStoppedError, match=r"stopped at step 4.*early_stopping"):
        run("ended", *high, "early_stopping=0.01")
    folder = tmp_path / "ended"
    assert "stopped at step 4" in stop_reason(folder)
    assert not (folder / "result.json").exists()
    steps = [json.loads(x)["step"] for x in (folder / "metrics.jsonl").read_text().splitlines()]
    assert max(steps) == 4
    run("good", "measure_test=false", "early_stopping=0")
    assert result_of(tmp_path / "good")["dev"]["before"]["num_rows"] == 20


@pytest.mark.parametrize(
    ("losses", "patience", "expected"),
    [
        ([3, 2, 1], 1, False),
        ([3, 2, 2], 1, True),  # an equal score is no better one
        ([3, 2, 2.5], 2, False),
        ([3, 2, 2.5, 2.1], 2, True),
        ([3, 2, 2.5, 1.9, 2], 2, False),
        ([3], 1, False),
        ([], 1, False),
        ([math.nan, 1], 1, False),
        ([1, math.nan], 1, True),
    ],
)
def test_patience_counts_evaluations_without_a_better_score(losses, patience, expected):
    history = [{"eval_loss": loss} for loss in losses]
    history.insert(0, {"loss": 0.0})  # a line of training is no evaluation
    found = is_out_of_patience(history, "eval_loss", larger_is_better=False, patience=patience)
    assert found is expected
    negative = [{"eval_accuracy": -loss} for loss in losses]
    ours = is_out_of_patience(negative, "eval_accuracy", larger_is_better=True, patience=patience)
    assert ours is expected


def test_a_run_out_of_patience_is_complete_and_a_resumed_one_makes_no_further_step(tmp_path, run):
    high = ["measure_test=false", "adapter_lr=30", "optimizer=sgd", "max_grad_norm=null"]
    result = run("ended", *high, "steps=20", "patience=1")
    folder = tmp_path / "ended"
    once = result_of(folder)
    assert stop_reason(folder) is None
    assert 4 <= result.cost["steps"] < 20
    losses = [
        entry["eval_loss"]
        for line in (folder / "metrics.jsonl").read_text().splitlines()
        if "eval_loss" in (entry := json.loads(line))
    ]
    assert once["best_dev"] == min(losses[:-1]) <= losses[-1]
    assert once["dev"]["after"]["loss"] == min(losses)
    # As if it had been killed after its last step and before it was saved.
    (folder / "result.json").unlink()
    shutil.rmtree(folder / "artifact")
    again = train(load_config(folder / "run.yaml"), resume=folder, console=QUIET)
    assert again.cost["steps"] == result.cost["steps"]
    twice = result_of(folder)
    for key in ("best_dev", "best_checkpoint", "dev"):
        assert once[key] == twice[key], key
