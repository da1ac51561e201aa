"""Checkpoint folders that are whole or not there.

A checkpoint is written under a hidden name beside its place. When it is complete its files are
listed with their digests and flushed to the disk, and only then does the folder get its name; older
ones go after that. So a kill, a full disk or a power cut leaves the older checkpoints as they were,
and a checkpoint that was damaged later is told from a sound one.
"""

from __future__ import annotations

import json
import shutil
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from zofo.disk.files import file_digest, read_tensors
from zofo.disk.folders import HIDDEN, LIST_FILE, discard
from zofo.errors import UserError
from zofo.optim.trajectory import TRAJECTORY_FILE, Trajectory
from zofo.saved.layout import CHECKPOINT_PREFIX, STATE_FILE, WRITTEN_WHOLE


def remove_leftovers(run_folder: Path) -> None:
    """Remove what a killed run was writing or removing."""
    for path in run_folder.glob(f".{CHECKPOINT_PREFIX}*{HIDDEN}"):
        shutil.rmtree(path, ignore_errors=True)
    for name in WRITTEN_WHOLE:  # as zofo.disk.files.replacing names them
        for path in run_folder.glob(f".{name}.????????"):
            path.unlink(missing_ok=True)


def step_of(folder: Path) -> int | None:
    """The N of checkpoint-N; None for other names."""
    number = folder.name.removeprefix(CHECKPOINT_PREFIX)
    is_one = folder.name.startswith(CHECKPOINT_PREFIX) and number.isdecimal() and folder.is_dir()
    return int(number) if is_one else None


def checkpoints(run_folder: Path) -> dict[int, Path]:
    """Every checkpoint by its step, whole or not."""
    found = ((step_of(path), path) for path in run_folder.glob(f"{CHECKPOINT_PREFIX}*"))
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
        state = json.loads((folder / STATE_FILE).read_text(encoding="utf-8"))
        if state["global_step"] != step_of(folder):
            return f"{STATE_FILE} is of step {state['global_step']}"
    except FileNotFoundError:
        return f"{STATE_FILE} is missing"
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        return f"{STATE_FILE} cannot be read ({error!r})"
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
        if file.stat().st_size != size or file_digest(file) != digest:
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


def _read_json(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))
