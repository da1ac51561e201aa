"""Prepare a run before its first step: folder, data, model and adapter."""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import nn

from zofo.config.schema import RunConfig, has_own_rows
from zofo.disk.files import fingerprint, problem_of_target
from zofo.disk.locks import LOCK_FILE, take_lock
from zofo.environment import resolve_device
from zofo.errors import UserError
from zofo.models.quantized import notes_on_unnesting
from zofo.optim.batch_part import num_rows_of
from zofo.optim.blocks import check_can_move, split_parameters
from zofo.optim.methods import METHODS
from zofo.perturb.quantized import unnest_scales
from zofo.saved.artifact import BaseSpec
from zofo.saved.layout import CONFIG_FILE
from zofo.saved.source import base_of
from zofo.scoring.watched import Watched, encode_watched, read_watched
from zofo.sections import MAX_COUNT
from zofo.tasks.digests import RowDigests
from zofo.tasks.encode import Collator, Encoded, encoder_for
from zofo.tasks.encode_rows import encode_parts
from zofo.tasks.load import load_splits
from zofo.tasks.spec import Splits


@dataclass(frozen=True)
class Prepared:
    """The checked parts of a run before training."""

    base: BaseSpec
    model: nn.Module  # with the adapter attached
    tokenizer: Any
    splits: Splits
    rows: dict[str, list[Encoded]]  # part of the data -> encoded rows
    collator: Collator
    base_fingerprint: str  # of the base before training
    watched: Watched | None = None  # the second task


def prepare(
    config: RunConfig, *, known: RowDigests | None = None, labels: Sequence[str] = ()
) -> Prepared:
    """Read the data and the model, attach the adapter and encode the rows.

    Args:
        config: the configuration.
        known: the rows of the run that is continued; None for a new run.
        labels: the classes of the run that is continued.

    Raises:
        UserError: for anything wrong with the data, the model or the adapter, or if a row of the
            run that is continued has changed.
    """
    # Only the task "chat" needs the tokenizer to read its rows.
    is_chat = "chat" in (config.task.name, config.watch_task and config.watch_task.name)
    tokenizer = config.model.tokenizer() if is_chat else None
    splits = load_splits(
        config.task, seed=config.seed, tokenizer=tokenizer, labels=labels, known=known
    )
    if splits.lost:
        raise UserError(
            f"the data has changed since the run began: {splits.lost}. Put the old rows back to "
            "continue it, or begin a new run with another output_dir"
        )
    base, second = base_of(config, splits), config.watch_task
    if second is not None:
        watched_splits = read_watched(
            second, base, splits.labels, seed=config.seed, tokenizer=tokenizer
        )
    model, tokenizer = base.load(resolve_device(config.device))
    unnested = 0
    order = METHODS[config.method].base
    if order == "zeroth":
        unnested = unnest_scales(model)
    if order == "first":
        check_can_move(model, config.method, by_gradient=True)
    if METHODS[config.method].needs_adapter:
        model = config.adapter.build(model, base.head, tokenizer, seed=config.seed)
    encoder = encoder_for(tokenizer, base.head, config.task)
    rows, notes = encode_parts(
        encoder, splits, model, may_be_empty=() if config.measure_test else ("test",)
    )
    watched = None
    if second is not None:
        watched = encode_watched(
            second, watched_splits, base, tokenizer, model, batch_size=config.eval_batch_size
        )
        notes = (*notes, *watched.notes)
    splits = replace(splits, notes=(*splits.notes, *notes, *notes_on_unnesting(unnested)))
    return Prepared(
        base,
        model,
        tokenizer,
        splits,
        rows,
        Collator(tokenizer.pad_token_id),
        fingerprint(split_parameters(model).base),
        watched,
    )


def num_steps(config: RunConfig, num_rows: int) -> int:
    """The number of optimizer steps of a run on that many training rows.

    Raises:
        UserError: if they are more than the counters of the directions hold.
    """
    if config.steps is not None:
        return config.steps
    per_epoch = -(-num_rows // (config.batch_size * config.accumulation))  # rounded up
    steps = max(1, round(float(config.epochs or 1) * per_epoch))
    if steps > MAX_COUNT:
        raise UserError(
            f"epochs is {config.epochs:g}, which means {steps} steps of {num_rows} rows; the "
            "number must be less than 2^32. Give fewer epochs"
        )
    return steps


def check_processes(config: RunConfig, size: int) -> None:
    """Check that the processes of a run can share each micro-batch.

    Raises:
        UserError: if its rows, or those that the base sees, cannot be shared evenly.
    """
    fraction, num_rows = config.base_batch_fraction, config.batch_size
    if size > 1 and has_own_rows(config):
        raise UserError(
            f"zo_objective is {config.zo_objective}, whose rows one process evaluates, and there "
            f"are {size} processes; start one"
        )
    if size > 1 and config.base_anchor:
        raise UserError(
            f"base_anchor is {config.base_anchor}, which needs one process, and there are {size}; "
            "start one, or set it to 0"
        )
    if num_rows % size:
        raise UserError(
            f"batch_size is {num_rows}, which the {size} processes share, and it is not divisible "
            f"by {size}; give a multiple, such as {-(-num_rows // size) * size}"
        )
    if num_rows_of(fraction, num_rows // size) * size != num_rows_of(fraction, num_rows):
        raise UserError(
            f"base_batch_fraction={fraction} of batch_size={num_rows} is no equal number of rows "
            f"for each of the {size} processes; raise either, or start fewer processes"
        )


def check_folder(config: RunConfig) -> None:
    """Check the configured run folder, or the folder `runs` of the default names.

    Raises:
        UserError: if a run cannot be written there.
    """
    if config.output_dir is None:
        problem = problem_of_target(Path("runs"), is_folder=True)
        if problem is not None:
            raise UserError(f"{problem}, or name one by output_dir=FOLDER")
        return
    folder = Path(config.output_dir).expanduser()
    problem = problem_of_target(folder, is_folder=True)
    if problem is not None:
        raise UserError(f"output_dir {problem}")
    if folder.exists() and not _is_empty(folder):
        raise UserError(
            f"output_dir {folder} exists and is not empty; choose another, remove it, or "
            f"continue it with 'zofo train --resume {folder}'"
        )


@contextmanager
def run_folder(
    config: RunConfig, resume: Path | None = None, *, name: str | None = None
) -> Iterator[Path]:
    """A run folder that no other process uses until the block ends.

    A folder into which nothing was written is removed at the end.

    Args:
        config: names the folder, or else the default name.
        resume: a run folder to continue, instead.
        name: default name in `runs`, to which a number may be added; None for that of a run.

    Raises:
        UserError: if the folder is in use, is not empty or cannot be written, or if it was removed
            before the block ended.
    """
    made: list[Path] = []
    folder = resume
    if folder is None:
        check_folder(config)
        folder, made = _make_folder(config, name or default_name(config))
    lock = take_lock(folder / LOCK_FILE)
    if lock is None:
        raise UserError(
            f"{folder} is in use: another process trains in it; wait until it has ended, or begin "
            "another run with another output_dir"
        )
    # Until the file is closed, no other file gets its number, by which it is recognised.
    with lock, (folder / LOCK_FILE).open("rb") as held:
        try:
            if resume is None:  # Another run may have ended there since the first check.
                check_folder(config.model_copy(update={"output_dir": str(folder)}))
            yield folder
            require_kept(folder, held.fileno())
        except Exception:
            require_kept(folder, held.fileno())  # What else went wrong is a consequence.
            raise
        finally:
            if resume is None and _is_empty(folder):
                with suppress(OSError):
                    (folder / LOCK_FILE).unlink()
                    for path in made:
                        path.rmdir()


def require_kept(folder: Path, lock: int | None = None) -> None:
    """Refuse to go on in a folder that was removed, which a file written there would make again.

    Args:
        folder: the run folder.
        lock: the open lock file of the run; None to look for the configuration only.

    Raises:
        UserError: if the folder was removed, even if another run has begun there since.
    """
    is_kept = (folder / CONFIG_FILE).exists()
    with suppress(FileNotFoundError):
        if lock is not None:
            is_kept = os.path.samestat(os.fstat(lock), (folder / LOCK_FILE).stat())
    if not is_kept:
        raise UserError(
            f"{folder} was removed during the run, so its result is lost; begin the run again, and "
            "leave the folder until the run has ended"
        )


def default_name(config: RunConfig) -> str:
    """The default name of a run folder: task, method and adapter."""
    parts = (config.task.name, config.method, config.adapter.label)
    return "-".join(part for part in parts if part != "none")


def _make_folder(config: RunConfig, name: str) -> tuple[Path, list[Path]]:
    """Make the run folder; return it and the folders that were made, the innermost first."""
    given = config.output_dir
    for number in itertools.count(1):
        numbered = name if number == 1 else f"{name}-{number}"
        folder = Path("runs") / numbered if given is None else Path(given).expanduser()
        made = [path for path in (folder, *folder.parents) if not path.exists()]
        try:
            # Of two runs that begin together, the system lets one make the folder.
            folder.mkdir(parents=True, exist_ok=given is not None)
        except OSError as error:
            if isinstance(error, FileExistsError) and given is None and folder.exists():
                continue
            reason = error.strerror or error
            raise UserError(f"cannot make {folder} ({reason}); choose another folder") from error
        return folder, made
    raise AssertionError


def _is_empty(folder: Path) -> bool:
    """Whether a folder holds nothing but a lock."""
    return folder.is_dir() and all(path.name == LOCK_FILE for path in folder.iterdir())
