"""What sizes and classes say about a score before it is measured.

Worth a remark:

    the commonest class of the test rows            what guessing reaches
    fewer rows to train on than to select on
    few test rows                                   one is worth 1 / rows of accuracy
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final

from zofo.tasks.spec import Kind

_COARSE: Final = 0.005
"""Accuracy that one test row may be worth without a remark: half a point (choice)."""
_MOST_LISTED: Final = 10


def remarks(
    kind: Kind,
    labels: Sequence[str],
    train: Sequence[Any],
    dev: Sequence[Any],
    test: Sequence[Any],
) -> tuple[str, ...]:
    """Remarks on a task's parts, for people and for the record."""
    found = []
    if kind in ("classification", "choice"):
        found.append(_balance(labels, train, dev, test))
    if len(train) < len(dev):
        found.append(
            f"{len(train)} rows to train on and {len(dev)} to select on: lower task.num_dev, most "
            "rows are worth more in training"
        )
    if kind in ("classification", "choice") and 1 / len(test) > _COARSE:
        found.append(
            f"{len(test)} test rows: one is worth {100 / len(test):.2g} points of accuracy, "
            "differences of a few of them are chance"
        )
    return tuple(found)


def _balance(
    labels: Sequence[str], train: Sequence[Any], dev: Sequence[Any], test: Sequence[Any]
) -> str:
    num = max(max(len(row.candidates) for row in part) for part in (train, dev, test))
    names = labels or [f"candidate {i + 1}" for i in range(num)]
    counts = {
        part: [sum(row.gold == i for row in rows) for i in range(len(names))]
        for part, rows in (("train", train), ("dev", dev), ("test", test))
    }
    most = max(range(len(names)), key=lambda i: counts["test"][i])
    share = counts["test"][most] / len(test)
    guess = f"always {names[most]} is right in {100 * share:.1f}% of test"
    if len(names) > _MOST_LISTED:
        return f"{len(names)} classes; {guess}"
    listed = "; ".join(f"{part} {' / '.join(map(str, c))}" for part, c in counts.items())
    return f"right answers ({' / '.join(names)}): {listed}; {guess}"
