"""A folder that is written whole or not at all, with a digest of each file."""

from __future__ import annotations

import errno
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

from zofo.disk.files import file_digest
from zofo.errors import UserError

LIST_FILE: Final = "zofo_files.json"  # lists name, size and digest of every other file
HIDDEN: Final = ".partial"  # ending of folders that are incomplete or about to be removed
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
    hidden: Path | None = None
    try:
        if not is_checkpoint:
            place.parent.mkdir(parents=True, exist_ok=True)
        name = tempfile.mkdtemp(HIDDEN, f".{place.name}.", place.parent)
        hidden = Path(name)
        # The inner folder has the final name, because Trainer writes to FOLDER/checkpoint-N.
        staged = hidden / place.name
        staged.mkdir()
        yield staged
        if is_checkpoint:
            _list_files(staged)
        # Everything is on the disk before the rename, so that a power cut leaves no partial folder.
        for path in (*staged.rglob("*"), staged):
            _flush(path)
        if is_checkpoint and place.exists():
            discard(place)
        staged.replace(place)
        _flush(place.parent)  # The rename is an entry of the parent.
    except Exception as error:
        reason = _reason(error)
        if reason is None:
            raise
        raise UserError(f"cannot write {place}: {reason}. {remedy}") from error
    finally:
        if hidden is not None:
            shutil.rmtree(hidden, ignore_errors=True)


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


def _reason(error: Exception) -> str | None:
    """The reason of a failed write, in words; None for an error of another kind."""
    if isinstance(error, UserError) and isinstance(error.__cause__, Exception):
        return _reason(error.__cause__)
    if isinstance(error, OSError):
        return error.strerror or str(error)
    # safetensors and torch.save wrap the error of the system in errors of their own.
    text = f"{type(error).__name__}: {error}"
    if "No space left" in text or "os error 28" in text:
        return os.strerror(errno.ENOSPC)
    signs = ("SafetensorError", "PytorchStreamWriter", "iostream error", "unexpected pos", "I/O")
    return text if any(sign in text for sign in signs) else None
