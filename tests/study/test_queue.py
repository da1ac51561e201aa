"""Two workers never get the same trial, and the trial of a dead worker is given out again."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from pathlib import Path

import pytest

from tests.support.forks import context
from zofo.errors import UserError
from zofo.study.queue import Queue


def binaries():
    """Return the folder of PostgreSQL's programs, or None if it is not installed."""
    found = shutil.which("initdb")
    places = [Path(found).resolve().parent] if found else []
    places += sorted(Path("/usr/lib/postgresql").glob("*/bin"), reverse=True)
    return next((p for p in places if (p / "initdb").exists() and (p / "pg_ctl").exists()), None)


@pytest.fixture(scope="module")
def postgres():
    """Start a server for these tests and return its URL."""
    folder = binaries()
    if folder is None:
        pytest.skip("PostgreSQL (initdb, pg_ctl) is not installed")
    pytest.importorskip("psycopg")
    # pytest's folder does not suit, because another user cannot enter it. The path is short,
    # because the name of a socket must be short.
    data = Path(tempfile.mkdtemp(prefix="zofo-pg-"))
    user = None
    if os.geteuid() == 0:  # The server refuses to run as root.
        try:
            shutil.chown(data, user := "postgres", "postgres")
        except LookupError:
            shutil.rmtree(data)
            pytest.skip("PostgreSQL does not run as root, and there is no user postgres")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]

    def call(program, *arguments):
        subprocess.run(
            [folder / program, "-D", data / "data", *arguments],
            check=True,
            user=user,
            cwd=data,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )

    try:
        call("initdb", "-A", "trust", "-U", "zofo", "--no-sync")
        options = f"-p {port} -k {data} -c listen_addresses=127.0.0.1 -c fsync=off"
        call("pg_ctl", "-w", "-l", data / "log", "-o", options, "start")
        yield f"postgresql://zofo@127.0.0.1:{port}/postgres"
    finally:
        if (data / "data" / "postmaster.pid").exists():
            call("pg_ctl", "-m", "immediate", "stop")
        shutil.rmtree(data, ignore_errors=True)


@pytest.fixture(params=["sqlite", "postgres"])
def url(request, tmp_path):
    if request.param == "sqlite":
        return f"sqlite:///{tmp_path / 'queue.db'}"
    return request.getfixturevalue("postgres")


@pytest.fixture
def open_queue(url, request):
    opened = []

    def another(**options):
        opened.append(Queue(url, request.node.name, **options))
        return opened[-1]

    yield another
    for queue in opened:
        queue.close()


def _take_all(url, name, answers):
    """Claim trials in a process of its own, as long as any trial waits."""
    queue, mine = Queue(url, name), []
    answers.put("ready")
    while waiting := queue.waiting():
        for task, trial in waiting.items():
            if queue.claim(trial):
                mine.append(task)
    queue.close()
    answers.put(mine)


def test_every_task_goes_to_one_worker(url, open_queue, request):
    names = [f"task {i}" for i in range(12)]
    open_queue().fill(names)
    answers = context().Queue()
    arguments = (url, request.node.name, answers)
    workers = [context().Process(target=_take_all, args=arguments) for _ in range(3)]
    for worker in workers:
        worker.start()
    got = [answers.get(timeout=120) for _ in range(6)]
    for worker in workers:
        worker.join()
    assert sorted(t for mine in got if mine != "ready" for t in mine) == sorted(names)


def test_tasks_wait_in_order_and_are_added_once(open_queue):
    queue = open_queue()
    queue.fill(["b", "a"])
    queue.fill(["a", "c"])
    assert list(queue.waiting()) == ["b", "a", "c"]
    assert queue.claim(queue.waiting()["a"])
    queue.fill(["a"])
    assert list(queue.waiting()) == ["b", "c"]
    assert set(queue.workers()) == {"a"}


def test_a_trial_is_claimed_once_and_given_back(open_queue):
    first, second = open_queue(), open_queue()
    first.fill(["a"])
    trial = first.waiting()["a"]
    assert first.claim(trial)
    assert not second.claim(trial)
    first.give_back(trial)
    assert not first.beat(trial)
    again = second.waiting()["a"]
    assert second.claim(again)
    first.give_back(trial)  # This has no effect any more.
    second.finish(again, 0.5)
    second.finish(again)
    assert (second.waiting(), second.workers()) == ({}, {})


def test_a_worker_without_a_heartbeat_loses_its_trial(open_queue):
    lost, other = open_queue(heartbeat_s=1, grace_s=1), open_queue(heartbeat_s=1, grace_s=1)
    other.fill(["a", "b"])
    for trial in lost.waiting().values():
        assert lost.claim(trial)
    kept, left = lost.waiting(), time.monotonic() + 60
    while not (kept := other.waiting()):
        assert time.monotonic() < left
        trials = {t.user_attrs["task"]: t._trial_id for t in other._study.trials}
        assert lost.beat(trials["b"])
        other.recover()
    assert set(kept) == {"a"}
    assert not lost.beat(trials["a"])


def _claim_and_die(url, name):
    queue = Queue(url, name)
    queue.claim(queue.waiting()["a"])
    os.kill(os.getpid(), signal.SIGKILL)


def test_a_killed_worker_of_this_machine_is_missed_at_once(url, open_queue, request):
    queue = open_queue()
    queue.fill(["a", "b"])
    worker = context().Process(target=_claim_and_die, args=(url, request.node.name))
    worker.start()
    worker.join(120)
    assert worker.exitcode == -signal.SIGKILL
    assert set(queue.waiting()) == {"b"}
    mine = queue.waiting()["b"]
    assert queue.claim(mine)
    queue.recover()
    assert set(queue.waiting()) == {"a"}
    assert queue.beat(mine)


def test_two_studies_in_one_database(url, open_queue, request):
    queue, other = open_queue(), Queue(url, f"{request.node.name} other")
    queue.fill(["a"])
    assert other.waiting() == {}
    other.close()


def test_a_database_that_is_not_there():
    pytest.importorskip("psycopg")
    with pytest.raises(UserError, match=r"postgresql://me@127.0.0.1:9/x cannot be used"):
        Queue("postgresql://me:secret@127.0.0.1:9/x", "a")
    with pytest.raises(UserError, match="cannot be used"):
        Queue("sqlite:////nowhere/at/all.db", "a")


def test_a_database_without_an_encoding(postgres):
    import psycopg

    with psycopg.connect(postgres, autocommit=True, client_encoding="utf8") as connection:
        connection.execute(
            "CREATE DATABASE plain ENCODING 'SQL_ASCII' LOCALE 'C' TEMPLATE template0"
        )
    queue = Queue(postgres.replace("/postgres", "/plain"), "étude")
    queue.fill(["a", "é"])
    assert list(queue.waiting()) == ["a", "é"]
    assert queue.loss() is None
    queue.close()
