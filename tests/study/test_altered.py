"""Files of a study that were altered, exchanged, lost or replaced after it had recorded them."""

from __future__ import annotations

import json
import shutil

import pytest
from typer.testing import CliRunner

from tests.study.test_worker import FAKE
from tests.support.tiny_study import spec_of, write_rows
from zofo.cli.app import app
from zofo.disk.recorded import record_files
from zofo.errors import UserError
from zofo.results.table import read_runs
from zofo.study.grid import expand
from zofo.study.measure import main as measure
from zofo.study.process import Child
from zofo.study.spec import load_spec
from zofo.study.worker import Worker


@pytest.fixture(scope="module", autouse=True)
def _fake_runs():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Child, "program", FAKE)
        patch.setenv("FAKE_STEP_S", "0")
        yield


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole")
    rows = write_rows(tmp_path_factory.mktemp("rows"))
    grid = expand(spec_of(folder, "some/model", rows))
    Worker(grid, 2).run()
    return folder / "study"


@pytest.fixture
def study(whole, tmp_path):
    shutil.copytree(whole, tmp_path / "study")
    return tmp_path / "study"


def again(study, **options):
    Worker(expand(load_spec(study)), **options).run(retry_failed=True)


def edit(path, **changes):
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def other_loss(study, run):
    dev = json.loads((study / "runs" / run / "study.json").read_text())["dev"]
    edit(study / "runs" / run / "study.json", dev=dev | {"loss": 0.0})


def other_test(study, run):
    edit(study / "runs" / run / "result.json", test={"before": {}, "after": {"accuracy": 1.0}})


def anothers_record(study, run):
    other = next(p for p in (study / "runs").glob("*/study.json") if p.parent.name != run)
    shutil.copy(other, study / "runs" / run / "study.json")


def a_list(study, run):
    (study / "runs" / run / "result.json").write_text("[1, 2]")


def other_rate(study, run):
    path = study / "runs" / run / "run.yaml"
    path.write_text(path.read_text().replace("adapter_lr:", "adapter_lr: 1 #"))


def no_result(study, run):
    (study / "runs" / run / "result.json").unlink()


ALTERED = [
    (other_loss, "study.json"),
    (other_test, "result.json"),
    (anothers_record, "study.json"),
    (a_list, "result.json"),
    (other_rate, "run.yaml"),
    (no_result, "result.json"),
]


@pytest.mark.parametrize(("alter", "name"), ALTERED, ids=[a.__name__ for a, _ in ALTERED])
def test_what_was_altered_is_named_and_counts_no_more(study, alter, name):
    before = read_runs([study]).table.set_index("run")
    assert set(before["status"]) == {"done"}
    run = before.index[before["chosen"]][0]
    alter(study, run)
    after = read_runs([study]).table.set_index("run")
    assert list(after.index) == list(before.index)
    assert after.loc[run, "status"] == "damaged"
    assert f"{run}/{name} was" in after.loc[run, "error"]
    assert after.loc[run].drop(["status", "error"]).isna().sum() >= 10
    rest = before.index != run
    assert after[rest].equals(before[rest])
    assert read_runs([study / "runs" / run]).table["status"][0] == "damaged"
    cell = before.loc[run, ["method", "adapter"]]
    results = (study / "results.json").read_bytes()
    with pytest.raises(UserError, match=rf"{run}/{name} was .*cell .*{cell['method']}.*put the"):
        again(study)
    done = CliRunner().invoke(app, ["study", str(study), "--status"])
    assert done.exit_code == 2
    assert f"{name} was" in done.stderr
    assert (study / "results.json").read_bytes() == results
    if alter is not other_loss:
        return
    page = study.with_name("page.html")
    said = CliRunner().invoke(app, ["report", str(study), "--to", str(page)]).stdout
    assert "6 runs: 5 done, 1 damaged" in said
    assert f"damaged: {run}: {study}/runs/{run}/{name} was altered" in said
    # As the message says: without its folder, the run is repeated.
    shutil.rmtree(study / "runs" / run)
    assert list(read_runs([study]).table["status"]).count("damaged") == 1
    again(study)
    assert set(read_runs([study]).table["status"]) == {"done"}
    assert json.loads((study / "results.json").read_text())["runs"] == (json.loads(results)["runs"])


def test_the_record_of_another_run_names_its_owner(study):
    """A study of an older version has no digests, but every record names its run."""
    run = next((study / "runs").glob("*_s0")).name
    (study / "zofo_digests.json").unlink()
    anothers_record(study, run)
    assert read_runs([study / "runs" / run]).table["status"][0] == "damaged"
    with pytest.raises(UserError, match=f"study.json belongs to the run .*, and not to {run}; put"):
        again(study)


def test_a_run_whose_folder_became_a_file(study):
    run = next((study / "runs").glob("*_s0"))
    shutil.rmtree(run)
    run.write_text("not a folder")
    table = read_runs([study]).table.set_index("run")
    assert (len(table), table.loc[run.name, "status"]) == (6, "damaged")
    with pytest.raises(UserError, match=rf"{run.name} is no folder.*remove it, and the study"):
        again(study)
    run.unlink()
    again(study)
    assert set(read_runs([study]).table["status"]) == {"done"}


def test_a_study_of_an_older_version_has_no_digests(study):
    (study / "zofo_digests.json").unlink()
    again(study)
    assert set(read_runs([study]).table["status"]) == {"done"}
    path = next((study / "runs").glob("*/study.json"))
    path.write_text("{}")
    with pytest.raises(UserError, match=r"study\.json is damaged.*put the file back"):
        again(study)


@pytest.mark.parametrize("text", ["", "[]", '{"a": 1}', '{"a": [1]}'])
def test_digests_that_are_damaged(study, text):
    (study / "zofo_digests.json").write_text(text)
    for attempt in (again, lambda study: read_runs([study])):
        with pytest.raises(UserError, match=r"zofo_digests\.json is damaged"):
            attempt(study)


def test_scores_of_the_untrained_model_that_were_altered(study, capsys):
    (start,) = (study / "untrained").glob("*_s0/test.json")
    record_files(study, [start])
    start.write_text('{"accuracy": 0}')
    run = next((study / "runs").glob("*_s0"))
    shutil.copy(next((study / "configs").glob("*.yaml")), run / "run.yaml")
    assert measure(["run", str(run), str(start)]) == 2
    assert "test.json was altered" in capsys.readouterr().err
