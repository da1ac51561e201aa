"""From rows to train, dev and test: dev and test never leak into training."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final

import numpy as np

from zofo.errors import UserError

Sizes = tuple[int | None, int | None, int | None]
_MOST_HELD_OUT: Final = 0.4
"""Of the rows, for a carved part that nobody gave a size: most rows stay for training (choice)."""


def shuffled(rows: Sequence[Any], seed: int) -> list[Any]:
    """The rows in an order that depends on the seed and their number only."""
    order = np.random.Generator(np.random.Philox(seed)).permutation(len(rows))
    return [rows[i] for i in order]


def key_of(example: Any) -> str:
    """A row's text, by which duplicates are found: case and blanks do not count."""
    text = example.text if isinstance(example.text, str) else "\n".join(example.text)
    return " ".join(text.casefold().split())


def separate(
    train: Sequence[Any],
    dev: Sequence[Any] | None,
    test: Sequence[Any] | None,
    *,
    sizes: Sizes,
    limits: Sizes = (None, None, None),
    fractions: tuple[float, float] = (0.1, 0.2),
    seed: int,
) -> tuple[tuple[Any, ...], tuple[Any, ...], tuple[Any, ...], tuple[str, ...]]:
    """Shuffle, carve what is missing from train, remove duplicates, cut to size.

    A row of dev or test whose text also stands in a later part is dropped from train first, then
    from dev: the test set stays what it is. Rows of one group are not spread over a carved part and
    an earlier one.

    Args:
        train: rows to train on and to carve from.
        dev: rows to select on, or None.
        test: rows to report on, or None.
        sizes: numbers of rows of train, dev and test; None: as `limits` says.
        limits: the most rows of parts without a size; None: all there are (for carved parts, a
            fraction).
        fractions: of the rows for a carved dev and test without size and limit.
        seed: of the shuffle.

    Returns:
        train, dev, test and notes.

    Raises:
        UserError: if there are too few rows.
    """
    notes = []
    pool = shuffled(train, seed)
    once = list({key_of(example): example for example in reversed(pool)}.values())[::-1]
    if dev is None or test is None:
        if len(once) < len(pool):
            notes.append(f"{len(pool) - len(once)} duplicate rows dropped before splitting")
        pool = once
    total = len(pool)

    def carve(part: int, what: str) -> list[Any]:
        limit = limits[part]
        if limit is None:
            usual = max(1, round(fractions[part - 1] * total))
        else:
            usual = min(limit, max(1, int(_MOST_HELD_OUT * total)))
        wanted = sizes[part] or usual
        if wanted >= len(pool):
            raise UserError(
                f"{wanted} rows were asked for {what}, and {len(pool)} are left of {total}; lower "
                f"num_{what} or give a {what} file"
            )
        carved = _by_group(pool)[:wanted]
        taken, groups = set(map(id, carved)), {_group(row) for row in carved}
        left = [row for row in pool if id(row) not in taken]
        pool[:] = [row for row in left if not _group(row) or _group(row) not in groups]
        if len(pool) < len(left):
            notes.append(f"{len(left) - len(pool)} rows dropped: {what} has others of their group")
        return carved

    # The test rows are carved first: they do not depend on the other sizes.
    chosen_test = (
        carve(2, "test")
        if test is None
        else _cut(shuffled(test, seed), sizes[2], limits[2], "test")
    )
    tested = {key_of(example) for example in (*chosen_test, *(test or ()))}
    num_left = len(pool)
    pool[:] = [example for example in pool if key_of(example) not in tested]
    num_dropped = num_left - len(pool)
    if dev is None:
        clean_dev = carve(1, "dev") if pool else []
    else:
        chosen_dev = shuffled(dev, seed)
        clean_dev = [example for example in chosen_dev if key_of(example) not in tested]
        if len(clean_dev) < len(chosen_dev):
            notes.append(f"{len(chosen_dev) - len(clean_dev)} dev rows dropped: also in test")
        clean_dev = _cut(clean_dev, sizes[1], limits[1], "dev")
    selected = {key_of(example) for example in clean_dev}
    clean_train = [example for example in pool if key_of(example) not in selected]
    num_dropped += len(pool) - len(clean_train)
    if num_dropped:
        notes.append(f"{num_dropped} training rows dropped: also in dev or test")
    if not clean_dev:
        raise UserError("no dev rows are left that are not in test too; give others")
    if not clean_train:
        raise UserError("no training rows are left; give more rows")
    return (
        tuple(_cut(clean_train, sizes[0], limits[0], "train")),
        tuple(clean_dev),
        tuple(chosen_test),
        tuple(notes),
    )


def _group(row: Any) -> str:
    return str(getattr(row, "group", ""))


def _by_group(rows: Sequence[Any]) -> list[Any]:
    """The rows of a group together, where the first of them stands."""
    first: dict[Any, int] = {}
    for i, row in enumerate(rows):
        first.setdefault(_group(row) or id(row), i)
    return sorted(rows, key=lambda row: first[_group(row) or id(row)])


def _cut(rows: list[Any], size: int | None, limit: int | None, what: str) -> list[Any]:
    if size is None:
        return rows[:limit]
    if size > len(rows):
        raise UserError(f"num_{what} is {size}, but there are {len(rows)} rows; lower it")
    return rows[:size]
