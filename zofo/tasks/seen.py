"""A model is not measured on rows that it was trained on, or whose kin it was trained on.

Scores on such rows say nothing about new ones. Within a task `zofo.tasks.splits` sees to it; across
tasks, seeds and sizes the rows of the training task are read again and compared. Pairs of tasks
that are known to share rows are refused even where the training rows are not at hand.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Final

from zofo.errors import UserError
from zofo.tasks.spec import TaskSpec
from zofo.tasks.splits import key_of

SHARED_ROWS: Final[Mapping[frozenset[str], str]] = {
    frozenset(("rotten-tomatoes", "sst2")): (
        "SST-2 is made of Rotten Tomatoes: 84% of the sentences of its validation split are there"
    ),
}
"""Pairs of tasks, and what they share."""
_UNRELATED: Final = {"template", "verbalizers", "max_length", "objective"}
"""Options that change how rows are shown and not which they are."""


def check_tasks(trained_on: str, name: str) -> None:
    """Refuse a task whose rows are known to be those of the task a model was trained on.

    Raises:
        UserError: with what they share.
    """
    shared = SHARED_ROWS.get(frozenset((trained_on, name)))
    if shared is not None:
        raise UserError(
            f"the model was trained on {trained_on}, so it cannot be measured on {name}: {shared}. "
            f"Choose another task, or train on {name}"
        )


def check_rows(
    trained: Mapping[str, Any],
    spec: TaskSpec,
    rows: Sequence[Any],
    *,
    seeds: tuple[int, int],
    tokenizer: Any = None,
) -> None:
    """Refuse test rows that a model was trained or selected on.

    Args:
        trained: options of the task it was trained on.
        spec: options of the task it is to be measured on.
        rows: the test rows.
        seeds: of the splits it was trained on, and of these.
        tokenizer: for chat's template.

    Raises:
        UserError: with the number of such rows, and some of them.
    """
    from zofo.tasks.load import load_splits

    known = TaskSpec(**trained)
    if seeds[0] == seeds[1] and _which_rows(known) == _which_rows(spec):
        return
    try:
        splits = load_splits(known, seed=seeds[0], tokenizer=tokenizer)
    except UserError:  # the training rows are not at hand any more
        return
    is_one_source = _source(known) == _source(spec)
    key = key_of if is_one_source else letters_of
    seen = {key(row) for row in (*splits.train, *splits.dev)}
    found = [row.row for row in rows if key(row) in seen]
    if found:
        some = ", ".join(map(str, found[:5])) + (", ..." if len(found) > 5 else "")
        raise UserError(
            f"{len(found)} of the {len(rows)} test rows are rows that the model was trained or "
            f"selected on (rows {some}); remove them, or measure with the task, sizes and seed of "
            "its run"
        )


def letters_of(row: Any) -> str:
    """A row's letters and digits: sources differ in how they write blanks and punctuation."""
    text = key_of(row)
    return "".join(c for c in text if c.isalnum()) or text


def _source(spec: TaskSpec) -> dict[str, Any]:
    return spec.model_dump(include={"name", "train", "dev", "test", "subset", "data_dir"})


def _which_rows(spec: TaskSpec) -> dict[str, Any]:
    return spec.model_dump(exclude=_UNRELATED)
