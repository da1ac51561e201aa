"""Runs a task in a child process, and locks the task while worker or child is alive.

The child has its own session, so Ctrl-C in a terminal does not reach it directly; its worker passes
the signal on, once. The child inherits the open lock file, so the lock lasts until both processes
have ended. If the worker is killed, Linux sends SIGTERM to the child, which then writes a
checkpoint and ends.
"""

from __future__ import annotations

import ctypes
import fcntl
import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import ClassVar, Final

from zofo.disk.locks import lock_problem
from zofo.errors import UserError

_NUM_LINES: Final = 5
_NUM_CHARACTERS: Final = 500
"""Limits of a failed process's last output that its record keeps (choice)."""
_PR_SET_PDEATHSIG: Final = 1


class Lock:
    """A lock that this process and the children that inherit its file descriptor hold.

    The library filelock would end the lock for the children as well when this process releases it.
    """

    def __init__(self, path: Path, handle: int) -> None:
        self.path, self.handle = path, handle

    @classmethod
    def take(cls, path: Path) -> Lock | None:
        """Take the lock of a file, which is created if it is missing.

        Returns None if another process holds the lock.

        Raises:
            UserError: if the file cannot be opened.
        """
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            # O_CLOEXEC: only a child that names the descriptor in `pass_fds` inherits the lock.
            handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        except OSError as error:
            raise UserError(lock_problem(path, error)) from error
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(handle)
            return None
        return cls(path, handle)

    def release(self) -> None:
        """Close the descriptor of this process; the lock ends when no process has one."""
        os.close(self.handle)


class Child:
    """A process that works on a task.

    Args:
        arguments: module and its arguments.
        log: file to which the output is appended.
        lock: lock that the process inherits.
        num_threads: number of CPU threads.
    """

    program: ClassVar[tuple[str, ...]] = (sys.executable, "-m")
    """Command before the arguments."""

    def __init__(self, arguments: Sequence[str], log: Path, lock: Lock, num_threads: int) -> None:
        self._log = log
        log.parent.mkdir(parents=True, exist_ok=True)
        with log.open("ab") as file:
            self._start = file.tell()  # an earlier attempt may have written before this position
            self._process = subprocess.Popen(
                [*self.program, *arguments],
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=subprocess.STDOUT,
                env={**os.environ, "OMP_NUM_THREADS": str(num_threads)},
                pass_fds=(lock.handle,),
                start_new_session=True,
                preexec_fn=_end_with_parent if _LIBC is not None else None,
            )

    @property
    def pid(self) -> int:
        """Process id."""
        return self._process.pid

    def poll(self) -> int | None:
        """The exit code, negative for a signal; None while the process runs."""
        return self._process.poll()

    def send(self, signum: int) -> None:
        """Send a signal."""
        self._process.send_signal(signum)

    def wait(self, timeout_s: float) -> int | None:
        """Wait for the exit code; None if the process still runs after `timeout_s`."""
        try:
            return self._process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            return None

    def last_lines(self) -> str:
        """The end of what this process has printed."""
        with self._log.open("rb") as file:
            file.seek(self._start)
            text = file.read().decode("utf-8", "replace")
        lines = [line.strip() for line in text.splitlines() if line.strip()]
        return "\n".join(lines[-_NUM_LINES:])[-_NUM_CHARACTERS:]


def was_stopped(code: int) -> bool:
    """Whether a signal ended the process."""
    # A process that handles the signal exits with 128 + its number, as shells report it.
    return code < 0 or code in (128 + signal.SIGINT, 128 + signal.SIGTERM)


def _end_with_parent() -> None:
    # Runs in the child between fork and exec; Linux keeps the setting across exec.
    assert _LIBC is not None
    _LIBC.prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)


# Loaded before any fork: loading a library between fork and exec may deadlock.
_LIBC = ctypes.CDLL(None) if sys.platform == "linux" else None
