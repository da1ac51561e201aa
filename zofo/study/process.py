"""Runs a task in a child process, under a lock that shows that a worker has it.

The child has a session of its own, so that Ctrl-C in a terminal reaches it once, through its
worker; it inherits the lock's file, so that the lock lasts as long as worker or child. When the
worker is killed, Linux sends the child SIGTERM: it writes a checkpoint and ends.
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

_NUM_LINES: Final = 5
_NUM_CHARACTERS: Final = 500
"""Of what a failing process printed last, in the record."""
_PR_SET_PDEATHSIG: Final = 1


class Lock:
    """Held by this process and the children that inherit it.

    Args:
        path: a file that only serves as lock.
        handle: of the locked file.
    """

    def __init__(self, path: Path, handle: int) -> None:
        self.path, self.handle = path, handle

    @classmethod
    def take(cls, path: Path, *, wait: bool = False) -> Lock | None:
        """The lock, or None if another process holds it.

        Args:
            path: made if it does not exist.
            wait: until it is free.
        """
        path.parent.mkdir(parents=True, exist_ok=True)
        handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            os.close(handle)
            return None
        return cls(path, handle)

    def release(self) -> None:
        """Close this process's copy."""
        os.close(self.handle)


class Child:
    """A process that works on a run.

    Args:
        arguments: module and its arguments.
        log: what it prints is added here.
        lock: inherited.
        num_threads: of the CPU.

    Attributes:
        program: what the arguments are given to.
    """

    program: ClassVar[tuple[str, ...]] = (sys.executable, "-m")

    def __init__(self, arguments: Sequence[str], log: Path, lock: Lock, num_threads: int) -> None:
        self._log = log
        log.parent.mkdir(parents=True, exist_ok=True)
        with log.open("ab") as file:
            self._start = file.tell()
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
        """Its process id."""
        return self._process.pid

    def poll(self) -> int | None:
        """Its exit code, negative for a signal; None while it runs."""
        return self._process.poll()

    def send(self, signum: int) -> None:
        """Send a signal."""
        self._process.send_signal(signum)

    def wait(self, timeout_s: float) -> int | None:
        """Its exit code, or None if it still runs then."""
        try:
            return self._process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            return None

    def last_lines(self) -> str:
        """What it printed last."""
        with self._log.open("rb") as file:
            file.seek(self._start)
            text = file.read().decode("utf-8", "replace")
        lines = [line.strip() for line in text.splitlines() if line.strip()]
        return "\n".join(lines[-_NUM_LINES:])[-_NUM_CHARACTERS:]


def was_stopped(code: int) -> bool:
    """Whether an exit code says that a signal ended the process, however it took it."""
    return code < 0 or code in (128 + signal.SIGINT, 128 + signal.SIGTERM)


def _end_with_parent() -> None:
    assert _LIBC is not None
    _LIBC.prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)


_LIBC = ctypes.CDLL(None) if sys.platform == "linux" else None
