"""A folder that is written whole or not at all, with a digest of each file."""

from __future__ import annotations

import glob
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path
from typing import Final

from zofo.disk.files import file_digest, reason_of_failed_write, temporary_prefix
from zofo.disk.locks import LOCK_FILE, take_lock
from zofo.errors import UserError

LIST_FILE: Final = "zofo_files.json"  # lists name, size and digest of every other file
HIDDEN: Final = ".partial"  # ending of folders that are incomplete or about to be removed
_SET_ASIDE: Final = "replaced"  # holds the folder that a new one is about to replace
_REMEDY: Final = (
    "Older checkpoints are as they were: free space or make the folder writable again, and "
    "continue from the newest"
)


@contextmanager
def writing_folder(
    place: Path, *, remedy: str = _REMEDY, is_checkpoint: bool = True
) -> Iterator[Path]:
    """A hidden folder that becomes `place` when the block ends without an error.

    Args:
        place: path of the finished folder.
        remedy: end of the message about a failed write.
        is_checkpoint: whether to list the files with their digests and to replace a folder at
            `place`. If not, `place` must be empty or not exist, and its parents are created.

    Raises:
        UserError: if it cannot be written; a folder at `place` is then unchanged.
    """
    hidden, lock = None, None
    try:
        if not is_checkpoint:
            place.parent.mkdir(parents=True, exist_ok=True)
        prefix = temporary_prefix(place)
        remove_partial(place.parent, f"{glob.escape(prefix)}*")
        hidden = Path(tempfile.mkdtemp(HIDDEN, prefix, place.parent))
        lock = take_lock(hidden / LOCK_FILE)  # It shows others that this process is alive.
        # The inner folder has the final name, because Trainer writes to FOLDER/checkpoint-N.
        staged = hidden / place.name
        staged.mkdir()
        yield staged
        share_files(staged)
        if is_checkpoint:
            _list_files(staged)
        # Everything is on the disk before the rename, so that a power cut leaves no partial folder.
        for path in (*staged.rglob("*"), staged):
            _flush(path)
        with _set_aside(place, hidden) if is_checkpoint and place.exists() else nullcontext():
            staged.replace(place)
            _flush(place.parent)  # The rename is an entry of the parent.
    except Exception as error:
        reason = reason_of_failed_write(error)
        if reason is None:
            raise
        raise UserError(f"cannot write {place}: {reason}. {remedy}") from error
    finally:
        if lock is not None:
            lock.release()
        if hidden is not None:
            shutil.rmtree(hidden, ignore_errors=True)


@contextmanager
def _set_aside(place: Path, hidden: Path) -> Iterator[None]:
    """Keep the folder at `place` until its successor is there; `restore` brings it back if not."""
    old = hidden / _SET_ASIDE / place.name
    old.parent.mkdir()
    place.replace(old)
    try:
        yield
    except BaseException:
        if not place.exists():
            old.replace(place)
        raise


def restore(parent: Path) -> None:
    """Bring back the folders in `parent` whose writers were killed before they were replaced."""
    for old in parent.glob(f".*{HIDDEN}/{_SET_ASIDE}/*"):
        place, lock_file = parent / old.name, old.parents[1] / LOCK_FILE
        if not place.exists():
            with suppress(OSError, UserError):  # The folder may be read-only.
                lock = take_lock(lock_file)
                if lock is not None:  # The writer has ended.
                    with lock:
                        old.replace(place)


def remove_partial(parent: Path, pattern: str) -> None:
    """Remove hidden folders of writers that were killed; those of living processes stay.

    Args:
        parent: the folder that holds them.
        pattern: pattern for their names, without the ending.
    """
    restore(parent)
    for hidden in parent.glob(f"{pattern}{HIDDEN}"):
        if hidden.is_dir() and not hidden.is_symlink():
            with suppress(UserError):
                lock = take_lock(hidden / LOCK_FILE)
                if lock is not None:
                    lock.release()
                    shutil.rmtree(hidden, ignore_errors=True)


def share_files(folder: Path) -> None:
    """Give every file below a folder the permissions of the folder, without that to execute.

    The umask has decided on those of a new folder. safetensors makes files private whatever it is.
    """
    mode = folder.stat().st_mode & 0o666
    for path in folder.rglob("*"):
        if path.is_file():
            path.chmod(mode)


def discard(folder: Path) -> None:
    """Remove a folder. A kill during the removal leaves no part of it under its name."""
    # A rename is atomic, and the removal of many files is not.
    hidden = folder.parent / f".{folder.name}.old{HIDDEN}"
    shutil.rmtree(hidden, ignore_errors=True)
    folder.replace(hidden)
    shutil.rmtree(hidden, ignore_errors=True)


def _list_files(folder: Path) -> None:
    listed = {
        path.relative_to(folder).as_posix(): {
            "bytes": path.stat().st_size,
            "blake2b": file_digest(path),
        }
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }
    target = folder / LIST_FILE
    target.write_text(json.dumps({"format": 1, "files": listed}, indent=2) + "\n", encoding="utf-8")


def _flush(path: Path) -> None:
    if path.is_dir() and os.name == "nt":  # Windows cannot open folders.
        return
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
