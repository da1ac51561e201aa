"""A folder that is written whole or not at all, with a digest of each file."""

from __future__ import annotations

import glob
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path, PurePosixPath
from typing import Final

from zofo.disk.files import (
    file_digest,
    read_json,
    reason_of_failed_write,
    require_regular,
    temporary_prefix,
)
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
        is_checkpoint: whether to replace a folder at `place`, and whether files may be added to it
            later. If not, `place` must be empty or not exist, and its parents are created.

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
        _list_files(staged, is_complete=not is_checkpoint)
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


def files_below(folder: Path) -> dict[str, Path]:
    """Name in the folder -> path of everything below it that is no folder, sorted by path.

    Pipes, devices and links to nothing count, so that whoever opens a file finds and refuses them.
    """
    paths = (path for path in sorted(folder.rglob("*")) if not path.is_dir())
    return {path.relative_to(folder).as_posix(): path for path in paths}


def difference_from_list(folder: Path) -> str | None:
    """The first difference between a folder and the list of its files, in words.

    The names in the list are never opened, because it may come from anyone. To a checkpoint, files
    may be added. In an export, files that no loader reads may differ: hidden ones, those without an
    ending such as LICENSE, and the model card.

    Returns:
        None if there is no difference, or no list, as in folders of older versions.

    Raises:
        UserError: if the list, or a file in the folder, cannot be read.
    """
    if not os.path.lexists(folder / LIST_FILE):
        return None
    content = read_json(folder / LIST_FILE)
    try:
        files = content["files"].items()
        listed = {str(name): (f["bytes"], f["blake2b"]) for name, f in files}
        is_complete = content.get("is_complete", False)
    except (KeyError, TypeError, AttributeError) as error:
        return f"{LIST_FILE} cannot be read ({error!r})"
    present = files_below(folder)
    for name, (size, digest) in listed.items():
        if is_complete and not _is_loaded(name):
            continue
        if name not in present:
            return f"{name} is missing"
        # Comparing the sizes first finds a truncated file without reading it.
        file = present[name]
        if require_regular(file) != size or file_digest(file) != digest:
            return f"{name} is damaged (its digest differs from the recorded one)"
    foreign = [name for name in present if name not in listed and _is_loaded(name)]
    return f"{foreign[0]} does not belong to it" if is_complete and foreign else None


def _is_loaded(name: str) -> bool:
    path = PurePosixPath(name)
    is_hidden = any(part.startswith(".") for part in path.parts)
    return not is_hidden and path.suffix not in ("", ".md") and name != LIST_FILE


def _list_files(folder: Path, *, is_complete: bool) -> None:
    files = {
        name: {"bytes": path.stat().st_size, "blake2b": file_digest(path)}
        for name, path in files_below(folder).items()
    }
    listed = {"format": 1, "is_complete": is_complete, "files": files}
    (folder / LIST_FILE).write_text(json.dumps(listed, indent=2) + "\n", encoding="utf-8")


def _flush(path: Path) -> None:
    if path.is_dir() and os.name == "nt":  # Windows cannot open folders.
        return
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
