"""Notes on the sizes and classes of a task's splits, which tell how far a score can be trusted.

A note gives the share of the commonest class in test, which is the accuracy of guessing. Two more
notes warn of fewer training rows than dev rows, and of few test rows.
"""

from __future__ import annotations

from typing import Final

from zofo.tasks.spec import Splits

_COARSE: Final = 0.005
"""A note appears if one test row is worth more accuracy than this half point (choice)."""
_MOST_LISTED: Final = 10


def split_notes(splits: Splits) -> tuple[str, ...]:
    """Notes on a task's splits, for the user and for the record."""
    if not all((splits.train, splits.dev, splits.test)):  # a run whose rows are gone
        return ()
    found = []
    num_train, num_dev, num_test = len(splits.train), len(splits.dev), len(splits.test)
    has_candidates = splits.kind in ("classification", "choice")
    if has_candidates:
        found.append(_balance(splits))
    if num_train < num_dev:
        found.append(
            f"{num_train} rows to train on and {num_dev} to select on: lower task.num_dev, because "
            "most rows help more in training"
        )
    if has_candidates and 1 / num_test > _COARSE:
        found.append(
            f"{num_test} test rows: one is worth {100 / num_test:.2g} points of accuracy, so a "
            "difference of a few rows may be chance"
        )
    return tuple(found)


def _balance(splits: Splits) -> str:
    parts = {part: splits.part(part) for part in ("train", "dev", "test")}
    # Choice tasks have no class names, so candidates are counted by their position.
    num = max(len(row.candidates) for rows in parts.values() for row in rows)
    names = splits.labels or [f"candidate {i + 1}" for i in range(num)]
    counts = {
        part: [sum(row.gold == i for row in rows) for i in range(len(names))]
        for part, rows in parts.items()
    }
    most = max(range(len(names)), key=lambda i: counts["test"][i])
    share = counts["test"][most] / len(splits.test)
    guess = f"always {names[most]} is right in {100 * share:.1f}% of test"
    if len(names) > _MOST_LISTED:
        return f"{len(names)} classes; {guess}"
    listed = "; ".join(f"{part} {' / '.join(map(str, c))}" for part, c in counts.items())
    return f"right answers ({' / '.join(names)}): {listed}; {guess}"
