"""A folder that is written whole or not at all, with a digest of each file."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

from zofo.errors import UserError

LIST_FILE: Final = "zofo_files.json"
"""Name, size and digest of every other file."""


HIDDEN: Final = ".partial"


@contextmanager
def writing_folder(place: Path) -> Iterator[Path]:
    """A hidden folder that becomes `place` when the block ends well.

    Raises:
        UserError: if it cannot be written; what lay at `place` is then still there.
    """
    hidden = place.parent / f".{place.name}{HIDDEN}"
    try:
        shutil.rmtree(hidden, ignore_errors=True)
        hidden.mkdir()
        staged = hidden / place.name
        staged.mkdir()
        yield staged
        _seal(staged)
        if place.exists():
            discard(place)
        staged.replace(place)
        _flush(place.parent)
    except Exception as error:
        reason = _reason(error)
        if reason is None:
            raise
        raise UserError(
            f"cannot write {place}: {reason}. Older checkpoints are as they were: free space or "
            "make the folder writable again, and continue from the newest"
        ) from error
    finally:
        shutil.rmtree(hidden, ignore_errors=True)


def discard(folder: Path) -> None:
    """Remove a checkpoint; a kill meanwhile leaves no half of it under its name."""
    hidden = folder.parent / f".{folder.name}.old{HIDDEN}"
    shutil.rmtree(hidden, ignore_errors=True)
    folder.replace(hidden)
    shutil.rmtree(hidden, ignore_errors=True)


def _seal(folder: Path) -> None:
    """List the files and flush everything to the disk."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    listed = {
        path.relative_to(folder).as_posix(): {
            "bytes": path.stat().st_size,
            "blake2b": file_digest(path),
        }
        for path in files
    }
    target = folder / LIST_FILE
    target.write_text(json.dumps({"format": 1, "files": listed}, indent=2) + "\n", encoding="utf-8")
    for path in (*files, target):
        _flush(path)
    for path in (*(p for p in folder.rglob("*") if p.is_dir()), folder):
        _flush(path)


def _flush(path: Path) -> None:
    if path.is_dir() and os.name == "nt":  # Windows cannot open folders, and need not
        return
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def file_digest(path: Path) -> str:
    """BLAKE2b digest of a file's content, in hexadecimal."""
    digest = hashlib.blake2b(digest_size=16)
    with path.open("rb") as file:
        while part := file.read(1 << 20):
            digest.update(part)
    return digest.hexdigest()


def _reason(error: Exception) -> str | None:
    """What a failed write says, in words; None for errors of another kind."""
    if isinstance(error, UserError) and isinstance(error.__cause__, Exception):
        return _reason(error.__cause__)
    if isinstance(error, OSError):
        return error.strerror or str(error)
    # safetensors and torch.save wrap the system's error in their own.
    text = f"{type(error).__name__}: {error}"
    if "No space left" in text or "os error 28" in text:
        return os.strerror(errno.ENOSPC)
    signs = ("SafetensorError", "PytorchStreamWriter", "iostream error", "unexpected pos", "I/O")
    return text if any(sign in text for sign in signs) else None
