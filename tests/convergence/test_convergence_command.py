"""Tests of `zofo convergence` as a user runs it, with small experiments."""

import json
import re

import numpy as np
import pytest
from typer.testing import CliRunner

from zofo.cli.app import app
from zofo.convergence import cells as storage
from zofo.convergence.experiments.table import CLAIMS, EXPERIMENTS, FULL, QUICK
from zofo.convergence.plan import make_plan

runner = CliRunner()


def convergence(*arguments):
    return runner.invoke(app, ["convergence", *map(str, arguments)])


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("study")
    done = convergence("growth", "estimate", "--quick", "--seeds", 4, "--to", folder)
    assert done.exit_code == 0, done.output
    return folder


def test_json_has_every_claim_with_interval_and_verdict(folder):
    found = json.loads((folder / "convergence.json").read_text())
    names = [claim["name"] for claim in found["claims"]]
    assert names == [c.name for c in CLAIMS if c.experiment in ("growth", "estimate")]
    for claim in found["claims"]:
        assert claim["outcome"] in ("confirmed", "refuted", "undecided at this scale")
        assert claim["reason"]
        assert claim["series"][0]["x"]
    assert found["scale"]["num_seeds"] == 4
    assert "torch" in found["environment"]["packages"]


def test_known_answers_hold_even_when_cut_down(folder):
    """The quick experiments already show the known answers.

    The error of a difference is an exact power of eps, and the size of an estimate on a quadratic
    grows as d (d + 2)(d + 4).
    """
    found = json.loads((folder / "convergence.json").read_text())
    claims = {claim["name"]: claim for claim in found["claims"]}
    assert claims["error-forward"]["measured"]["value"] == pytest.approx(1, abs=0.05)
    assert claims["error-central"]["measured"]["value"] == pytest.approx(2, abs=0.05)
    size = claims["size-in-dimension"]["series"][0]
    exact = [0.1**2 / 4 * d * (d + 2) * (d + 4) for d in size["x"]]
    assert size["y"] == pytest.approx(exact, rel=0.25)


def test_the_page_is_one_file_with_every_claim(folder):
    page = (folder / "convergence.html").read_text()
    assert "default-src 'none'" in page
    markup = re.sub(r"<script.*?</script>", "", page, flags=re.S)
    assert not re.findall(r'(?:src|href)="https?://', markup)
    for claim in CLAIMS:
        if claim.experiment == "growth":
            assert claim.statement.split(":")[0] in page
    data = re.search(r'<script type="application/json" id="data">(.*?)</script>', page, re.S)
    figures = json.loads(data[1])["figures"]
    assert figures.keys() == {"light", "dark"}
    assert set(figures["light"]) == {"growth", "estimate", "exponents"}
    assert len(figures["light"]["growth"]) == 2


def test_finished_cells_are_not_run_again(folder, monkeypatch):
    before = (folder / "convergence.json").read_text()
    monkeypatch.setattr(storage, "finish", lambda *args: pytest.fail("ran a cell again"))
    done = convergence("growth", "estimate", "--quick", "--seeds", 4, "--to", folder)
    assert done.exit_code == 0, done.output
    claims = [
        json.loads(text)["claims"] for text in (before, (folder / "convergence.json").read_text())
    ]
    assert claims[0] == claims[1]


def test_an_interrupted_study_goes_on(tmp_path, monkeypatch):
    finish, num = storage.finish, 0

    def stop_at_third(*args):
        nonlocal num
        num += 1
        if num == 3:
            raise KeyboardInterrupt
        return finish(*args)

    arguments = ("growth", "--quick", "--seeds", 3, "--to", tmp_path)
    monkeypatch.setattr(storage, "finish", stop_at_third)
    stopped = convergence(*arguments)
    assert stopped.exit_code == 130
    assert "the same command goes on" in stopped.output + (stopped.stderr or "")
    assert len(list((tmp_path / "cells").iterdir())) == 2
    assert convergence(*arguments).exit_code == 0
    assert num == 3 + 4


def test_a_cell_of_another_definition_or_a_damaged_one_is_run_again(tmp_path):
    cell = make_plan(tmp_path, ["growth"], quick=True, num_seeds=3).cells()[0]
    storage.finish(tmp_path, cell, "compiled")
    assert storage.read(tmp_path, cell, "compiled") is not None
    assert storage.read(tmp_path, cell, "optimizer") is None
    other = make_plan(tmp_path, ["growth"], quick=True, num_seeds=4).cells()[0]
    assert storage.read(tmp_path, other, "compiled") is None
    # Cells with different definitions are stored side by side.
    storage.finish(tmp_path, other, "compiled")
    assert storage.read(tmp_path, cell, "compiled") is not None
    storage.path_of(tmp_path, cell, "compiled").write_bytes(b"damaged")
    assert storage.read(tmp_path, cell, "compiled") is None


def test_the_optimizer_engine_gives_the_same_cell(tmp_path):
    plan = make_plan(tmp_path, ["zeroth"], quick=True, num_seeds=3)
    cell = plan.cells()[0]
    small = type(cell)(
        **{
            **vars(cell),
            "checkpoints": (1, 2),
            "num_seeds": 1,
            "rates": storage.Rates(-6, -5, 1),
        }
    )
    fast, slow = small.run("compiled"), small.run("optimizer")
    for name in fast:
        assert np.allclose(fast[name], slow[name], rtol=1e-10)


@pytest.mark.parametrize("scale", [QUICK, FULL], ids=["quick", "full"])
def test_cells_have_names_of_their_own_and_every_claim_has_cells(scale):
    cells = [cell for experiment in EXPERIMENTS for cell in experiment.build(scale)]
    assert len({cell.name for cell in cells}) == len(cells)
    assert {claim.experiment for claim in CLAIMS} == {experiment.name for experiment in EXPERIMENTS}


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("ordre",), "did you mean 'order'"),
        (("--engine", "fast"), "choose one of compiled, optimizer"),
        (("--seeds", "2"), "at least 3"),
    ],
)
def test_wrong_input_is_said_before_anything_runs(arguments, said, tmp_path):
    done = convergence(*arguments, "--to", tmp_path / "none")
    assert done.exit_code == 2
    assert said in done.output + (done.stderr or "")
    assert not (tmp_path / "none").exists()


def test_a_folder_that_cannot_be_written_is_said_before_anything_runs(tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setattr(storage, "finish", lambda *args: pytest.fail("ran a cell"))
    done = convergence("growth", "--quick", "--to", tmp_path / "file" / "study")
    assert done.exit_code == 2
    assert "is a file" in done.output + (done.stderr or "")


def test_the_list_of_experiments():
    done = convergence("--list")
    assert done.exit_code == 0
    assert all(experiment.name in done.output for experiment in EXPERIMENTS)
