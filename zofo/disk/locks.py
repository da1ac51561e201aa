"""Locks on files between processes. The system releases them when their process ends."""

from __future__ import annotations

from pathlib import Path

from filelock import FileLock, Timeout

from zofo.errors import UserError

LOCK_FILE = ".lock"
"""Name of the lock in a folder that one process at a time may use."""


def take_lock(path: Path, *, wait: bool = False) -> FileLock | None:
    """Take the lock of a file, which is created if it is missing.

    Args:
        path: the file. It stays when the lock is released.
        wait: whether to wait while another process holds the lock.

    Returns:
        The lock, which `release` or the end of a `with` block releases. None if another process
        holds it.

    Raises:
        UserError: if the file cannot be opened.
    """
    lock = FileLock(path, thread_local=False)
    try:
        lock.acquire(timeout=-1 if wait else 0)
    except Timeout:
        return None
    except OSError as error:
        raise UserError(lock_problem(path, error)) from error
    return lock


def lock_problem(path: Path, error: OSError) -> str:
    """The message for a lock file that cannot be opened."""
    remedy = "make its folder writable, and remove what lies under this name"
    return f"the lock {path} cannot be taken ({error.strerror or error}); {remedy}"
