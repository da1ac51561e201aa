"""A second task, whose score shows during training what it does to another ability."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from torch import nn

from zofo.disk.files import json_digest
from zofo.errors import UserError
from zofo.saved.manifest import BaseSpec
from zofo.scoring.evaluate import Metrics, evaluate
from zofo.scoring.generate import Writer, writer_for
from zofo.scoring.score import require_classes
from zofo.tasks.digests import RowDigests
from zofo.tasks.encode import Collator, Encoded, encoder_for
from zofo.tasks.encode_rows import encode_parts
from zofo.tasks.load import in_watch_task, load_dev
from zofo.tasks.spec import Kind, Splits, TaskSpec


@dataclass(frozen=True)
class Watched:
    """The rows of a second task, ready to be scored.

    Attributes:
        name: name of the task.
        kind: kind of the task.
        rows: its encoded dev rows.
        collator: makes batches of the rows.
        writer: generates the answers of tasks with generated answers.
        batch_size: rows per forward pass.
        digest: of the rows, by which a resumed run recognises them.
        notes: what was done to the rows.
    """

    name: str
    kind: Kind
    rows: Sequence[Encoded]
    collator: Collator
    writer: Writer
    batch_size: int
    digest: str
    notes: tuple[str, ...]

    def measure(self, model: nn.Module, progress: Callable[[int], None] | None = None) -> Metrics:
        """The scores of the model; `progress` is called with the number of rows just done."""
        return evaluate(
            model,
            self.rows,
            self.collator,
            kind=self.kind,
            batch_size=self.batch_size,
            progress=progress,
            writer=self.writer,
        )


def read_watched(
    spec: TaskSpec, base: BaseSpec, labels: Sequence[str], *, seed: int, tokenizer: Any
) -> Splits:
    """Read the dev rows of a second task.

    Args:
        spec: its options.
        base: the model that will be scored.
        labels: the classes of its head, if it has a classification head.
        seed: seed of the splits.
        tokenizer: holds the chat template.

    Raises:
        UserError: for bad rows, or classes that the head does not have.
    """
    with _naming_watch_task():
        known = labels if base.head == "classification" else ()
        splits = load_dev(spec, seed=seed, tokenizer=tokenizer, labels=known)
        require_classes(base, splits)
    return splits


def encode_watched(
    spec: TaskSpec, splits: Splits, base: BaseSpec, tokenizer: Any, model: Any, *, batch_size: int
) -> Watched:
    """Encode what `read_watched` has read.

    Args:
        spec: options of the task.
        splits: its rows.
        base: names the head.
        tokenizer: the model's tokenizer.
        model: the model with its adapter.
        batch_size: rows per forward pass.

    Raises:
        UserError: if the model cannot read a row.
    """
    with _naming_watch_task():
        rows, notes = encode_parts(
            encoder_for(tokenizer, base.head, spec), splits, model, parts=["dev"]
        )
    return Watched(
        spec.name,
        splits.kind,
        rows["dev"],
        Collator(tokenizer.pad_token_id),
        writer_for(tokenizer, spec),
        batch_size,
        json_digest(RowDigests.of(splits).parts["dev"]),
        tuple(map(in_watch_task, notes)),
    )


@contextmanager
def _naming_watch_task() -> Iterator[None]:
    try:
        yield
    except UserError as error:
        raise UserError(in_watch_task(str(error))) from error
