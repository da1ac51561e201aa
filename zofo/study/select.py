"""Chooses learning rates by dev scores alone.

    rates of a cell = argmin over pairs of mean over the choosing seeds of the dev score

This module reads no file, and a `DevScore` holds no test score, so a choice cannot depend on the
test rows. A pair is out of the choice if one of its runs failed or was stopped.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from zofo.study.grid import Cell, Grid, Pair


@dataclass(frozen=True)
class DevScore:
    """The dev score of an ended run: its loss, or one minus its accuracy; lower is better.

    `score` is None if the run failed, was stopped, or has no finite score.
    """

    cell: Cell
    rates: Pair
    seed: int
    score: float | None


@dataclass(frozen=True)
class Choice:
    """The chosen pair of a cell, and the mean dev score of each pair.

    `rates` is None if every pair has a failed or stopped run; such a pair's score is None.
    """

    rates: Pair | None
    scores: dict[Pair, float | None]


def choose(grid: Grid, scores: Iterable[DevScore]) -> dict[Cell, Choice]:
    """The choice of every cell whose search has ended.

    Args:
        grid: the study.
        scores: of the runs that have ended, in any order.
    """
    known = {(s.cell, s.rates, s.seed): s.score for s in scores}
    found = {}
    for cell, pairs in grid.rates.items():
        wanted = [(cell, pair, seed) for pair in pairs for seed in grid.spec.choosing_seeds]
        if all(key in known for key in wanted):
            found[cell] = _choice(cell, pairs, grid.spec.choosing_seeds, known)
    return found


def _choice(
    cell: Cell,
    pairs: tuple[Pair, ...],
    seeds: tuple[int, ...],
    known: Mapping[tuple[Cell, Pair, int], float | None],
) -> Choice:
    means: dict[Pair, float | None] = {}
    for pair in pairs:
        scores = [known[cell, pair, seed] for seed in seeds]
        finite = [s for s in scores if s is not None and math.isfinite(s)]
        means[pair] = math.fsum(finite) / len(finite) if len(finite) == len(scores) else None
    left = [(mean, _size(pair), pair) for pair, mean in means.items() if mean is not None]
    return Choice(min(left)[2] if left else None, means)


def _size(pair: Pair) -> tuple[float, float]:
    """Of equal scores the smallest rates win: of the base first."""
    return pair.base_lr or 0.0, pair.adapter_lr or 0.0
