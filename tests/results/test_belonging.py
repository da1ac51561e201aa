"""A folder whose files are of several runs is told apart from a whole one."""

from __future__ import annotations

import json
import shutil

import pytest

from tests.support.run_folders import write_run
from zofo.results.belonging import SEALED, digests_of, mixed_up
from zofo.results.table import read_runs


def seal(folder):
    """Write the digests that a run and its study write."""
    for record, names in (("result.json", SEALED), ("study.json", ["run.yaml"])):
        path = folder / record
        values = json.loads(path.read_text())
        path.write_text(json.dumps(values | {"files": digests_of(folder, names)}))
    return folder


@pytest.fixture
def two(tmp_path):
    """Two runs that differ in a learning rate alone."""
    return [
        seal(write_run(tmp_path / name, base_lr=rate, study={"chosen": True}, dev=(0.7, rate)))
        for name, rate in (("a", 1e-5), ("b", 1e-4))
    ]


@pytest.mark.parametrize("name", ["run.yaml", "metrics.jsonl", "result.json", "study.json"])
def test_the_file_of_another_run(two, name):
    own, other = two
    assert mixed_up(own) is None
    assert list(read_runs(two).table["status"]) == ["done", "done"]
    shutil.copy(other / name, own)
    assert "belongs to another run" in mixed_up(own)
    row = read_runs([own]).table.iloc[0]
    assert row.status == "damaged"
    assert "put the run's own file back" in row.error


@pytest.mark.parametrize("name", ["advise.json", "modules.json", "stopped.json"])
def test_a_record_that_only_some_runs_have(two, name):
    own, other = two
    for folder, step in ((own, 3), (other, 4)):
        (folder / name).write_text(json.dumps({"step": step, "reason": "early_stopping"}))
    assert "result.json does not name it" in mixed_up(own)
    for folder in two:
        assert mixed_up(seal(folder)) is None
    shutil.copy(other / name, own)
    assert "belongs to another run" in mixed_up(own)


@pytest.mark.parametrize("name", ["run.yaml", "result.json", "study.json", "artifact/zofo.json"])
@pytest.mark.parametrize("other", [{"seed": 1}, {"method": "fo-peft"}])
def test_older_folders_are_compared_by_method_and_seed(tmp_path, name, other):
    for run, values in (("own", {}), ("other", other)):
        folder = write_run(tmp_path / run, study={}, **values)
        base = {"seed": values.get("seed", 0)}
        header = {"method": values.get("method", "hybrid"), "base": base}
        (folder / "artifact" / "zofo.json").write_text(json.dumps(header))
    assert mixed_up(tmp_path / "own") is None
    shutil.copy(tmp_path / "other" / name, tmp_path / "own" / name)
    assert "belongs to another run" in mixed_up(tmp_path / "own")


def test_what_is_missing_or_damaged_has_its_own_errors(two):
    own = two[0]
    (own / "metrics.jsonl").unlink()
    (own / "study.json").write_text("[" * 10_000)
    assert mixed_up(own) is None
    (own / "run.yaml").write_text("seed: [")
    assert mixed_up(own) is None
    shutil.rmtree(own)
    assert mixed_up(own) is None
