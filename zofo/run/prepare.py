"""Prepare a run before its first step: folder, data, model and adapter."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import nn

from zofo.config.schema import RunConfig
from zofo.disk.files import fingerprint, problem_of_target
from zofo.errors import UserError
from zofo.optim.blocks import split_parameters
from zofo.optim.methods import METHODS
from zofo.saved.artifact import BaseSpec
from zofo.saved.source import base_of
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
    tokenizer = config.model.tokenizer() if config.task.name == "chat" else None
    splits = load_splits(
        config.task, seed=config.seed, tokenizer=tokenizer, labels=labels, known=known
    )
    if splits.lost:
        raise UserError(
            f"the data has changed since the run began: {splits.lost}. Put the old rows back to "
            "continue it, or begin a new run with another output_dir"
        )
    base = base_of(config, splits)
    model, tokenizer = base.load()
    if METHODS[config.method].needs_adapter:
        model = config.adapter.build(model, base.head, tokenizer, seed=config.seed)
    encoder = encoder_for(tokenizer, base.head, config.task)
    rows, notes = encode_parts(encoder, splits, model)
    splits = replace(splits, notes=splits.notes + notes)
    return Prepared(
        base,
        model,
        tokenizer,
        splits,
        rows,
        Collator(tokenizer.pad_token_id),
        fingerprint(split_parameters(model).base),
    )


def num_steps(config: RunConfig, num_rows: int) -> int:
    """The number of optimizer steps of a run on that many training rows."""
    if config.steps is not None:
        return config.steps
    per_epoch = -(-num_rows // (config.batch_size * config.accumulation))  # rounded up
    return max(1, round(float(config.epochs or 1) * per_epoch))


def new_folder(config: RunConfig) -> Path:
    """The path of the run folder: the configured one, or a default name with a number.

    Raises:
        UserError: if the configured folder is not empty, or cannot be written.
    """
    if config.output_dir is not None:
        folder = Path(config.output_dir).expanduser()
        if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
            raise UserError(
                f"output_dir {folder} exists and is not empty; choose another, remove it, or "
                f"continue it with 'zofo train --resume {folder}'"
            )
        problem = problem_of_target(folder, is_folder=True)
        if problem is not None:
            raise UserError(f"output_dir {problem}")
        return folder
    name = f"{config.task.name}-{config.method}"
    if config.adapter.label != "none":
        name += f"-{config.adapter.label}"
    number = 1
    while (folder := Path("runs") / (name if number == 1 else f"{name}-{number}")).exists():
        number += 1
    return folder
