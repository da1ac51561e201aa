"""Tests of the choice of rates: known answers, and what the choice must not depend on."""

import itertools
import json
import random

import pytest

from tests.support.tiny_study import spec_of, write_rows
from zofo.errors import UserError
from zofo.study.grid import Pair, Run, expand
from zofo.study.records import StudyFolder
from zofo.study.select import DevScore, choose

LOW, HIGH = Pair(1e-4, 1e-3), Pair(1e-4, 1e-2)


@pytest.fixture
def grid(tmp_path):
    changes = {"methods": ["hybrid"], "select_seeds": [0, 1], "seeds": [0, 1, 2]}
    return expand(spec_of(tmp_path, "some/model", write_rows(tmp_path), **changes))


def choice_of(grid, scores):
    """Return the chosen rates.

    `scores` holds the dev losses of the low and of the high rates, by seed.
    """
    (cell,) = grid.rates
    given = [
        DevScore(cell, pair, seed, score)
        for pair, row in zip((LOW, HIGH), scores, strict=True)
        for seed, score in enumerate(row)
    ]
    random.Random(0).shuffle(given)
    found = choose(grid, given)
    return found[cell].rates if cell in found else "open"


@pytest.mark.parametrize(
    ("scores", "chosen"),
    [
        ([(0.5, 0.5), (0.4, 0.5)], HIGH),
        ([(0.5, 0.4), (0.4, 0.5)], LOW),  # A tie goes to the smaller rates.
        ([(0.9, 0.9), (0.1, None)], LOW),  # A pair with a failed run loses.
        ([(float("nan"), 0.1), (0.9, 0.9)], HIGH),
        ([(float("inf"), 0.1), (0.9, 0.9)], HIGH),
        ([(None, 0.1), (0.1, None)], None),
        ([(0.5, 0.5), (0.4,)], "open"),  # The search has not ended.
        ([(), ()], "open"),
    ],
)
def test_known_answers(grid, scores, chosen):
    assert choice_of(grid, scores) == chosen


def test_the_order_in_which_runs_end_does_not_matter(grid):
    (cell,) = grid.rates
    scores = [
        DevScore(cell, pair, seed, value)
        for pair, seed, value in ((LOW, 0, 0.1), (LOW, 1, 0.3), (HIGH, 0, 0.3), (HIGH, 1, 0.1))
    ]
    found = {choose(grid, order)[cell].rates for order in itertools.permutations(scores)}
    assert found == {LOW}


def write_run(folder, run, loss, status="done", **result):
    folder.run_folder(run).mkdir(parents=True)
    dev = {"after": {"loss": loss, "accuracy": loss}}
    values = {"dev": dev, "cost": {"steps": 4, "forward_equivalents": 12, "total_s": 1.0}}
    (folder.run_folder(run) / "result.json").write_text(json.dumps({**values, **result}))
    folder.ended(run, status, None, is_final=False)


@pytest.mark.parametrize(
    ("by", "chosen"), [("loss", LOW), ("accuracy", HIGH)], ids=["loss", "accuracy"]
)
def test_by_loss_or_accuracy(tmp_path, by, chosen):
    changes = {"methods": ["hybrid"], "select_by": by, "base": {"select_by": by}}
    grid = expand(spec_of(tmp_path, "some/model", write_rows(tmp_path), **changes))
    folder = StudyFolder(grid)
    for run, loss in zip(grid.search, (0.3, 0.4), strict=True):
        write_run(folder, run, loss)
    (choice,) = folder.choices().values()
    assert choice.rates == chosen
    assert [folder.record(run)["chosen"] for run in grid.search] == [
        run.rates == chosen for run in grid.search
    ]


def test_test_scores_cannot_change_a_choice(tmp_path, grid, monkeypatch):
    (cell,) = grid.rates
    folder = StudyFolder(grid)
    for run in grid.search:  # The rates that are better on dev are worse on test.
        dev = 0.3 if run.rates == LOW else 0.4
        write_run(folder, run, dev, test={"after": {"loss": 1 - dev, "accuracy": dev}})
    folder.start_folder("tiny", "reviews", 0).mkdir(parents=True)
    real, parsed = json.loads, []

    def loads(text, **options):
        parsed.append(text)
        return real(text, **options)

    monkeypatch.setattr(json, "loads", loads)
    assert StudyFolder(grid).choices()[cell].rates == LOW
    assert parsed
    assert not any('"test"' in text for text in parsed)  # Only result.json holds test scores.
    monkeypatch.undo()
    for run in grid.search:
        record = json.loads((folder.run_folder(run) / "study.json").read_text())
        assert record.pop("test_error") is None
        assert "test" not in json.dumps(record)
    (folder.run_folder(run) / "result.json").write_text("no JSON")
    with pytest.raises(UserError, match=r"result\.json was altered"):
        StudyFolder(grid).choices()


def test_a_choice_names_the_runs_of_the_other_seeds(tmp_path, grid):
    (cell,) = grid.rates
    folder = StudyFolder(grid)
    assert folder.final_run(cell, 2) is None
    for run in grid.search:
        write_run(folder, run, 0.3 if run.rates == HIGH else 0.4)
    folder.choices()
    assert folder.final_run(cell, 2) == Run(cell, HIGH, 2)
    assert [run.id for run in folder.known_runs()][-1].endswith("_b1e-4_a1e-2_s2")
