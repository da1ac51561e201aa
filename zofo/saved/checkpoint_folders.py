"""Checkpoint folders that are whole or not there.

A checkpoint is written under a hidden name beside its place. When it is complete its files are
listed with their digests and flushed to the disk, and only then does the folder get its name; older
ones go after that. So a kill, a full disk or a power cut leaves the older checkpoints as they were,
and a checkpoint that was damaged later is told from a sound one.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

from zofo.disk.files import read_tensors
from zofo.errors import UserError
from zofo.optim.trajectory import TRAJECTORY_FILE, Trajectory

LIST_FILE: Final = "zofo_files.json"
"""Name, size and digest of every other file."""
_PREFIX: Final = "checkpoint-"
_HIDDEN: Final = ".partial"
_FILES: Final = (
    "run.yaml",
    "environment.json",
    "metrics.jsonl",
    "result.json",
    "stopped.json",
    "base_original.safetensors",
    "base_snapshot.safetensors",
)
"""Of a run folder, beside the checkpoints."""


@contextmanager
def writing_folder(place: Path) -> Iterator[Path]:
    """A hidden folder that becomes `place` when the block ends well.

    Raises:
        UserError: if it cannot be written; what lay at `place` is then still there.
    """
    hidden = place.parent / f".{place.name}{_HIDDEN}"
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
    hidden = folder.parent / f".{folder.name}.old{_HIDDEN}"
    shutil.rmtree(hidden, ignore_errors=True)
    folder.replace(hidden)
    shutil.rmtree(hidden, ignore_errors=True)


def remove_leftovers(run_folder: Path) -> None:
    """Remove what a killed run was writing or removing."""
    for path in run_folder.glob(f".{_PREFIX}*{_HIDDEN}"):
        shutil.rmtree(path, ignore_errors=True)
    for name in _FILES:  # as zofo.disk.files.replacing names them
        for path in run_folder.glob(f".{name}.????????"):
            path.unlink(missing_ok=True)


def step_of(folder: Path) -> int | None:
    """The N of checkpoint-N; None for other names."""
    number = folder.name.removeprefix(_PREFIX)
    is_one = folder.name.startswith(_PREFIX) and number.isdecimal() and folder.is_dir()
    return int(number) if is_one else None


def checkpoints(run_folder: Path) -> dict[int, Path]:
    """Every checkpoint by its step, whole or not."""
    found = ((step_of(path), path) for path in run_folder.glob(f"{_PREFIX}*"))
    return dict(sorted((step, path) for step, path in found if step is not None))


def rotate(run_folder: Path, limit: int | None, *, newest: int, best: int | None) -> None:
    """Remove the oldest checkpoints beyond `limit`, never the newest or the best.

    Those of later steps than `newest` are left from another attempt, and go first.
    """
    if not limit or limit < 0:
        return
    found = checkpoints(run_folder)
    kept = {newest, best} & found.keys()
    for step in sorted(found.keys() - kept, key=lambda step: (step <= newest, step)):
        if len(found) <= max(limit, len(kept)):
            break
        discard(found.pop(step))


def newest_whole(run_folder: Path, report: Callable[[str], Any] | None = None) -> Path | None:
    """The checkpoint of the highest step that is whole.

    Args:
        run_folder: where the checkpoints are.
        report: told of each damaged one that is passed over.
    """
    for _, path in sorted(checkpoints(run_folder).items(), reverse=True):
        damage = find_damage(path)
        if damage is None:
            return path
        if report is not None:
            report(f"{path} is passed over: {damage}")
    return None


def find_damage(folder: Path) -> str | None:
    """What is wrong with a checkpoint; None if it is whole."""
    try:
        state = json.loads((folder / "trainer_state.json").read_text(encoding="utf-8"))
        if state["global_step"] != step_of(folder):
            return f"trainer_state.json is of step {state['global_step']}"
    except FileNotFoundError:
        return "trainer_state.json is missing"
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        return f"trainer_state.json cannot be read ({error!r})"
    try:
        return _differences_from_list(folder) or _find_unreadable(folder)
    except UserError as error:
        return str(error)
    except OSError as error:
        return f"it cannot be read ({error})"


def _differences_from_list(folder: Path) -> str | None:
    """Checkpoints that Trainer wrote by itself, on several devices, have no list."""
    path = folder / LIST_FILE
    if not path.exists():
        return None
    try:
        listed = {str(n): (f["bytes"], f["blake2b"]) for n, f in _read_json(path)["files"].items()}
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        return f"{LIST_FILE} cannot be read ({error!r})"
    for name, (size, digest) in listed.items():
        file = folder / name
        if not file.is_file():
            return f"{name} is missing"
        if file.stat().st_size != size or _digest(file) != digest:
            return f"{name} is damaged (its digest does not fit)"
    return None


def _find_unreadable(folder: Path) -> str | None:
    if (folder / TRAJECTORY_FILE).exists():
        Trajectory.load(folder / TRAJECTORY_FILE)
    if (folder / LIST_FILE).exists():
        return None
    for file in folder.rglob("*.safetensors"):
        read_tensors(file)
    for file in (*folder.glob("*.pt"), *folder.glob("*.pth")):
        try:
            with zipfile.ZipFile(file) as archive:
                if archive.testzip() is not None:
                    return f"{file.name} is damaged"
        except zipfile.BadZipFile as error:
            return f"{file.name} is damaged ({error})"
    return None


def _seal(folder: Path) -> None:
    """List the files and flush everything to the disk."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    listed = {
        path.relative_to(folder).as_posix(): {
            "bytes": path.stat().st_size,
            "blake2b": _digest(path),
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


def _digest(path: Path) -> str:
    digest = hashlib.blake2b(digest_size=16)
    with path.open("rb") as file:
        while part := file.read(1 << 20):
            digest.update(part)
    return digest.hexdigest()


def _read_json(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


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
