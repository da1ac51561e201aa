"""Claims the tasks of a study, runs them as processes, and records their results.

Only the files of the study decide which tasks have ended. A killed run resumes from its checkpoint.
The record of a failed run holds its last lines of output, and the other runs continue.
"""

from __future__ import annotations

import math
import shutil
import signal
import threading
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any, Final, TypeVar

from zofo.disk.files import remove_file, write_json, write_text
from zofo.disk.locks import take_lock
from zofo.errors import UserError
from zofo.models.trust import names_kernel, require_trust
from zofo.run.resume import is_finished
from zofo.run.stopping import stop_reason
from zofo.saved.checkpoint_folders import checkpoints
from zofo.saved.layout import CONFIG_FILE
from zofo.study.grid import Grid, Run, config_of
from zofo.study.jobs import (
    START_ERROR_FILE,
    Task,
    all_tasks,
    run_of,
    start_error,
    start_file,
    start_of,
    state_of,
)
from zofo.study.process import Child, Lock, was_stopped
from zofo.study.queue import queue_of
from zofo.study.records import StudyFolder
from zofo.study.spec import SPEC_FILE, differences, load_spec

T = TypeVar("T")
SIGNALS: Final = (signal.SIGINT, signal.SIGTERM)
_POLL_S: Final = 0.05
_REFRESH_S: Final = 2.0
"""Seconds between two checks of the files, which other workers change, too (choice)."""
_MAX_DEATHS: Final = 3
"""Deaths by a signal, for instance out of memory, without a new checkpoint in between (choice)."""


@dataclass
class Job:
    """A running task of this worker."""

    task: Task
    run: Run | None
    trial: int
    lock: Lock
    child: Child
    began: float = field(default_factory=time.monotonic)
    num_deaths: int = 0
    last_step: int = 0
    num_signals: int = 0


class Worker:
    """Works on a study.

    Args:
        grid: the study.
        num_slots: number of tasks to run at once.
        report: shows the progress, as `zofo.study.progress.StudyDisplay` does.
        trust_remote_code: whether code from the models' repositories may run, if the study asks
            for it.
        queue_options: options of `Queue`.
    """

    def __init__(
        self,
        grid: Grid,
        num_slots: int = 1,
        report: Any = None,
        *,
        trust_remote_code: bool = False,
        **queue_options: Any,
    ) -> None:
        self.folder = StudyFolder(grid)
        self.grid, self.num_slots, self.report = grid, num_slots, report
        self.tasks = all_tasks(grid)
        self.jobs: list[Job] = []
        self._is_trusted = trust_remote_code
        self.signum: int | None = None
        self.loss: str | None = None  # how the queue's database was lost
        self._num_signals = 0
        self._queue_options = queue_options

    def run(self, *, retry_failed: bool = False) -> None:
        """Work until all tasks have ended, or a signal arrives.

        Args:
            retry_failed: try failed runs and measurements again.

        Raises:
            UserError: if the folder holds another study or other files, if files of its runs were
                altered, if the study asks for code that is not allowed, or if the queue fails or is
                lost.
        """
        self._check_trust()
        self._begin(retry_failed)
        previous = self._handle_signals()
        refreshed = beaten = -math.inf
        try:
            while True:
                # Not in the signal handler, which may interrupt the start of a child.
                self._send_signals()
                ended = [job for job in list(self.jobs) if self._has_ended(job)]
                # After a signal nothing new is claimed; only the running children are awaited.
                if self._is_ending and not self.jobs:
                    break
                now = time.monotonic()
                if not self._is_ending and (ended or now - refreshed >= _REFRESH_S):
                    refreshed = now
                    self.folder.choices()
                    self._fill_slots()
                    self._look_after_queue()
                    if not self.jobs and self._is_done():
                        break
                    self._report("refreshed")
                if now - beaten >= self.queue.heartbeat_s:
                    beaten = now
                    self._beat()
                time.sleep(_POLL_S)
        finally:
            for job in self.jobs:
                self._drop(job)
                self._tell(self.queue.give_back, job.trial)
            # Each worker writes what is there when it ends, so the last one writes all results.
            with locked(self.folder.path / "locks" / "results"):
                self.folder.write_results()
            self.queue.close()
            for signum, handler in previous.items():
                signal.signal(signum, handler)
        if self.loss is not None:
            raise UserError(
                f"the queue's database was lost ({self.loss}), so this worker has ended; its runs "
                "have written checkpoints. Start the study again: the queue is filled from the runs"
            )

    @property
    def _is_ending(self) -> bool:
        return self.signum is not None or self.loss is not None

    def _look_after_queue(self) -> None:
        """End this worker if the database was lost, because a lost one does not come back."""
        self.loss = self.queue.loss()
        if self.loss is not None:
            self._num_signals += 1  # The running children write checkpoints and end.

    def stop(self, signum: int) -> None:
        """Let every run write a checkpoint and end. A second call ends them at once."""
        self.signum = signum
        self._num_signals += 1

    def others(self) -> set[str] | None:
        """Names of the tasks of other workers; None if the database does not answer."""
        found = self._tell(self.queue.workers)
        return None if found is None else set(found) - {job.task.name for job in self.jobs}

    def _check_trust(self) -> None:
        for cell, pairs in self.grid.rates.items():
            model = self.grid.config(Run(cell, pairs[0], self.grid.spec.seeds[0])).model
            require_trust(
                f"the study {self.grid.spec.name}",
                model.name,
                wishes_code=model.trust_remote_code,
                attention=model.attn_implementation,
                is_allowed=self._is_trusted,
            )

    def _begin(self, retry_failed: bool) -> None:
        place = self.folder.path
        saved, lock = place / SPEC_FILE, place / "locks" / "begin"
        has_files = place.exists() and any(f.name != "locks" for f in place.iterdir())
        # Check the lock after listing the files, because another worker may create it in between.
        if has_files and not lock.exists() and not saved.exists():
            raise UserError(f"{place} exists and is no study; choose another output")
        with locked(lock):
            if saved.exists():
                found = differences(load_spec(saved), self.grid.spec)
                if found:
                    raise UserError(
                        f"{place} was begun with another study (saved -> now):\n"
                        + "\n".join(f"  - {line}" for line in found)
                        + "\nLeave these as they were, or begin another with another output"
                    )
            self.folder.begin()
            self.folder.choices()
            for run in self.folder.known_runs():
                self.folder.record(run)  # Altered files are reported before any work.
            self.queue = queue_of(self.grid.spec, **self._queue_options)
            if retry_failed:
                self._forget_failures()
            self.queue.recover()
            self.queue.fill(self._open_tasks())

    def _forget_failures(self) -> None:
        """Make failed tasks open again, and runs whose artefact the new choice may need."""
        for task in self.tasks.values():
            if task.kind == "start":
                remove_file(start_file(task, self.folder).parent / START_ERROR_FILE)
        runs = self.folder.known_runs()
        failed = [run for run in runs if self.folder.has_failed(run)]
        for run in runs:
            self.folder.forget_measurement(run)
            if run in failed:
                self.folder.forget(run)
            elif any(f.cell == run.cell and f.rates == run.rates for f in failed):
                self.folder.restore(run)

    def _open_tasks(self) -> list[str]:
        return [n for n, task in self.tasks.items() if state_of(task, self.folder) != "ended"]

    def _is_done(self) -> bool:
        return all(state_of(task, self.folder) == "ended" for task in self.tasks.values())

    def _fill_slots(self) -> None:
        """Claim ready tasks in the order of the queue."""
        if len(self.jobs) >= self.num_slots:
            return
        for name, trial in (self._tell(self.queue.waiting) or {}).items():
            task = self.tasks.get(name)
            if task is None:  # Another worker's study has it, for instance of another version.
                continue
            state = state_of(task, self.folder)
            if state == "ended":
                self._tell(self.queue.finish, trial)
            elif state == "ready":
                self._claim(task, trial)
            if len(self.jobs) >= self.num_slots:
                return

    def _claim(self, task: Task, trial: int) -> None:
        run = run_of(task, self.folder)
        name = run.id if run is not None else task.name
        lock = Lock.take(self.folder.path / "locks" / name)
        if lock is None:  # the child of a killed worker has not ended yet
            return
        # Another worker may have finished the task after its files were read.
        is_ready = state_of(task, self.folder) == "ready"
        if not is_ready or not self._tell(self.queue.claim, trial):
            lock.release()
            return
        # Without scores of the untrained model, a test has nothing to compare with.
        failure = start_error(start_of(task), self.folder) if task.kind == "test" else None
        if failure is not None:
            self._record_failure(task, run, failure)
            self._release(lock, trial, None)
            return
        if self._has_come_to_end(task, run):  # its worker was killed before it recorded the end
            self._release(lock, trial, self._record_end(task, run))
            return
        child = Child(*self._command(task, run), lock, self.grid.spec.num_threads)
        job = Job(task, run, trial, lock, child, last_step=self._last_step(run))
        self.jobs.append(job)
        self._report("started", job)

    def _command(self, task: Task, run: Run | None) -> tuple[list[str], Path]:
        """The arguments of `python -m` for a task, and its log file."""
        measure = ["zofo.study.measure", *(["--trust-remote-code"] if self._is_trusted else [])]
        if run is None:
            output = start_file(task, self.folder)
            config_file = output.parent / "start.yaml"
            write_text(config_file, self._start_config(task))
            return [*measure, "start", str(config_file), str(output)], output.parent / "log"
        folder, log = self.folder.run_folder(run), self.folder.log_file(run.id)
        trusting, config_file = self._permission(run), self.folder.config_file(run)
        if task.kind == "test":
            return [*measure, "run", str(folder), str(start_file(start_of(task), self.folder))], log
        if (folder / CONFIG_FILE).is_file():
            # The child compares the file with run.yaml, which may be of another run.
            return ["zofo", "train", "--resume", str(folder), str(config_file), *trusting], log
        # A run that was killed before it wrote its configuration cannot resume; it starts anew.
        shutil.rmtree(folder, ignore_errors=True)
        return ["zofo", "train", str(config_file), f"output_dir={folder}", *trusting], log

    def _permission(self, run: Run) -> list[str]:
        """The options that allow in a child what this worker was allowed (`_check_trust`)."""
        model = self.grid.config(run).model
        wishes = ["model.trust_remote_code=true"] if model.trust_remote_code else []
        if names_kernel(model.attn_implementation):
            wishes.append(f"model.attn_implementation={model.attn_implementation}")
        return wishes if self._is_trusted else []

    def _start_config(self, task: Task) -> str:
        # Every cell with this model and task has the same untrained model.
        cell = next(c for c in self.grid.rates if (c.model, c.task) == (task.model, task.task))
        pair = self.grid.rates[cell][0]
        return config_of(self.grid.spec, cell, pair, task.seed).to_yaml()

    def _last_step(self, run: Run | None) -> int:
        return max(checkpoints(self.folder.run_folder(run)), default=0) if run is not None else 0

    def _has_ended(self, job: Job) -> bool:
        """Whether a job has ended; records its end, or restarts a run that was killed."""
        code = job.child.poll()
        if code is None:
            return False
        self.jobs.remove(job)
        failure = self._failure(job, code)
        if failure is None:
            self._release(job.lock, job.trial, self._record_end(job.task, job.run))
        elif was_stopped(code) and (self._is_ending or self._goes_on(job)):
            if self._is_ending:  # this worker ends, so another one may continue the run
                job.lock.release()
                self._tell(self.queue.give_back, job.trial)
            return True
        else:
            self._record_failure(job.task, job.run, failure)
            self._release(job.lock, job.trial, None)
        self._report("ended", job)
        return True

    def _release(self, lock: Lock, trial: int, score: float | None) -> None:
        # The files are complete by now, so whoever takes the lock sees that the task has ended.
        lock.release()
        self._tell(self.queue.finish, trial, score)

    def _failure(self, job: Job, code: int) -> str | None:
        """Why a job has failed; None if it has succeeded."""
        trains = job.task.kind in ("search", "final")
        if self._has_come_to_end(job.task, job.run) if trains else code == 0:
            return None
        died = f"killed by signal {-code}" if code < 0 else f"exit code {code}"
        said = job.child.last_lines()
        return f"{died}: {said}" if said else died

    def _has_come_to_end(self, task: Task, run: Run | None) -> bool:
        """Whether a run has written a result, or the reason why it stopped."""
        if task.kind not in ("search", "final") or run is None:
            return False
        folder = self.folder.run_folder(run)
        return is_finished(folder) or stop_reason(folder) is not None

    def _goes_on(self, job: Job) -> bool:
        """Restart a job that a signal has ended, unless this happens too often."""
        step = self._last_step(job.run)
        # A new checkpoint is progress, so the count starts again.
        job.num_deaths = 1 if step > job.last_step else job.num_deaths + 1
        job.last_step = step
        if job.num_deaths >= _MAX_DEATHS:
            return False
        job.child = Child(*self._command(job.task, job.run), job.lock, self.grid.spec.num_threads)
        self.jobs.append(job)
        return True

    def _record_end(self, task: Task, run: Run | None) -> float | None:
        """Record the end of a run, and return its dev loss."""
        if task.kind not in ("search", "final") or run is None:
            return None
        reason = stop_reason(self.folder.run_folder(run))
        status = "done" if reason is None else "stopped"
        record = self.folder.ended(run, status, reason, task.kind == "final")
        return None if record["dev"] is None else float(record["dev"]["loss"])

    def _record_failure(self, task: Task, run: Run | None, failure: str) -> None:
        if task.kind == "start":
            write_json(start_file(task, self.folder).parent / START_ERROR_FILE, {"error": failure})
            return
        assert run is not None
        if task.kind == "test":
            record = self.folder.record(run)
            assert record is not None
            self.folder.write_record(run, {**record, "test_error": failure})
        else:
            self.folder.ended(run, "failed", failure, task.kind == "final")

    def _beat(self) -> None:
        """Write heartbeats; drop jobs that were given to others because a heartbeat was late."""
        for job in list(self.jobs):
            if self._tell(self.queue.beat, job.trial) is False:
                self.jobs.remove(job)
                self._drop(job)
        if not self._is_ending:
            with locked(self.folder.path / "locks" / "begin"):
                self._tell(self.queue.recover)
                # An idle worker also restores a database that was lost.
                if not self.jobs:
                    self._tell(self.queue.fill, self._open_tasks())

    def _drop(self, job: Job) -> None:
        job.child.send(signal.SIGKILL)
        job.child.wait(60)
        job.lock.release()

    def _tell(self, action: Callable[..., T], *values: Any) -> T | None:
        """Call the queue; the worker continues if the database does not answer for a while."""
        try:
            return action(*values)
        except self.queue.errors as error:
            self._report("database_failed", error)
            return None

    def _report(self, what: str, *values: Any) -> None:
        if self.report is not None:
            getattr(self.report, what)(self, *values)

    def _send_signals(self) -> None:
        """Send signals to all children, including those that started after a signal."""
        for job in self.jobs:
            # Two SIGTERM: the first asks for a checkpoint, the second for an immediate end.
            while job.num_signals < self._num_signals:
                job.num_signals += 1
                job.child.send(signal.SIGTERM if job.num_signals <= 2 else signal.SIGKILL)

    def _handle_signals(self) -> dict[int, Any]:
        if threading.current_thread() is not threading.main_thread():
            return {}  # Python allows signal handlers only in the main thread

        def handle(signum: int, frame: FrameType | None) -> None:
            self.stop(signum)

        return {
            signum: signal.signal(signum, handle)
            for signum in SIGNALS
            if signal.getsignal(signum) is not signal.SIG_IGN
        }


def locked(path: Path) -> AbstractContextManager[Any]:
    """Wait for a lock and hold it, so that only one process at a time runs the block."""
    lock = take_lock(path, wait=True)
    assert lock is not None
    return lock
