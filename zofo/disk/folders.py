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

LIST_FILE: Final = "zofo_files.json"
"""Name, size and digest of every other file."""


HIDDEN: Final = ".partial"


_REMEDY: Final = (
    "Older checkpoints are as they were: free space or make the folder writable again, and "
    "continue from the newest"
)


@contextmanager
def writing_folder(
    place: Path, *, remedy: str = _REMEDY, is_checkpoint: bool = True
) -> Iterator[Path]:
    """A hidden folder that becomes `place` when the block ends well.

    Args:
        place: where the folder goes.
        remedy: how the message about a failed write ends.
        is_checkpoint: list the files with their digests, and replace what lies at `place`. If
            not, `place` must not exist, or be empty, and the folders above it are made.

    Raises:
        UserError: if it cannot be written; what lay at `place` is then still there.
    """
    hidden: Path | None = None
    try:
        if not is_checkpoint:
            place.parent.mkdir(parents=True, exist_ok=True)
        name = tempfile.mkdtemp(HIDDEN, f".{place.name}.", place.parent)
        hidden = Path(name)
        staged = hidden / place.name
        staged.mkdir()
        yield staged
        if is_checkpoint:
            _list_files(staged)
        for path in (*staged.rglob("*"), staged):
            _flush(path)
        if is_checkpoint and place.exists():
            discard(place)
        staged.replace(place)
        _flush(place.parent)
    except Exception as error:
        reason = _reason(error)
        if reason is None:
            raise
        raise UserError(f"cannot write {place}: {reason}. {remedy}") from error
    finally:
        if hidden is not None:
            shutil.rmtree(hidden, ignore_errors=True)


def discard(folder: Path) -> None:
    """Remove a checkpoint; a kill meanwhile leaves no half of it under its name."""
    hidden = folder.parent / f".{folder.name}.old{HIDDEN}"
    shutil.rmtree(hidden, ignore_errors=True)
    folder.replace(hidden)
    shutil.rmtree(hidden, ignore_errors=True)


def _list_files(folder: Path) -> None:
    """Write the list of the files."""
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
    if path.is_dir() and os.name == "nt":  # Windows cannot open folders, and need not
        return
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


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
