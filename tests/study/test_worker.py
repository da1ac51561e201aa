"""Tests of workers on runs that take milliseconds.

They cover ends, failures, signals, kills, and two workers at once.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import sys
import time
from pathlib import Path

import psutil
import pytest

from tests.support.forks import context
from tests.support.tiny_study import num_ended, results, spec_of, write_rows
from zofo.errors import UserError
from zofo.study.grid import expand
from zofo.study.jobs import all_tasks
from zofo.study.process import Child
from zofo.study.progress import Costs, summarize
from zofo.study.queue import queue_of
from zofo.study.records import StudyFolder
from zofo.study.worker import Worker

FAKE = (sys.executable, "-S", "-E", str(Path(__file__).with_name("fake_run.py")))
LARGE = {
    "seeds": [0, 1, 2],
    "methods": ["hybrid", "fo-peft", "zo-ft"],
    "adapters": ["lora", "prompt"],
    "rates": [{"base_lr": [1e-5, 1e-4], "adapter_lr": [1e-3, 1e-2]}],
}
"""A study of five cells, 14 search runs, 10 runs of other seeds, 3 starts, and 15 tests."""


@pytest.fixture(scope="module", autouse=True)
def _fake_runs():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Child, "program", FAKE)
        patch.setenv("FAKE_STEP_S", "0")
        yield


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    """Return a function that expands the study for a folder."""
    rows = write_rows(tmp_path_factory.mktemp("rows"))

    def in_folder(folder, **changes):
        folder.mkdir(exist_ok=True)
        return expand(spec_of(folder, "some/model", rows, **changes))

    return in_folder


@pytest.fixture
def make(study, tmp_path):
    return lambda **changes: study(tmp_path / "one", **changes)


@pytest.fixture(scope="module")
def whole(study, tmp_path_factory):
    """Return the folder of a study that nothing disturbed."""
    folder = tmp_path_factory.mktemp("whole")
    Worker(study(folder), 2).run()
    return folder


@pytest.fixture(scope="module")
def whole_large(study, tmp_path_factory):
    folder = tmp_path_factory.mktemp("large")
    Worker(study(folder, **LARGE), 2).run()
    return folder


def _work(grid, num_slots, step_s, options):
    """Run a worker in this process. It handles signals as in `zofo study`."""
    os.environ["FAKE_STEP_S"] = str(step_s)
    Child.program = FAKE
    worker = Worker(grid, num_slots, **options)
    worker.run()
    sys.exit(0 if worker.signum is None else 128 + worker.signum)


def start(grid, num_slots=2, step_s=0.01, **options):
    process = context().Process(target=_work, args=(grid, num_slots, step_s, options))
    process.start()
    return process


def wait_for(condition, process, limit_s=120):
    end = time.monotonic() + limit_s
    while not condition():
        if not process.is_alive():
            return False
        assert time.monotonic() < end, "no progress"
        time.sleep(0.005)
    return True


def kill_all(process):
    """Send SIGKILL to the worker and all its children. Return whether the worker was alive."""
    if not process.is_alive():
        return False
    for member in [psutil.Process(process.pid), *psutil.Process(process.pid).children(True)]:
        try:
            member.kill()
        except psutil.NoSuchProcess:
            continue
    process.join()
    return process.exitcode == -signal.SIGKILL


def num_measured(folder):
    return {p.parent.name: len(p.read_text().splitlines()) for p in folder.glob("runs/*/measured")}


def test_a_study_ends_with_test_scores_of_chosen_runs_only(whole):
    found = results(whole)["runs"]
    assert [run["id"] for run in found] == sorted(run["id"] for run in found)
    assert len(found) == 4 + 2
    for cell in ("hybrid", "fo-peft"):
        runs = [run for run in found if run["cell"]["method"] == cell]
        search = [run for run in runs if run["stage"] == "search"]
        best = min(search, key=lambda run: run["dev"]["loss"])
        assert [r["chosen"] for r in search] == [r["rates"] == best["rates"] for r in search]
        chosen = [run for run in runs if run["chosen"]]
        assert sorted(run["seed"] for run in chosen) == [0, 1]
        assert {str(run["rates"]) for run in chosen} == {str(best["rates"])}
        for run in runs:
            assert (run["test"] is not None) == run["chosen"]
    folder = whole / "study"
    assert num_measured(folder) == {run["id"]: 1 for run in found if run["chosen"]}
    for run in found:
        kept = {p.name for p in (folder / "runs" / run["id"]).iterdir() if p.is_dir()}
        assert kept == ({"artifact"} if run["chosen"] else set())
    choices = json.loads((folder / "selection.json").read_text())
    assert [choice["cell"]["method"] for choice in choices] == ["fo-peft", "hybrid"]


def test_starting_again(make, tmp_path, whole):
    """A second start repeats nothing, runs again what was lost, and adds runs for new seeds."""
    place, first = tmp_path / "one", results(whole)
    (tmp_path / "one").mkdir()
    shutil.copytree(whole / "study", place / "study")
    before = {p: p.stat().st_mtime_ns for p in (place / "study/runs").rglob("*")}
    Worker(make()).run()
    assert before == {p: p.stat().st_mtime_ns for p in (place / "study/runs").rglob("*")}
    (place / "study" / "study.db").unlink()
    shutil.rmtree(next((place / "study/runs").glob("*fo-peft*_s1")))
    Worker(make()).run()
    assert results(place) == first
    for changes, words in (({"steps": 5}, "steps: 4 -> 5"), ({"seeds": [1, 0]}, "seeds")):
        with pytest.raises(UserError, match=words):
            Worker(make(**changes)).run()
    Worker(make(seeds=[0, 1, 2]), 2).run()
    second = results(place)["runs"]
    assert [run for run in second if run["seed"] < 2] == first["runs"]
    assert [run["test"] is not None for run in second if run["seed"] == 2] == [True, True]


def test_a_folder_of_something_else_is_refused(make, tmp_path):
    grid = make()
    (tmp_path / "one" / "study").mkdir()
    (tmp_path / "one" / "study" / "letters.txt").write_text("dear")
    with pytest.raises(UserError, match="is no study"):
        Worker(grid).run()


@pytest.mark.parametrize(("rate", "status"), [(13.0, "failed"), (17.0, "stopped")])
def test_runs_that_fail_or_stop_are_recorded_and_lose(make, tmp_path, rate, status):
    grid = make(rates=[{"base_lr": [1e-4], "adapter_lr": [1e-3, rate]}], methods=["hybrid"])
    Worker(grid, 2).run()
    first = results(tmp_path / "one")
    # This is the state after a kill that came when the runs had ended and nothing was recorded yet.
    for path in (tmp_path / "one/study/runs").glob("*/study.json"):
        path.unlink()
    Worker(grid, 2).run()
    assert results(tmp_path / "one") == first
    bad, good = sorted(
        (r for r in results(tmp_path / "one")["runs"] if r["stage"] == "search"),
        key=lambda run: -run["rates"]["adapter_lr"],
    )
    assert (good["status"], good["chosen"], bad["chosen"]) == ("done", True, False)
    assert (bad["status"], bad["dev"], bad["test"]) == (status, None, None)
    said = {
        "failed": "exit code 2: reading\nerror: no such thing",
        "stopped": "stopped at step 2",
    }
    assert bad["error"] == said[status]
    folder = StudyFolder(grid)
    folder.choices()
    summary = summarize(folder, Costs(grid), all_tasks(grid))
    counts = {"done": 1, "running": 0, "failed": 0, "stopped": 0, "open": 0} | {status: 1}
    assert summary.counts["search"] == counts
    assert summary.num_open == 0
    assert len(summary.failed) == (status == "failed")


def test_a_cell_whose_every_rate_fails_has_none(make, tmp_path):
    grid = make(rates=[{"base_lr": [1e-4], "adapter_lr": [13.0]}])
    Worker(grid, 2).run()
    found = results(tmp_path / "one")["runs"]
    assert [run["status"] for run in found] == ["failed"] * 2
    assert not list((tmp_path / "one/study/untrained").glob("*/test.json"))
    folder = StudyFolder(grid)
    folder.choices()
    assert summarize(folder, Costs(grid), all_tasks(grid)).num_unchosen == 2


def test_what_failed_is_tried_again_if_asked(make, tmp_path, monkeypatch, whole):
    text = Path(FAKE[-1]).read_text().replace('"13.0"', '"0.01"')
    broken = tmp_path / "broken.py"
    broken.write_text(text.replace('("zofo.study.measure", "run")', '"nothing"'))
    monkeypatch.setattr(Child, "program", (*FAKE[:-1], str(broken)))
    Worker(make(), 2).run()
    found = results(tmp_path / "one")["runs"]
    assert {run["status"] for run in found if run["rates"]["adapter_lr"] == 0.01} == {"failed"}
    chosen = [run for run in found if run["chosen"]]
    assert all("AssertionError" in run["test_error"] for run in chosen)
    monkeypatch.setattr(Child, "program", FAKE)
    Worker(make()).run()
    assert results(tmp_path / "one")["runs"] == found
    Worker(make(), 2).run(retry_failed=True)
    again = {run["id"]: run for run in results(tmp_path / "one")["runs"]}
    for run in results(whole)["runs"]:
        assert again[run["id"]] == run


def test_a_run_that_is_killed_goes_on(make, tmp_path, whole):
    process = start(make(), 1, step_s=0.2)
    folder = tmp_path / "one" / "study" / "runs"
    assert wait_for(lambda: list(folder.glob("*/checkpoint-2")), process)
    (child,) = psutil.Process(process.pid).children()
    child.kill()
    process.join(300)
    assert process.exitcode == 0
    assert results(tmp_path / "one") == results(whole)


def test_a_run_that_dies_over_and_over_has_failed(make, tmp_path, monkeypatch):
    text = Path(FAKE[-1]).read_text().replace("    asked = []", "    os.kill(os.getpid(), 9)")
    (tmp_path / "dying.py").write_text(text)
    monkeypatch.setattr(Child, "program", (*FAKE[:-1], str(tmp_path / "dying.py")))
    Worker(make(methods=["fo-peft"], rates=[{"adapter_lr": [1e-3]}], seeds=[0])).run()
    (run,) = results(tmp_path / "one")["runs"]
    assert (run["status"], run["error"]) == ("failed", "killed by signal 9")


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM], ids=["ctrl-c", "sigterm"])
def test_a_signal_stops_the_runs_with_checkpoints(make, tmp_path, signum, whole):
    grid = make()
    process = start(grid, 2, step_s=0.3)
    runs = tmp_path / "one" / "study" / "runs"
    assert wait_for(lambda: len(list(runs.glob("*/checkpoint-1"))) >= 2, process)
    children = psutil.Process(process.pid).children()
    os.kill(process.pid, signum)
    process.join(60)
    assert process.exitcode == 128 + signum
    assert not any(child.is_running() for child in children)
    assert len(list(runs.glob("*/asked"))) == 2  # The runs ended by themselves.
    assert num_ended(tmp_path / "one") == 0
    Worker(grid, 2).run()  # The trials were given back, so the next worker starts at once.
    assert results(tmp_path / "one") == results(whole)


@pytest.mark.parametrize(
    ("name", "wanted"),
    [
        ("whole", (0, 2, 4)),
        pytest.param("whole_large", (0, 4, 13, 19, 24), marks=pytest.mark.slow),
    ],
)
def test_killed_again_and_again_and_continued(make, tmp_path, request, name, wanted):
    left_alone = request.getfixturevalue(name)
    assert len(results(left_alone)["runs"]) == {"whole": 6, "whole_large": 24}[name]
    grid = make(**(LARGE if name == "whole_large" else {}))
    dice, killed = random.Random(0), 0
    for num in wanted:
        process = start(grid, 2, step_s=0.02)
        wait_for(lambda num=num: num_ended(tmp_path / "one") >= num, process)
        time.sleep(dice.uniform(0, 0.1))
        killed += kill_all(process)
    assert killed >= 2
    Worker(grid, 2).run()
    assert not (tmp_path / "one" / "study" / "violation").exists()
    assert results(tmp_path / "one") == results(left_alone)


def test_a_study_that_another_worker_begins_or_did_not_come_to_begin(make, tmp_path, whole):
    """A worker can start where another one has only taken the lock and written no study.yaml."""
    place = tmp_path / "one" / "study"
    for name in ("locks", "configs"):
        (place / name).mkdir(parents=True)
    (place / "locks" / "begin").touch()
    Worker(make(), 2).run()
    assert results(tmp_path / "one") == results(whole)


def test_a_task_that_the_study_lacks_is_left_to_others(make):
    grid = make(methods=["fo-peft"], rates=[{"adapter_lr": [1e-3]}])
    folder = StudyFolder(grid)
    folder.begin()
    queue = queue_of(grid.spec)
    queue.fill(["search of another study"])
    Worker(grid, 2).run()
    assert list(queue.waiting()) == ["search of another study"]
    queue.close()


def test_three_workers_begin_at_once_and_one_is_killed(make, tmp_path, whole):
    grid = make()
    workers = [start(grid, 1, step_s=0.02, heartbeat_s=1) for _ in range(3)]
    assert wait_for(lambda: num_ended(tmp_path / "one") >= 2, workers[0])
    # The worker's child ends by itself, and another worker continues its run.
    os.kill(workers[0].pid, signal.SIGKILL)
    for worker in workers:
        worker.join(300)
    assert [worker.exitcode for worker in workers] == [-signal.SIGKILL, 0, 0]
    folder = tmp_path / "one" / "study"
    assert not (folder / "violation").exists()
    assert results(tmp_path / "one") == results(whole)
    assert set(num_measured(folder)) == set(num_measured(whole / "study"))
