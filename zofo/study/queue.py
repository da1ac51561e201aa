"""Distributes tasks to workers: optuna's storage serves as a queue, with one trial per task.

    WAITING   nobody works on it           FAIL      its worker died, or gave it back; a new trial
    RUNNING   somebody does                          of the same task waits
    COMPLETE  it has ended

A claim is one transaction of the database. SQLite has no row locks, so its transactions begin with
BEGIN IMMEDIATE; otherwise two workers could read the same waiting trial and both take it. optuna's
own `ask` would create a trial if none waits, so it is not used.

A worker's claims carry its heartbeat. A trial whose heartbeat is old, or whose worker was on this
machine and is gone, is given to others. What a task comes to stands in files; the database can be
lost and is filled again.
"""

from __future__ import annotations

import os
import socket
import uuid
import warnings
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import psutil

from zofo.disk.files import write_text
from zofo.errors import UserError

if TYPE_CHECKING:
    from zofo.study.spec import StudySpec

DATABASE_FILE: Final = "study.db"
_NAME_FILE: Final = "study.id"
"""What the study is called in the database, wherever its folder lies."""
HEARTBEAT_S: Final = 20
GRACE_S: Final = 120
"""Choices: a worker that writes no heartbeat for two minutes has died or lost the database."""
_TASK, _WORKER = "task", "worker"
_BUSY_TIMEOUT_S: Final = 60


class Queue:
    """The tasks of a study.

    Args:
        url: of the database, as for SQLAlchemy.
        name: of the study in it.
        heartbeat_s: seconds from one heartbeat to the next.
        grace_s: age of a heartbeat at which its worker counts as dead.

    Raises:
        UserError: if the database cannot be reached.
    """

    def __init__(
        self, url: str, name: str, *, heartbeat_s: int = HEARTBEAT_S, grace_s: int = GRACE_S
    ) -> None:
        import optuna
        from sqlalchemy.exc import SQLAlchemyError

        optuna.logging.set_verbosity(optuna.logging.WARNING)
        self._optuna = optuna
        self.worker = _this_worker()
        self.heartbeat_s = heartbeat_s
        try:
            with warnings.catch_warnings():
                # Heartbeats have been "experimental" since 2021.
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
        except (SQLAlchemyError, ImportError, RuntimeError) as error:
            first = (str(error).strip().splitlines() or [repr(error)])[0]
            raise UserError(
                f"the queue's database {_without_password(url)} cannot be used ({first}); start "
                "it, correct storage, or leave it out for a file in the study folder. A damaged "
                f"{DATABASE_FILE} can be removed: it is filled again from the runs"
            ) from error
        self._id = self._study._study_id
        self.errors = (optuna.exceptions.StorageInternalError, SQLAlchemyError)

    def close(self) -> None:
        """Let go of the database."""
        self._storage.remove_session()
        self._storage.engine.dispose()

    def fill(self, tasks: Iterable[str]) -> None:
        """Add those tasks that nobody has or waits for. Only one worker may do so at a time."""
        states = self._optuna.trial.TrialState
        trials = self._trials(states.WAITING, states.RUNNING)
        present = {trial.user_attrs.get(_TASK) for trial in trials}
        for task in tasks:
            if task not in present:
                self._add(task)

    def waiting(self) -> dict[str, int]:
        """Task -> its trial, of those that nobody works on; in the order they were added."""
        trials = self._trials(self._optuna.trial.TrialState.WAITING)
        return {t.user_attrs[_TASK]: t._trial_id for t in trials if _TASK in t.user_attrs}

    def claim(self, trial: int) -> bool:
        """Take a trial; False if another worker was faster."""
        # Before the claim, so that no claimed trial is without heartbeat and worker. The lock of
        # the run, which a worker takes first, keeps another's claim from being overwritten.
        try:
            self._storage.record_heartbeat(trial)
            self._storage.set_trial_user_attr(trial, _WORKER, self.worker)
            return self._storage.set_trial_state_values(
                trial, self._optuna.trial.TrialState.RUNNING
            )
        except self._optuna.exceptions.UpdateFinishedTrialError:
            return False

    def beat(self, trial: int) -> bool:
        """Write a heartbeat; False if the trial was given to others in the meantime."""
        self._storage.record_heartbeat(trial)
        state = self._storage.get_trial(trial).state
        return bool(state == self._optuna.trial.TrialState.RUNNING)

    def finish(self, trial: int, score: float | None = None) -> None:
        """The task has ended.

        Args:
            trial: the trial.
            score: dev score, for whoever looks into the database.
        """
        values = None if score is None else [score]
        try:
            self._storage.set_trial_state_values(
                trial, self._optuna.trial.TrialState.COMPLETE, values
            )
        except self._optuna.exceptions.UpdateFinishedTrialError:
            return  # given to others, who will find that it has ended

    def give_back(self, trial: int) -> None:
        """Let others have the task."""
        try:
            done = self._storage.set_trial_state_values(trial, self._optuna.trial.TrialState.FAIL)
        except self._optuna.exceptions.UpdateFinishedTrialError:
            return  # somebody else did
        if done:
            self._add(self._storage.get_trial(trial).user_attrs[_TASK])

    def recover(self) -> None:
        """Let others have what dead workers had."""
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", self._optuna.exceptions.ExperimentalWarning)
            self._optuna.storages.fail_stale_trials(self._study)
        for trial in self._trials(self._optuna.trial.TrialState.RUNNING):
            worker = trial.user_attrs.get(_WORKER)
            if worker is not None and _is_gone(worker):
                self.give_back(trial._trial_id)

    def workers(self) -> dict[str, str]:
        """Task -> the worker that has it."""
        trials = self._trials(self._optuna.trial.TrialState.RUNNING)
        return {
            t.user_attrs[_TASK]: t.user_attrs.get(_WORKER, {}).get("host", "?")
            for t in trials
            if _TASK in t.user_attrs
        }

    def _add(self, task: str) -> None:
        states = self._optuna.trial.TrialState
        trial = self._optuna.trial.create_trial(state=states.WAITING, user_attrs={_TASK: task})
        self._storage.create_new_trial(self._id, template_trial=trial)

    def _trials(self, *states: Any) -> list[Any]:
        return self._storage.get_all_trials(self._id, deepcopy=False, states=states)


def queue_of(spec: StudySpec, **options: Any) -> Queue:
    """The queue of a study: a file in its folder, or in a database that may serve several.

    Raises:
        UserError: as `Queue`.
    """
    folder = Path(spec.output)
    name = folder / _NAME_FILE
    if not name.exists():
        write_text(name, f"{spec.name} {uuid.uuid4()}\n")
    url = spec.storage or f"sqlite:///{folder / DATABASE_FILE}"
    return Queue(url, name.read_text(encoding="utf-8").strip(), **options)


def _this_worker() -> dict[str, Any]:
    process = psutil.Process()
    return {"host": socket.gethostname(), "pid": os.getpid(), "since": process.create_time()}


def _is_gone(worker: dict[str, Any]) -> bool:
    """Whether a worker was on this machine and is no more."""
    if worker["host"] != socket.gethostname():
        return False
    try:
        # The system reuses process ids, so the time of creation is compared too.
        return abs(psutil.Process(worker["pid"]).create_time() - worker["since"]) > 1
    except psutil.NoSuchProcess:
        return True
    except psutil.Error:
        return False


def _with_driver(url: str) -> str:
    head, mark, rest = url.partition("://")
    return (
        f"postgresql+psycopg://{rest}" if head in ("postgres", "postgresql") else head + mark + rest
    )


def _engine_options(url: str) -> dict[str, Any]:
    if url.startswith("sqlite"):
        return {"connect_args": {"timeout": _BUSY_TIMEOUT_S}}
    return {"pool_pre_ping": True}


def _begin_immediately(engine: Any) -> None:
    """Every transaction takes SQLite's write lock at its beginning."""
    from sqlalchemy import event

    @event.listens_for(engine, "connect")
    def _connect(connection: Any, _: Any) -> None:
        connection.isolation_level = None  # sqlite3 begins no transactions of its own
        # A kill loses nothing; after a power cut a spoilt file can be removed.
        connection.execute("PRAGMA synchronous = OFF")

    @event.listens_for(engine, "begin")
    def _begin(connection: Any) -> None:
        connection.exec_driver_sql("BEGIN IMMEDIATE")

    engine.dispose()  # connections that were opened before know nothing of it


def _without_password(url: str) -> str:
    head, mark, rest = url.partition("://")
    login, at, place = rest.rpartition("@")
    return head + mark + login.partition(":")[0] + at + place
