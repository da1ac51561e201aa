"""A database that is lost while a worker works, and files of a study that are something else."""

from __future__ import annotations

import sqlite3
import time

import pytest

from tests.study.test_queue import open_queue, postgres, url  # noqa: F401
from tests.study.test_worker import FAKE
from tests.support.tiny_study import results, spec_of, write_rows
from zofo.errors import UserError
from zofo.study.grid import expand
from zofo.study.process import Child
from zofo.study.worker import Worker


@pytest.fixture(scope="module", autouse=True)
def _fake_runs():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Child, "program", FAKE)
        patch.setenv("FAKE_STEP_S", "0")
        yield


@pytest.fixture
def grid(tmp_path, rows):
    return expand(
        spec_of(tmp_path, "some/model", rows, methods=["fo-peft"], rates=[{"adapter_lr": [1e-3]}])
    )


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    return write_rows(tmp_path_factory.mktemp("rows"))


def remove(path):
    path.unlink()


def empty(path):
    path.write_bytes(b"")


def overwrite(path):
    path.write_bytes(b"no database" * 1000)


def replace(path):
    other = path.with_name("other.db")
    with sqlite3.connect(other) as connection:
        connection.execute("CREATE TABLE mine (x)")
    connection.close()
    other.replace(path)


def drop(*tables):
    def sabotage(path):
        connection = sqlite3.connect(path, timeout=60)
        for table in tables:
            connection.execute(f"DROP TABLE {table}")
        connection.commit()
        connection.close()

    sabotage.__name__ = "_".join(("drop", *tables))
    return sabotage


class Saboteur:
    """Stands for the display: acts when the first run has ended."""

    def __init__(self, act):
        self.act, self.at = act, None

    def ended(self, worker, job):
        if self.at is None:
            self.at = time.monotonic()
            self.act(worker.folder.path / "study.db")

    def __getattr__(self, name):
        return lambda *_: None


LOSSES = (
    remove,
    empty,
    overwrite,
    replace,
    drop("trials"),
    drop("trial_user_attributes"),
    drop("studies"),
)


@pytest.mark.parametrize("act", LOSSES, ids=[act.__name__ for act in LOSSES])
def test_a_worker_says_that_the_database_is_lost_and_ends(grid, tmp_path, act):
    saboteur = Saboteur(act)
    with pytest.raises(UserError, match=r"database was lost \(.*Start the study again"):
        Worker(grid, 1, saboteur).run()
    assert time.monotonic() - saboteur.at < 30
    if act not in (remove, overwrite, LOSSES[-1]):
        return
    Worker(grid, 2).run()
    found = results(tmp_path)["runs"]
    assert [run["status"] for run in found] == ["done"] * 2
    assert all(run["test"] is not None for run in found)


def test_a_queue_tells_what_is_lost_from_what_may_come_back(open_queue):  # noqa: F811
    from sqlalchemy import text

    queue = open_queue()
    queue.fill(["a"])
    assert queue.loss() is None
    with queue._storage.engine.begin() as connection:
        connection.execute(text("UPDATE studies SET study_name = 'another'"))
    assert queue.loss() == "it no longer holds this study"
    with queue._storage.engine.begin() as connection:
        connection.execute(text("DROP TABLE trial_heartbeats"))
        connection.execute(text("UPDATE studies SET study_name = :n"), {"n": queue._name})
    assert "trial_heartbeats" in queue.loss()


def folder_for(path):
    if path.exists():
        path.unlink()
    path.mkdir(parents=True)


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("study.id", b"\xff\xfe\x00\x01", r"study\.id is damaged"),
        ("study.id", b"", r"study\.id is damaged"),
        ("study.id", b"x" * 5000, r"study\.id is damaged"),
        ("study.id", b"a\nb\x07", r"study\.id is damaged"),
        ("study.id", None, r"study\.id is damaged"),
        ("study.db", None, r"study\.db cannot be used"),
        ("locks/begin", None, "begin cannot be taken"),
        ("locks/results", None, "results cannot be taken"),
        ("locks/digests", None, "digests cannot be taken"),
    ],
)
def test_files_of_a_study_that_are_something_else(grid, tmp_path, name, content, words):
    path = tmp_path / "study" / name
    path.parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / "study" / "study.yaml").write_text(grid.spec.to_yaml())
    if content is None:
        folder_for(path)
    else:
        path.write_bytes(content)
    with pytest.raises(UserError, match=words):
        Worker(grid, 1).run()


def test_a_lock_of_a_run_that_is_a_folder(grid, tmp_path):
    folder_for(tmp_path / "study" / "locks" / grid.search[0].id)
    (tmp_path / "study" / "study.yaml").write_text(grid.spec.to_yaml())
    with pytest.raises(UserError, match=r"cannot be taken \(Is a directory\); make its folder"):
        Worker(grid, 1).run()


def test_a_result_of_another_kind_is_no_end_of_a_run(grid, tmp_path):
    """A run whose worker was killed before it recorded the end."""
    Worker(grid, 2).run()
    first = results(tmp_path)
    for run in (tmp_path / "study" / "runs").glob("*_s0"):
        (run / "study.json").unlink()
        (run / "result.json").write_text("[1]")
    Worker(grid, 2).run()
    assert results(tmp_path) == first
