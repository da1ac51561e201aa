"""From rows to train, dev and test: dev and test never leak into training."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from zofo.errors import UserError


def shuffled(rows: Sequence[Any], seed: int) -> list[Any]:
    """The rows in an order that depends on the seed and their number only."""
    order = np.random.Generator(np.random.Philox(seed)).permutation(len(rows))
    return [rows[i] for i in order]


def _key(example: Any) -> str:
    return " ".join(example.text.casefold().split())


def separate(
    train: Sequence[Any],
    dev: Sequence[Any] | None,
    test: Sequence[Any] | None,
    *,
    sizes: tuple[int | None, int | None, int | None],
    fractions: tuple[float, float] = (0.1, 0.2),
    seed: int,
) -> tuple[tuple[Any, ...], tuple[Any, ...], tuple[Any, ...], tuple[str, ...]]:
    """Shuffle, carve what is missing from train, remove duplicates, cut to size.

    A row of dev or test whose text also stands in a later part is dropped from train first, then
    from dev: the test set stays what it is.

    Args:
        train: rows to train on and to carve from.
        dev: rows to select on, or None.
        test: rows to report on, or None.
        sizes: numbers of rows of train, dev and test; None: all there are (for carved parts, a
            fraction).
        fractions: of the rows for a carved dev and test without a size.
        seed: of the shuffle.

    Returns:
        train, dev, test and notes.

    Raises:
        UserError: if there are too few rows.
    """
    notes = []
    pool = shuffled(train, seed)
    once = list({_key(example): example for example in reversed(pool)}.values())[::-1]
    if dev is None or test is None:
        if len(once) < len(pool):
            notes.append(f"{len(pool) - len(once)} duplicate rows dropped before splitting")
        pool = once
    total = len(pool)

    def carve(size: int | None, fraction: float, what: str) -> list[Any]:
        wanted = size or max(1, round(fraction * total))
        if wanted >= len(pool):
            raise UserError(
                f"{wanted} rows were asked for {what}, and {len(pool)} are left of {total}; lower "
                f"num_{what} or give a {what} file"
            )
        part = pool[:wanted]
        del pool[:wanted]
        return part

    # The test rows are carved first: they do not depend on the other sizes.
    chosen_test = (
        carve(sizes[2], fractions[1], "test")
        if test is None
        else _cut(shuffled(test, seed), sizes[2], "test")
    )
    chosen_dev = carve(sizes[1], fractions[0], "dev") if dev is None else shuffled(dev, seed)

    tested = {_key(example) for example in chosen_test}
    if test is not None:
        tested |= {_key(example) for example in test}
    clean_dev = [example for example in chosen_dev if _key(example) not in tested]
    if len(clean_dev) < len(chosen_dev):
        notes.append(f"{len(chosen_dev) - len(clean_dev)} dev rows dropped: also in test")
    clean_dev = _cut(clean_dev, sizes[1], "dev")
    held_out = tested | {_key(example) for example in clean_dev}
    clean_train = [example for example in pool if _key(example) not in held_out]
    if len(clean_train) < len(pool):
        notes.append(f"{len(pool) - len(clean_train)} training rows dropped: also in dev or test")
    if not clean_dev:
        raise UserError("no dev rows are left that are not in test too; give others")
    if not clean_train:
        raise UserError("no training rows are left; give more rows")
    return (
        tuple(_cut(clean_train, sizes[0], "train")),
        tuple(clean_dev),
        tuple(chosen_test),
        tuple(notes),
    )


def _cut(rows: list[Any], size: int | None, what: str) -> list[Any]:
    if size is None:
        return rows
    if size > len(rows):
        raise UserError(f"num_{what} is {size}, but there are {len(rows)} rows; lower it")
    return rows[:size]
