"""Scores an artefact on the rows of its task."""

from __future__ import annotations

import warnings
from collections.abc import Callable

from zofo.errors import UserError
from zofo.saved.artifact import Artifact
from zofo.scoring.evaluate import Metrics, evaluate
from zofo.scoring.generate import writer_for
from zofo.tasks.encode import Collator, encoder_for
from zofo.tasks.encode_rows import encode_parts
from zofo.tasks.leakage import check_rows, check_tasks
from zofo.tasks.load import load_splits
from zofo.tasks.spec import TaskSpec


def evaluate_artifact(
    artifact: Artifact,
    task: TaskSpec,
    *,
    seed: int = 0,
    part: str = "test",
    batch_size: int = 32,
    progress: Callable[[int], None] | None = None,
) -> Metrics:
    """Scores of a loaded model on a task's rows.

    Raises:
        UserError: if the data cannot be read or does not suit the model, or if the model was
            trained or selected on test rows.
    """
    if artifact.task is not None:
        check_tasks(artifact.task["name"], task.name)
    splits = load_splits(task, seed=seed, tokenizer=artifact.tokenizer)
    if artifact.base.head == "classification" and len(splits.labels) != artifact.base.num_labels:
        raise UserError(
            f"the model has {artifact.base.num_labels} classes, and the task has "
            f"{len(splits.labels)} ({', '.join(splits.labels) or 'none'}); choose the task it was "
            "trained on"
        )
    if artifact.task is not None and part == "test":
        seeds = (artifact.base.seed, seed)
        check_rows(artifact.task, task, splits.test, seeds=seeds, tokenizer=artifact.tokenizer)
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
