"""Chooses learning rates by dev scores alone.

    rates of a cell = argmin over pairs of mean over the choosing seeds of the dev score

This module reads no file, and a `DevScore` holds no test score, so a choice cannot depend on the
test rows. A pair cannot be chosen if one of its runs failed or was stopped.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from zofo.study.grid import Cell, Grid, Pair


@dataclass(frozen=True)
class DevScore:
    """The dev score of a run that has ended: its loss, or 1 − accuracy; lower is better.

    `score` is None if the run failed or was stopped.
    """

    cell: Cell
    rates: Pair
    seed: int
    score: float | None


@dataclass(frozen=True)
class Choice:
    """The chosen pair of a cell, and the mean dev score of each pair.

    A pair with a failed or stopped run, or a score that is not finite, has the mean None. `rates`
    is None if all means are None.
    """

    rates: Pair | None
    scores: dict[Pair, float | None]


def choose(grid: Grid, scores: Iterable[DevScore]) -> dict[Cell, Choice]:
    """The choice of every cell whose search has ended, from the scores of ended runs."""
    known = {(s.cell, s.rates, s.seed): s.score for s in scores}
    seeds, found = grid.spec.choosing_seeds, {}
    for cell, pairs in grid.rates.items():
        # A choice before the last run has ended would depend on the order of the runs.
        if all((cell, pair, seed) in known for pair in pairs for seed in seeds):
            found[cell] = _choice({p: [known[cell, p, seed] for seed in seeds] for p in pairs})
    return found


def _choice(scores: Mapping[Pair, Sequence[float | None]]) -> Choice:
    means: dict[Pair, float | None] = {}
    for pair, by_seed in scores.items():
        finite = [s for s in by_seed if s is not None and math.isfinite(s)]
        # fsum rounds once, so the mean does not depend on the order of the seeds.
        means[pair] = math.fsum(finite) / len(finite) if len(finite) == len(by_seed) else None
    # Pairs are in ascending order, and among equal means the first wins: the smallest rates.
    left = {pair: mean for pair, mean in means.items() if mean is not None}
    return Choice(min(left, key=lambda pair: left[pair], default=None), means)
