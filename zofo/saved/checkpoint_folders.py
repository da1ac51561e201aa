"""Find, check and remove checkpoint folders.

zofo writes a checkpoint under a hidden name, lists its files with their digests, flushes everything
to the disk and then renames the folder. It removes older checkpoints last. A kill, a full disk or a
power cut therefore leaves the older checkpoints intact, and the digests reveal later damage.
"""

from __future__ import annotations

import zipfile
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from zofo.disk.files import (
    MAX_LOG_BYTES,
    read_json_object,
    read_tensors,
    require_regular,
    temporary_prefix,
)
from zofo.disk.folders import LIST_FILE, difference_from_list, discard, remove_partial, restore
from zofo.errors import UserError, shown
from zofo.models.saved_adapters import names_in
from zofo.optim.methods import METHODS
from zofo.optim.trajectory import TRAJECTORY_FILE, Trajectory
from zofo.saved.layout import (
    ACCOUNTS_FILE,
    CHECKPOINT_PREFIX,
    CONFIG_FILE,
    STATE_FILE,
    WRITTEN_WHOLE,
)


def remove_leftovers(run_folder: Path) -> None:
    """Remove the temporary files and folders of a run that was killed."""
    remove_partial(run_folder, f".{CHECKPOINT_PREFIX}*")
    for name in WRITTEN_WHOLE:  # `zofo.disk.files.replacing` writes them.
        for path in run_folder.glob(f"{temporary_prefix(Path(name))}????????"):
            with suppress(OSError):
                path.unlink(missing_ok=True)


def step_of(folder: Path) -> int | None:
    """The number N of a folder `checkpoint-N`; None for other names."""
    number = folder.name.removeprefix(CHECKPOINT_PREFIX)
    is_one = folder.name.startswith(CHECKPOINT_PREFIX) and number.isdecimal() and folder.is_dir()
    return int(number) if is_one else None


def checkpoints(run_folder: Path) -> dict[int, Path]:
    """Step -> folder of every checkpoint, whether damaged or not."""
    restore(run_folder)  # A kill may have come between the two renames that replace a checkpoint.
    found = ((step_of(path), path) for path in run_folder.glob(f"{CHECKPOINT_PREFIX}*"))
    return dict(sorted((step, path) for step, path in found if step is not None))


def rotate(run_folder: Path, limit: int | None, *, newest: int, best: int | None) -> None:
    """Remove the oldest checkpoints beyond `limit`, but keep those of steps `newest` and `best`.

    Checkpoints of later steps than `newest` remain from an earlier attempt. They are removed first.
    """
    if not limit or limit < 0:
        return
    found = checkpoints(run_folder)
    kept = {newest, best} & found.keys()
    # False sorts before True, so the steps after `newest` come first.
    for step in sorted(found.keys() - kept, key=lambda step: (step <= newest, step)):
        if len(found) <= max(limit, len(kept)):
            break
        discard(found.pop(step))


def newest_whole(run_folder: Path, report: Callable[[str], Any] | None = None) -> Path | None:
    """The undamaged checkpoint of the highest step.

    `report` is called with a message for each damaged checkpoint of a later step.
    """
    for _, path in sorted(checkpoints(run_folder).items(), reverse=True):
        damage = find_damage(path)
        if damage is None:
            return path
        if report is not None:
            report(f"{path} is skipped: {damage}")
    return None


def read_state(folder: Path) -> dict[str, Any]:
    """The state of Trainer in a checkpoint.

    Raises:
        UserError: if it is missing or damaged.
    """
    return read_json_object(folder / STATE_FILE, max_bytes=MAX_LOG_BYTES, has_nan=True)


def find_damage(folder: Path) -> str | None:
    """The first fault of a checkpoint, in words; None if it is whole."""
    try:
        step = read_state(folder).get("global_step")
        if step != step_of(folder):
            return f"{STATE_FILE} belongs to step {shown(step)}"
        return difference_from_list(folder) or _find_unreadable(folder)
    except UserError as error:
        return str(error)
    except OSError as error:
        return f"it cannot be read ({error})"


def find_misfit(folder: Path, method: str, run_id: str | None) -> str | None:
    """How a checkpoint differs from the run in whose folder it lies; None if it belongs there.

    Args:
        folder: the checkpoint.
        method: the method of the run.
        run_id: the identifier of the run; None in folders of older versions.

    Raises:
        UserError: if its record is damaged.
    """
    path, orders = folder / ACCOUNTS_FILE, METHODS[method]
    owner = read_json_object(path, has_nan=True).get("run") if path.is_file() else None
    why = None
    if None not in (owner, run_id) and owner != run_id:
        why = f"its {ACCOUNTS_FILE} names another"
    elif bool(names_in(folder)) != orders.needs_adapter:
        why = (
            f"it holds {'no' if orders.needs_adapter else 'an'} adapter, and the method is {method}"
        )
    elif (folder / TRAJECTORY_FILE).is_file() != (orders.base == "zeroth"):
        has = "no updates" if orders.base == "zeroth" else "updates"
        why = f"it holds {has} of the base, and the method is {method}"
    if why is None:
        return None
    remedy = f"remove it, or put the run's own {CONFIG_FILE} back"
    return f"{folder} belongs to another run ({why}); {remedy}"


def find_bad_pickle(folder: Path) -> Path | None:
    """The first of Trainer's own files that torch's restricted unpickler refuses, if any does.

    It makes only tensors, numbers and containers, and runs no code.
    """
    import torch
    from transformers.trainer import TRAINING_ARGS_NAME, safe_globals

    for file in sorted(p for end in ("pt", "pth", "bin") for p in folder.glob(f"*.{end}")):
        if file.name == TRAINING_ARGS_NAME:  # Nobody reads it.
            continue
        try:
            require_regular(file)
            with safe_globals():
                torch.load(file, map_location="cpu", weights_only=True)
        except Exception:
            return file
    return None


def _find_unreadable(folder: Path) -> str | None:
    """Read the trajectory, and without a list of digests also the tensors and the archives."""
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
