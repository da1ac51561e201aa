"""Compares runs: groups over seeds, hybrid against fo-peft, ranks, and the learning rates tried.

A *group* is a set of runs that differ only in their seed. A *cell* is a model, task, method,
adapter and optimizer. If several learning rates were tried, a cell has several groups, and one of
them represents the cell: the choice of the study, or else the group with the lowest mean dev loss.
The test score is never used for this, because the best of several test scores is biased upwards. A
*pair* is hybrid and fo-peft of one model, task, adapter and optimizer.
"""

from __future__ import annotations

import math
import statistics as stdlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

from zofo.optim.methods import METHODS
from zofo.optim.options import STEP_KEYS
from zofo.results.table import Runs, is_apart
from zofo.statistics.estimates import (
    Difference,
    Estimate,
    Ranks,
    cost_to_reach,
    mean_interval,
    paired_difference,
    rank_treatments,
)

if TYPE_CHECKING:
    import pandas as pd

CELL: Final = ("model", "task", "method", "adapter", "optimizer")
COSTS: Final = ("forward_equivalents", "train_s", "peak_memory_bytes", "artifact_bytes")
CURVE_COSTS: Final = ("step", "forward_equivalents", "elapsed_s")
_ZEROTH_ONLY: Final = frozenset(
    (*STEP_KEYS, "base_batch_fraction", "base_weight_decay", "base_anchor")
)
"""Options without effect on fo-peft, so the two runs of a pair may differ in them."""


@dataclass(frozen=True)
class Group:
    """Runs that differ only in their seed.

    Attributes:
        model, task, method, adapter, optimizer: the cell.
        rates: both learning rates as text.
        setting: digest of the other options.
        base_lr: learning rate, or a map of several as text; None if the base is frozen.
        adapter_lr: learning rate; None if there is no adapter.
        runs, seeds: names and seeds of the runs, ordered by seed.
        is_chosen: whether the group represents its cell.
        accuracy, auc, accuracy_before, reward, reward_before, drift, best_dev_loss: means over
            seeds; None if not measured. Either the accuracy or the reward is known.
        majority: share of the most frequent class of the test rows.
        num_test: number of test rows.
        costs: mean of each of `COSTS`; None if not measured.
    """

    model: str
    task: str
    method: str
    adapter: str
    optimizer: str
    rates: str
    setting: str
    base_lr: float | str | None
    adapter_lr: float | None
    runs: tuple[str, ...]
    seeds: tuple[int, ...]
    is_chosen: bool
    accuracy: Estimate | None
    auc: Estimate | None
    accuracy_before: Estimate | None
    reward: Estimate | None
    reward_before: Estimate | None
    drift: Estimate | None
    best_dev_loss: Estimate | None
    majority: float | None
    num_test: int | None
    costs: dict[str, float | None]


@dataclass(frozen=True)
class Pair:
    """Hybrid against fo-peft.

    Attributes:
        hybrid, fo_peft: the groups.
        difference: difference of the test accuracies, hybrid − fo-peft.
        hybrid_mean, fo_peft_mean: mean test accuracy over the seeds that both have.
        values: seed -> difference.
        cost_ratios: mean cost of hybrid over that of fo-peft, for the same seeds.
        reach: cost -> medians over seeds for (hybrid, fo-peft), of the cost until the dev loss was
            at most fo-peft's best of that seed. A median is infinite if half of the seeds never
            reached this loss. None if a log lacks costs.
        num_reached: number of seeds in which hybrid reached this loss.
        unlike: option -> (value of hybrid, value of fo-peft), for options that should be equal.
    """

    hybrid: Group
    fo_peft: Group
    difference: Difference
    hybrid_mean: float
    fo_peft_mean: float
    values: dict[int, float]
    cost_ratios: dict[str, float | None]
    reach: dict[str, tuple[float, float] | None]
    num_reached: int
    unlike: dict[str, tuple[Any, Any]]


@dataclass(frozen=True)
class Grid:
    """Learning rates tried in one cell with otherwise equal options.

    Attributes:
        model, task, method, adapter, optimizer: the cell.
        points: (base_lr, adapter_lr, mean best dev loss, number of runs, whether these rates
            represent the cell). A rate is None if its block is frozen, the loss if none is known.
    """

    model: str
    task: str
    method: str
    adapter: str
    optimizer: str
    points: tuple[tuple[float | None, float | None, float | None, int, bool], ...]


@dataclass(frozen=True)
class Comparison:
    """The comparison of a set of runs.

    Attributes:
        groups: groups of finished runs that are not part of a search.
        pairs: pairs of the groups that represent their cells.
        ranks, no_ranks: ranks over tasks; None, with the reason in `no_ranks`.
        grids: cells in which more than one rate was tried.
        left_out: run -> why the comparison omits it.
    """

    groups: tuple[Group, ...]
    pairs: tuple[Pair, ...]
    ranks: Ranks | None
    no_ranks: str
    grids: tuple[Grid, ...]
    left_out: dict[str, str]


def compare(runs: Runs) -> Comparison:
    """Group, pair and rank runs."""
    left_out: dict[str, str] = {}
    groups = _groups(runs.table, left_out)
    ranks, no_ranks = _ranks(groups)
    pairs, grids = _pairs(groups, runs), _grids(runs.table, groups)
    return Comparison(groups, pairs, ranks, no_ranks, grids, left_out)


def _groups(table: pd.DataFrame, left_out: dict[str, str]) -> tuple[Group, ...]:
    finished = table[(table["stage"] == "final") & (table["status"] == "done")]
    has_score = finished["accuracy"].notna() | finished["reward"].notna()
    for name in finished["run"][~has_score]:
        left_out[str(name)] = "its result has no test score"
    finished = finished[has_score & finished["seed"].notna()]
    keys = [*CELL, "rates", "setting"]
    for _, same in finished.groupby([*keys, "seed"], sort=False):
        # A repetition is no second observation, so only the first of equal runs counts.
        for name in same["run"].iloc[1:]:
            left_out[str(name)] = f"same configuration and seed as {same['run'].iloc[0]}"
    finished = finished[~finished["run"].isin(left_out)]
    found: dict[Any, pd.DataFrame] = dict(iter(finished.groupby(keys, sort=False)))
    chosen = {_standing_for(cell, found) for cell in dict.fromkeys(key[:5] for key in found)}
    groups = [_group(key, rows, key in chosen) for key, rows in found.items()]
    # Methods in the order of `METHODS`, unknown ones last; a stable sort keeps the rates in order.
    place = {name: i for i, name in enumerate(METHODS)}
    known = {g.method: place.get(g.method, len(place)) for g in groups}
    return tuple(
        sorted(groups, key=lambda g: (g.model, g.task, known[g.method], g.adapter, g.optimizer))
    )


def _standing_for(cell: Any, found: Mapping[Any, pd.DataFrame]) -> Any:
    """The key of the group that represents a cell."""
    keys = [key for key in found if key[:5] == cell]
    by_study = [key for key in keys if found[key]["chosen"].any()]
    # The mean is NaN for a group without dev losses; such a group comes last.
    losses = {key: float(found[key]["best_dev_loss"].mean()) for key in by_study or keys}
    return min(losses, key=lambda key: math.inf if math.isnan(losses[key]) else losses[key])


def _group(key: Any, rows: pd.DataFrame, is_chosen: bool) -> Group:
    rows = rows.sort_values("seed")

    def over_seeds(column: str) -> Estimate | None:
        values = rows[column].dropna()
        return mean_interval(values.tolist()) if len(values) else None

    num_test = _first(rows["num_test"]) if rows["num_test"].nunique() == 1 else None
    return Group(
        **dict(zip((*CELL, "rates", "setting"), key, strict=True)),
        base_lr=_first(rows["base_lr"]),
        adapter_lr=_first(rows["adapter_lr"]),
        runs=tuple(rows["run"]),
        seeds=tuple(int(seed) for seed in rows["seed"]),
        is_chosen=is_chosen,
        accuracy=over_seeds("accuracy"),
        auc=over_seeds("auc"),
        accuracy_before=over_seeds("accuracy_before"),
        reward=over_seeds("reward"),
        reward_before=over_seeds("reward_before"),
        drift=over_seeds("drift"),
        best_dev_loss=over_seeds("best_dev_loss"),
        majority=_mean(rows["majority"]),
        num_test=None if num_test is None else int(num_test),
        costs={cost: _mean(rows[cost]) for cost in COSTS},
    )


def _pairs(groups: Sequence[Group], runs: Runs) -> tuple[Pair, ...]:
    chosen = {tuple(getattr(g, key) for key in CELL): g for g in groups if g.is_chosen}
    pairs = []
    for group in chosen.values():
        other = chosen.get((group.model, group.task, "fo-peft", group.adapter, group.optimizer))
        if group.method == "hybrid" and other is not None:
            pairs.append(_pair(group, other, runs))
    return tuple(pair for pair in pairs if pair is not None)


def _pair(hybrid: Group, fo_peft: Group, runs: Runs) -> Pair | None:
    table = runs.table.set_index("run")
    of_hybrid = dict(zip(hybrid.seeds, hybrid.runs, strict=True))
    of_peft = dict(zip(fo_peft.seeds, fo_peft.runs, strict=True))
    accuracy = table["accuracy"].dropna().to_dict()  # A run with rewards may have none.
    difference = paired_difference(
        {seed: accuracy[run] for seed, run in of_hybrid.items() if run in accuracy},
        {seed: accuracy[run] for seed, run in of_peft.items() if run in accuracy},
    )
    if difference is None:
        return None
    # Everything below is over the seeds that both have, so that the pairs stay paired.
    seeds = difference.seeds
    ratios: dict[str, float | None] = {}
    for cost in COSTS:
        ours = _mean(table.loc[[of_hybrid[s] for s in seeds], cost])
        theirs = _mean(table.loc[[of_peft[s] for s in seeds], cost])
        ratios[cost] = ours / theirs if ours is not None and theirs else None
    unlike = _unlike(*(runs.configs[run] for run in (of_hybrid[seeds[0]], of_peft[seeds[0]])))
    if hybrid.num_test != fo_peft.num_test:
        unlike["test rows"] = hybrid.num_test, fo_peft.num_test
    reach, num_reached = _reach([(of_hybrid[s], of_peft[s]) for s in seeds], runs.curves)
    return Pair(
        hybrid,
        fo_peft,
        difference,
        stdlib.fmean(accuracy[of_hybrid[s]] for s in seeds),
        stdlib.fmean(accuracy[of_peft[s]] for s in seeds),
        {s: accuracy[of_hybrid[s]] - accuracy[of_peft[s]] for s in seeds},
        ratios,
        reach,
        num_reached,
        unlike,
    )


def _reach(
    pairs: Sequence[tuple[str, str]], curves: pd.DataFrame
) -> tuple[dict[str, tuple[float, float] | None], int]:
    """The values `reach` and `num_reached` of a pair, from the (hybrid, fo-peft) runs per seed."""
    by_run = dict(iter(curves.groupby("run")))
    costs: dict[str, tuple[list[float], list[float]]] = {c: ([], []) for c in CURVE_COSTS}
    num_reached = 0
    for ours, theirs in pairs:
        if ours not in by_run or theirs not in by_run:
            continue
        best = float(by_run[theirs]["dev_loss"].min())  # both must reach fo-peft's lowest loss
        num_reached += bool((by_run[ours]["dev_loss"] <= best).any())
        for cost, (of_ours, of_theirs) in costs.items():
            of_ours.append(cost_to_reach(by_run[ours], best, cost))
            of_theirs.append(cost_to_reach(by_run[theirs], best, cost))
    medians: dict[str, tuple[float, float] | None] = {}
    for cost, both in costs.items():
        is_known = bool(both[0]) and not any(map(math.isnan, both[0] + both[1]))
        # The higher of two middle values: the cost at which half of the seeds reached the loss.
        medians[cost] = (
            (stdlib.median_high(both[0]), stdlib.median_high(both[1])) if is_known else None
        )
    return medians, num_reached


def _unlike(ours: Mapping[str, Any], theirs: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    keys = [k for k in dict.fromkeys((*ours, *theirs)) if not is_apart(k) and k not in _ZEROTH_ONLY]
    return {k: (ours.get(k), theirs.get(k)) for k in keys if ours.get(k) != theirs.get(k)}


def treatment_of(group: Group, groups: Sequence[Group]) -> str:
    """Method and adapter of a group, and its optimizer if the groups have several."""
    parts = [group.method]
    parts += [group.adapter] if group.adapter != "none" else []
    optimizers = {g.optimizer for g in groups if g.optimizer}
    parts += [group.optimizer] if len(optimizers) > 1 and group.optimizer else []
    return " ".join(parts)


def _ranks(groups: Sequence[Group]) -> tuple[Ranks | None, str]:
    """Ranks over (model, task); drops the rarest treatments until two blocks are complete."""
    import pandas as pd

    scored = [(g, g.accuracy.value) for g in groups if g.is_chosen and g.accuracy is not None]
    frame = pd.DataFrame(
        {
            "block": [f"{g.model}, {g.task}" for g, _ in scored],
            "treatment": [treatment_of(g, groups) for g, _ in scored],
            "accuracy": [accuracy for _, accuracy in scored],
        }
    )
    scores = frame.pivot(index="block", columns="treatment", values="accuracy")
    # A rank needs every treatment in its block, and a test of ranks needs three treatments.
    while scores.shape[1] > 3 and len(scores.dropna()) < 2:
        scores = scores.drop(columns=str(scores.notna().sum().idxmin()))
    complete = scores.dropna()
    if complete.shape[1] < 3:
        return None, "ranks over tasks need three methods or more"
    if len(complete) < 2:
        return None, "ranks need two tasks or more on which the same three methods have finished"
    return rank_treatments(complete), ""


def _grids(table: pd.DataFrame, groups: Sequence[Group]) -> tuple[Grid, ...]:
    chosen = {
        (*(getattr(g, key) for key in CELL), g.setting): g.rates for g in groups if g.is_chosen
    }
    tried = table[table["base_lr"].notna() | table["adapter_lr"].notna()]
    tried = tried[tried["status"] != "unfinished"]
    # A map of learning rates, stored as text, has no place on the axis of a grid.
    tried = tried[~tried["base_lr"].map(lambda rate: isinstance(rate, str)).astype(bool)]
    grids = []
    for key, rows in tried.groupby([*CELL, "setting"], sort=False):
        standing = set(rows["rates"][rows["chosen"]]) or {chosen.get(key)}
        # The chosen rates also have final runs with other seeds. Only the seeds of the search are
        # comparable with the other rates.
        searched = set(rows["seed"][rows["stage"] == "search"])
        rows = rows[rows["seed"].isin(searched)] if searched else rows
        if rows["rates"].nunique() < 2:
            continue
        points = tuple(
            (
                _first(same["base_lr"]),
                _first(same["adapter_lr"]),
                _mean(same["best_dev_loss"]),
                len(same),
                rates in standing,
            )
            for rates, same in rows.groupby("rates", sort=False)
        )
        cell: dict[str, Any] = dict(zip(CELL, key, strict=False))  # without the setting
        grids.append(Grid(**cell, points=points))
    return tuple(grids)


def _mean(values: pd.Series) -> float | None:
    values = values.dropna()
    return float(values.mean()) if len(values) else None


def _first(values: pd.Series) -> Any:
    """The first value that is not missing, or None."""
    values = values.dropna()
    return values.iloc[0] if len(values) else None
