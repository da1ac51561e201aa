"""Distributes tasks to workers: optuna's storage serves as a queue, with one trial per task.

    WAITING   no worker has the task
    RUNNING   a worker has it
    COMPLETE  the task has ended
    FAIL      its worker died or gave it back, and a new trial of the same task waits

A claim is one transaction of the database. SQLite has no row locks, so its transactions begin with
BEGIN IMMEDIATE; otherwise two workers could read the same waiting trial and both take it. optuna's
own `ask` creates a trial if none waits, so it is not used.

A worker writes heartbeats for the trials that it has claimed. If a heartbeat is too old, or if the
worker ran on this machine and has ended, others may claim the task. Results are stored in files, so
a lost database is filled again.
"""

from __future__ import annotations

import socket
import time
import uuid
import warnings
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import psutil

from zofo.disk.files import read_text, refusing, remove_file, write_text
from zofo.errors import UserError

if TYPE_CHECKING:
    from zofo.study.spec import StudySpec

DATABASE_FILE: Final = "study.db"
_NAME_FILE: Final = "study.id"
"""File of the study's name in the database, which stays valid if the folder is moved."""
HEARTBEAT_S: Final = 20
GRACE_S: Final = 120
"""Choice: a worker without a heartbeat for two minutes has died or lost the database."""
_TASK, _WORKER = "task", "worker"
_MAX_NAME: Final = 512  # characters of a study's name, as optuna's table allows
_NO_DAMAGE: Final = ("locked", "full", "unable to open", "readonly", "I/O")
"""Words of SQLite's errors after which the file may still be whole."""
_ANSWER_S: Final = 60
"""Time that PostgreSQL may take to answer, as for SQLite's lock (choice)."""
_BUSY_TIMEOUT_S: Final = 60
"""Time that a connection waits for SQLite's write lock (choice)."""


class Queue:
    """The tasks of a study.

    Args:
        url: URL of the database, as for SQLAlchemy.
        name: name of the study in the database.
        heartbeat_s: seconds between two heartbeats.
        grace_s: age of a heartbeat, in seconds, at which its worker counts as dead.

    Raises:
        UserError: if the database cannot be reached.
    """

    def __init__(
        self, url: str, name: str, *, heartbeat_s: int = HEARTBEAT_S, grace_s: int = GRACE_S
    ) -> None:
        import optuna
        from sqlalchemy.exc import SQLAlchemyError

        optuna.logging.set_verbosity(optuna.logging.WARNING)
        self._optuna, self._states = optuna, optuna.trial.TrialState
        self._finished_error = optuna.exceptions.UpdateFinishedTrialError
        # Without rows that it expects, optuna raises a KeyError or an AssertionError.
        lost = (KeyError, AssertionError, optuna.exceptions.OptunaError)
        process = psutil.Process()
        host, since = socket.gethostname(), process.create_time()
        self.worker = {"host": host, "pid": process.pid, "since": since}
        self.heartbeat_s = heartbeat_s
        try:
            with warnings.catch_warnings():
                # optuna has called heartbeats "experimental" since 2021.
                warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
                self._storage = optuna.storages.RDBStorage(
                    _with_driver(url),
                    engine_kwargs=_engine_options(url),
                    heartbeat_interval=heartbeat_s,
                    grace_period=grace_s,
                    heartbeat_stale_trial_callback=lambda _, trial: self._add(
                        trial.user_attrs[_TASK]
                    ),
                )
            if url.startswith("sqlite"):
                _begin_immediately(self._storage.engine)
            self._study = optuna.create_study(
                storage=self._storage, study_name=name, load_if_exists=True
            )
        except (*lost, SQLAlchemyError, ImportError, RuntimeError) as error:
            first = (str(error).strip().splitlines() or [repr(error)])[0]
            raise UserError(
                f"the queue's database {_without_password(url)} cannot be used ({first}); start "
                "it, correct storage, or leave it out for a file in the study folder. A damaged "
                f"{DATABASE_FILE} can be removed: it is filled again from the runs"
            ) from error
        self._id, self._name = self._study._study_id, name
        self._url, self._file = _without_password(url), self._identity()
        self.errors = (*lost, SQLAlchemyError)

    def close(self) -> None:
        """Close all connections to the database."""
        self._storage.remove_session()
        self._storage.engine.dispose()

    def loss(self) -> str | None:
        """How the database was lost, in words; None if it is there or may come back.

        A server that does not answer may come back. Tables, rows and files that are gone do not.
        """
        from sqlalchemy import exc, text

        if self._identity() != self._file:
            return "its file was removed or replaced"
        try:
            with self._storage.engine.connect() as connection:
                query = text("SELECT study_name FROM studies WHERE study_id = :id")
                row = connection.execute(query, {"id": self._id}).first()
                connection.execute(text("SELECT 1 FROM trials, trial_user_attributes LIMIT 1"))
                connection.execute(text("SELECT 1 FROM trial_heartbeats, trial_values LIMIT 1"))
        except exc.SQLAlchemyError as error:
            said = str(getattr(error, "orig", None) or error).strip().splitlines()[0]
            is_away = isinstance(error, exc.OperationalError | exc.InterfaceError)
            if self._file is not None:
                is_away = "locked" in said
            return None if is_away and "does not exist" not in said else said
        is_same = row is not None and row[0] == self._name
        return None if is_same else "it no longer holds this study"

    def _identity(self) -> tuple[int, int] | None:
        """Device and inode of SQLite's file; None for a server, and (0, 0) without a file."""
        path = self._storage.engine.url.database
        if self._storage.engine.dialect.name != "sqlite" or not path:
            return None
        try:
            found = Path(path).stat()
        except OSError:
            return 0, 0
        return found.st_dev, found.st_ino

    def fill(self, tasks: Iterable[str]) -> None:
        """Add the tasks that neither wait nor run.

        Two workers that fill at once would both add the same task, so the caller holds a lock.
        """
        # One query, because a task may go from one of the two states to the other in between.
        present = self._tasks(self._states.WAITING, self._states.RUNNING)
        for task in tasks:
            if task not in present:
                self._add(task)

    def waiting(self) -> dict[str, int]:
        """Waiting task -> its trial, in the order in which they were added."""
        return {task: trial._trial_id for task, trial in self._tasks(self._states.WAITING).items()}

    def claim(self, trial: int) -> bool:
        """Take a trial; False if another worker was faster."""
        # Heartbeat and worker are written before the claim, so that every claimed trial has both.
        # The worker already holds the lock of the run, so no other worker's entry is overwritten.
        try:
            self._storage.record_heartbeat(trial)
            self._storage.set_trial_user_attr(trial, _WORKER, self.worker)
            return self._storage.set_trial_state_values(trial, self._states.RUNNING)
        except self._finished_error:
            return False

    def beat(self, trial: int) -> bool:
        """Write a heartbeat; False if the trial was meanwhile given to others."""
        self._storage.record_heartbeat(trial)
        return bool(self._storage.get_trial(trial).state == self._states.RUNNING)

    def finish(self, trial: int, score: float | None = None) -> None:
        """Mark a task as ended; its dev score only informs readers of the database."""
        values = None if score is None else [score]
        # If others got the task meanwhile, they will see in its files that it has ended.
        with suppress(self._finished_error):
            self._storage.set_trial_state_values(trial, self._states.COMPLETE, values)

    def give_back(self, trial: int) -> None:
        """Let other workers claim the task of a trial."""
        # The error means that another worker has already given the task back.
        with suppress(self._finished_error):
            if self._storage.set_trial_state_values(trial, self._states.FAIL):
                self._add(self._storage.get_trial(trial).user_attrs[_TASK])

    def recover(self) -> None:
        """Let other workers claim the tasks of dead workers."""
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", self._optuna.exceptions.ExperimentalWarning)
            self._optuna.storages.fail_stale_trials(self._study)
        # A worker that died on this machine is found without waiting for its heartbeat to age.
        for trial in self._trials(self._states.RUNNING):
            worker = trial.user_attrs.get(_WORKER)
            if worker is not None and _is_gone(worker):
                self.give_back(trial._trial_id)

    def workers(self) -> dict[str, str]:
        """Running task -> host of its worker."""
        running = self._tasks(self._states.RUNNING)
        return {name: t.user_attrs.get(_WORKER, {}).get("host", "?") for name, t in running.items()}

    def _add(self, task: str) -> None:
        waiting = self._states.WAITING
        trial = self._optuna.trial.create_trial(state=waiting, user_attrs={_TASK: task})
        self._storage.create_new_trial(self._id, template_trial=trial)

    def _trials(self, *states: Any) -> list[Any]:
        return self._storage.get_all_trials(self._id, deepcopy=False, states=states)

    def _tasks(self, *states: Any) -> dict[str, Any]:
        """Task -> its trial, of the trials in the given states."""
        return {t.user_attrs[_TASK]: t for t in self._trials(*states) if _TASK in t.user_attrs}


def queue_of(spec: StudySpec, **options: Any) -> Queue:
    """The queue of a study, in a file of its folder or in the database that `storage` names.

    Raises:
        UserError: if the database cannot be reached.
    """
    folder = Path(spec.output)
    name = folder / _NAME_FILE
    if not name.exists():
        write_text(name, f"{spec.name} {uuid.uuid4()}\n")
    with refusing(f"{name} is damaged", "remove it, and the queue is filled again from the runs"):
        try:
            text = read_text(name).strip()
        except UserError as error:  # which would go on without the remedy
            raise ValueError(str(error)) from error
        if not (text.isprintable() and 0 < len(text) <= _MAX_NAME):
            raise ValueError("it must hold one line of text")
    file = folder / DATABASE_FILE
    try:
        return Queue(spec.storage or f"sqlite:///{file}", text, **options)
    except UserError as error:
        is_damaged = file.is_file() and not any(word in str(error) for word in _NO_DAMAGE)
        if spec.storage is not None or not is_damaged:
            raise
    remove_file(file)  # It is filled again from the runs.
    return Queue(f"sqlite:///{file}", text, **options)


def _is_gone(worker: dict[str, Any]) -> bool:
    """Whether a worker of this machine has ended; False if that is unknown."""
    if worker["host"] != socket.gethostname():
        return False
    try:
        # The system reuses process ids, so the time of creation is compared too.
        return abs(psutil.Process(worker["pid"]).create_time() - worker["since"]) > 1
    except psutil.NoSuchProcess:
        return True
    except psutil.Error:  # access denied, for instance; the worker may be alive
        return False


def _with_driver(url: str) -> str:
    # Without a driver, SQLAlchemy would look for psycopg2, which zofo does not install.
    head, _, rest = url.partition("://")
    return f"postgresql+psycopg://{rest}" if head in ("postgres", "postgresql") else url


def _engine_options(url: str) -> dict[str, Any]:
    if url.startswith("sqlite"):
        return {"connect_args": {"timeout": _BUSY_TIMEOUT_S}}
    options: dict[str, Any] = {"pool_pre_ping": True}  # a server may have closed an idle connection
    # A database in the encoding SQL_ASCII would otherwise answer in bytes.
    encoding = {"client_encoding": "utf8"}
    url = _with_driver(url)
    if url.startswith("postgresql+psycopg:"):
        options["creator"] = _answering(url, encoding)
    elif url.startswith("postgres"):
        options["connect_args"] = encoding
    return options


def _answering(url: str, more: Mapping[str, str]) -> Callable[[], Any]:
    """A function that connects to PostgreSQL; a server that stays silent is an error."""
    import psycopg
    from sqlalchemy import make_url

    class Connection(psycopg.Connection[Any]):
        def wait(self, gen: Any, *args: Any, **kwargs: Any) -> Any:
            try:
                return super().wait(_in_time(gen), *args, **kwargs)
            except _SilentError as error:
                self.pgconn.finish()  # An answer that comes later belongs to no query.
                raise psycopg.OperationalError(str(error)) from error

    parsed = make_url(url)
    arguments, options = parsed.get_dialect()().create_connect_args(parsed)
    options = {"connect_timeout": _ANSWER_S, **more, **options}
    return lambda: Connection.connect(*arguments, **options)


class _SilentError(Exception):
    """The server sends nothing."""


def _in_time(steps: Any) -> Any:
    """A generator of psycopg's, which fails if the server sends nothing for `_ANSWER_S` seconds."""
    heard = time.monotonic()
    ready = None
    while True:
        try:
            wanted = steps.send(ready)
        except StopIteration as end:
            return end.value
        ready = yield wanted
        if ready:
            heard = time.monotonic()
        elif time.monotonic() - heard > _ANSWER_S:
            raise _SilentError(f"the server did not answer for {_ANSWER_S} s")


def _begin_immediately(engine: Any) -> None:
    """Let every transaction take SQLite's write lock when it begins."""
    from sqlalchemy import event

    @event.listens_for(engine, "connect")
    def _connect(connection: Any, _: Any) -> None:
        connection.isolation_level = None  # stops sqlite3 from beginning transactions itself
        # A killed process loses no data. After a power cut, a damaged file can be removed.
        connection.execute("PRAGMA synchronous = OFF")

    @event.listens_for(engine, "begin")
    def _begin(connection: Any) -> None:
        connection.exec_driver_sql("BEGIN IMMEDIATE")

    engine.dispose()  # connections that are already open do not have these listeners


def _without_password(url: str) -> str:
    head, mark, rest = url.partition("://")
    login, at, place = rest.rpartition("@")
    return head + mark + login.partition(":")[0] + at + place
