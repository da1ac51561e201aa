"""Refuses test rows that a model was trained or selected on.

A score on such rows does not carry over to new rows. `zofo.tasks.splits` keeps the splits of one
task apart. For another task, seed or size this module compares the test rows with the digests of
the run's rows, and with the training rows, which it reads again. It refuses pairs of tasks that are
known to share rows even if the training rows are missing.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Final

from zofo.errors import UserError
from zofo.tasks.classify import template_columns
from zofo.tasks.digests import RowDigests, text_digest
from zofo.tasks.spec import TaskSpec
from zofo.tasks.splits import key_of

SHARED_ROWS: Final[Mapping[frozenset[str], str]] = {
    frozenset(("rotten-tomatoes", "sst2")): (
        "SST-2 is made of Rotten Tomatoes: 84% of the sentences of its validation split are there"
    ),
}
"""Pairs of tasks that share rows -> how many."""
_UNRELATED: Final = {"template", "verbalizers", "max_length", "objective"}
"""Options that change how rows are shown, but not which rows there are."""


def check_tasks(trained_on: str, name: str) -> None:
    """Raise UserError if a task is known to share rows with the one a model was trained on."""
    shared = SHARED_ROWS.get(frozenset((trained_on, name)))
    if shared is not None:
        raise UserError(
            f"the model was trained on {trained_on}, so it cannot be measured on {name}: {shared}. "
            f"Choose another task, or train on {name}"
        )


def has_same_rows(trained: Mapping[str, Any], spec: TaskSpec) -> bool:
    """Whether a task has the rows of the one that a model was trained on, with the same texts."""
    known = TaskSpec(**trained)
    if known.model_dump(exclude=_UNRELATED) != spec.model_dump(exclude=_UNRELATED):
        return False
    return _columns(known) == _columns(spec)


def _columns(spec: TaskSpec) -> tuple[str, ...]:
    """The columns that the text of a row is made of, as far as the template decides it."""
    from zofo.tasks.families.table import BUILTIN

    if spec.name in BUILTIN and BUILTIN[spec.name].measure is None:
        return ()
    return (spec.text,) if spec.template is None else template_columns(spec.template)


def check_rows(
    trained: Mapping[str, Any],
    spec: TaskSpec,
    rows: Sequence[Any],
    *,
    seeds: tuple[int, int],
    tokenizer: Any = None,
    digests: RowDigests | None = None,
) -> None:
    """Refuse test rows that a model was trained or selected on.

    Args:
        trained: options of the task that the model was trained on.
        spec: options of the task to measure it on.
        rows: the test rows.
        seeds: seed of the training splits, and seed of these splits.
        tokenizer: holds the chat template.
        digests: the rows of the run; None for a model of an older version.

    Raises:
        UserError: with the number of shared rows, and some of them.
    """
    from zofo.tasks.load import load_splits

    known = TaskSpec(**trained)
    is_unchanged = known.model_dump(exclude=_UNRELATED) == spec.model_dump(exclude=_UNRELATED)
    if seeds[0] == seeds[1] and is_unchanged:
        # These are the same splits, which `zofo.tasks.splits` keeps apart, if the data is the same.
        if (
            digests is not None
            and load_splits(known, seed=seeds[0], tokenizer=tokenizer, known=digests).changes
        ):
            raise UserError(
                "the data has changed since training, and task.template shows other columns than "
                "those by which the run's rows are found; leave it out, or put the old data back"
            )
        return
    if digests is not None:
        seen = digests.texts("train", "dev")
        _refuse(rows, [row for row in rows if text_digest(row) in seen])
    try:
        splits = load_splits(known, seed=seeds[0], tokenizer=tokenizer, known=digests)
    except UserError:  # the training rows are gone, so there is nothing to compare with
        return
    source = {"name", "train", "dev", "test", "subset", "data_dir"}
    is_same = known.model_dump(include=source) == spec.model_dump(include=source)
    key = key_of if is_same else letters_of
    used = {key(row) for row in (*splits.train, *splits.dev)}
    _refuse(rows, [row for row in rows if key(row) in used])


def _refuse(rows: Sequence[Any], found: Sequence[Any]) -> None:
    if found:
        some = ", ".join(str(row.row) for row in found[:5]) + (", ..." if len(found) > 5 else "")
        raise UserError(
            f"{len(found)} of the {len(rows)} test rows are rows that the model was trained or "
            f"selected on (rows {some}); remove them, or measure with the task, sizes and seed of "
            "its run"
        )


def letters_of(row: Any) -> str:
    """A row's letters and digits, because sources write blanks and punctuation differently."""
    text = key_of(row)
    return "".join(c for c in text if c.isalnum()) or text
