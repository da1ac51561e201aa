"""Scores an artefact on the rows of its task."""

from __future__ import annotations

import warnings
from collections.abc import Callable

from zofo.errors import UserError
from zofo.saved.artifact import Artifact
from zofo.saved.manifest import BaseSpec
from zofo.scoring.evaluate import Metrics, evaluate
from zofo.scoring.generate import writer_for
from zofo.tasks.encode import Collator, encoder_for
from zofo.tasks.encode_rows import encode_parts
from zofo.tasks.leakage import check_rows, check_tasks, has_same_rows
from zofo.tasks.load import load_splits
from zofo.tasks.spec import Splits, TaskSpec


def evaluate_artifact(
    artifact: Artifact,
    task: TaskSpec,
    *,
    seed: int = 0,
    part: str = "test",
    batch_size: int = 32,
    progress: Callable[[int], None] | None = None,
    report: Callable[[str], None] = warnings.warn,
) -> Metrics:
    """Scores of a loaded model on a task's rows.

    Labels are matched with the classes of the model by name. If the data has changed since
    training, the rows of the run are found in it.

    Args:
        artifact: the model.
        task: the task to measure it on.
        seed: seed of the splits.
        part: "train", "dev" or "test".
        batch_size: rows per forward pass.
        progress: called with the number of rows just done.
        report: called with a sentence if the data has changed.

    Raises:
        UserError: if the data cannot be read or does not suit the model, if the model was trained
            or selected on test rows, or if no row of the run's part is left.
    """
    seeds = (artifact.base.seed, seed)
    is_same = False
    if artifact.task is not None:
        check_tasks(artifact.task["name"], task.name)
        is_same = seeds[0] == seed and has_same_rows(artifact.task, task)
    known = artifact.rows if is_same else None
    splits = load_splits(
        task, seed=seed, tokenizer=artifact.tokenizer, labels=_classes(artifact, task), known=known
    )
    require_classes(artifact.base, splits)
    if not splits.part(part):
        raise UserError(
            f"no {part} row of the run is left in the data ({splits.lost}); put the rows back, or "
            "name a file of other rows in task.test"
        )
    if splits.changes:
        report(splits.changes)
    if artifact.task is not None and part == "test" and known is None:
        check_rows(
            artifact.task,
            task,
            splits.test,
            seeds=seeds,
            tokenizer=artifact.tokenizer,
            digests=artifact.rows,
        )
    encoder = encoder_for(artifact.tokenizer, artifact.base.head, task)
    rows, notes = encode_parts(encoder, splits, artifact.model, [part])
    for note in notes:
        warnings.warn(note, stacklevel=2)
    return evaluate(
        artifact.model,
        rows[part],
        Collator(artifact.tokenizer.pad_token_id),
        kind=splits.kind,
        batch_size=batch_size,
        progress=progress,
        writer=writer_for(artifact.tokenizer, task),
    )


def _classes(artifact: Artifact, task: TaskSpec) -> tuple[str, ...]:
    """The classes to match the labels of a task with; empty for the task's own."""
    # A decoder scores words. Another task brings its own, of which the decoder needs no class.
    is_own = task.name == "classification" and (artifact.task or {}).get("name") == task.name
    return artifact.labels if is_own or artifact.base.head == "classification" else ()


def require_classes(base: BaseSpec, splits: Splits) -> None:
    """Raise UserError if a classification head cannot score the classes of the splits."""
    num_classes = base.num_labels
    if base.head == "classification" and len(splits.labels) != num_classes:
        raise UserError(
            f"the model has {num_classes} classes, and the task has {len(splits.labels)} "
            f"({', '.join(splits.labels) or 'none'}); choose the task it was trained on"
        )
