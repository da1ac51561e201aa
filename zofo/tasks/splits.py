"""Splits rows into train, dev and test, so that dev and test never leak into training."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final

import numpy as np

from zofo.errors import UserError
from zofo.tasks.spec import Sizes

_MOST_HELD_OUT: Final = 0.4
"""Largest share of the rows for a carved part without a size: training needs most rows (choice)."""


def shuffled(rows: Sequence[Any], seed: int) -> list[Any]:
    """The rows in an order that depends only on the seed and on their number."""
    order = np.random.Generator(np.random.Philox(seed)).permutation(len(rows))
    return [rows[i] for i in order]


def key_of(example: Any) -> str:
    """The text by which duplicates are found; case and blanks do not count."""
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
    """Shuffle the rows, carve missing parts from train, remove duplicates, and cut to size.

    A training row whose text is also in dev or test is dropped, and so is a dev row whose text is
    also in test. The test set stays as it is. A carved part shares no group of rows with the parts
    that remain.

    Args:
        train: rows to train on and to carve from.
        dev: rows to select on, or None to carve them.
        test: rows to report on, or None to carve them.
        sizes: numbers of rows of train, dev and test. None: `limits` decides.
        limits: largest numbers of rows of parts without a size. None: all rows; for a carved part,
            a fraction of them.
        fractions: shares of the rows for a carved dev and test without size and limit.
        seed: seed of the shuffle.

    Returns:
        train, dev, test and notes on what was dropped.

    Raises:
        UserError: if there are too few rows.
    """
    notes: list[str] = []
    pool = shuffled(train, seed)
    if dev is None or test is None:
        # A duplicate could end up on both sides of a split. The first of equal rows stays.
        unique = list({key_of(row): row for row in reversed(pool)}.values())[::-1]
        if len(unique) < len(pool):
            notes.append(f"{len(pool) - len(unique)} duplicate rows dropped before splitting")
        pool = unique
    total = len(pool)
    # The test rows are carved first, so that they do not depend on the other sizes.
    if test is None:
        size = sizes[2] or _carved_size(limits[2], fractions[1], total)
        final_test, pool = _carve(pool, size, "test", total, notes)
    else:
        final_test = cut(shuffled(test, seed), sizes[2], limits[2], "test")
    # A given test set counts as a whole, so that the other parts do not depend on num_test.
    test_keys = {key_of(row) for row in (*final_test, *(test or ()))}
    num_before = len(pool)
    pool = [row for row in pool if key_of(row) not in test_keys]
    num_dropped = num_before - len(pool)
    final_dev: list[Any] = []
    if dev is not None:
        final_dev = [row for row in shuffled(dev, seed) if key_of(row) not in test_keys]
        if len(final_dev) < len(dev):
            notes.append(f"{len(dev) - len(final_dev)} dev rows dropped: also in test")
        final_dev = cut(final_dev, sizes[1], limits[1], "dev")
    elif pool:
        size = sizes[1] or _carved_size(limits[1], fractions[0], total)
        final_dev, pool = _carve(pool, size, "dev", total, notes)
    dev_keys = {key_of(row) for row in final_dev}
    final_train = [row for row in pool if key_of(row) not in dev_keys]
    num_dropped += len(pool) - len(final_train)
    if num_dropped:
        notes.append(f"{num_dropped} training rows dropped: also in dev or test")
    if not final_dev:
        raise UserError("no dev rows are left outside test; give other rows")
    if not final_train:
        raise UserError("no training rows are left; give more rows")
    final_train = cut(final_train, sizes[0], limits[0], "train")
    return tuple(final_train), tuple(final_dev), tuple(final_test), tuple(notes)


def _carved_size(limit: int | None, fraction: float, total: int) -> int:
    usual = fraction * total if limit is None else min(limit, int(_MOST_HELD_OUT * total))
    return max(1, round(usual))


def _carve(
    pool: list[Any], size: int, part: str, total: int, notes: list[str]
) -> tuple[list[Any], list[Any]]:
    """The rows of a new part, and the rows of the pool that share no group with them."""
    if size >= len(pool):
        raise UserError(
            f"{size} rows were asked for {part}, and {len(pool)} are left of {total}; lower "
            f"num_{part} or give a {part} file"
        )
    # In this order a carved part splits at most one group, and the rest of it is dropped.
    ordered = _by_group(pool)
    carved, rest = ordered[:size], set(map(id, ordered[size:]))
    groups = {_group(row) for row in carved} - {""}
    left = [row for row in pool if id(row) in rest and _group(row) not in groups]
    if len(left) < len(rest):
        notes.append(f"{len(rest) - len(left)} rows dropped: {part} has others of their group")
    return carved, left


def _group(row: Any) -> str:
    return str(getattr(row, "group", ""))


def _by_group(rows: Sequence[Any]) -> list[Any]:
    """Put the rows of each group together, at the position of the first of them."""
    first: dict[Any, int] = {}
    for i, row in enumerate(rows):
        first.setdefault(_group(row) or id(row), i)
    # Rows without a group count as groups of their own; sorted() is stable.
    return sorted(rows, key=lambda row: first[_group(row) or id(row)])


def cut(rows: list[Any], size: int | None, limit: int | None, what: str) -> list[Any]:
    """The first `size` rows, or at most `limit`; raises UserError if there are too few."""
    if size is None:
        return rows[:limit]
    if size > len(rows):
        raise UserError(f"num_{what} is {size}, but there are {len(rows)} rows; lower it")
    return rows[:size]
