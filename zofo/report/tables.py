"""The tables of a report, for the page and for the terminal alike.

A cell has what is shown and what it is sorted by; numbers are sorted, and tested, unrounded.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from zofo.pages.tables import Cell, Column, Table, make_table
from zofo.results.comparison import Comparison, Group, Pair, treatment_of
from zofo.statistics.estimates import Estimate, Ranks

_MIB = 2**20
_OUTCOMES = {"win": "won", "loss": "lost", "tie": "tie", "undecided": "undecided"}


def group_table(comparison: Comparison) -> Table:
    """The main table: scores with intervals, and costs, one row a group."""
    groups = comparison.groups
    per_cell: dict[Any, int] = {}
    for group in groups:
        cell = (group.model, group.task, group.method, group.adapter, group.optimizer)
        per_cell[cell] = per_cell.get(cell, 0) + 1
    columns = [
        Column("method", "method", False),
        Column("task", "task", False),
        Column("model", "model", False),
        Column("base_lr", "base_lr"),
        Column("adapter_lr", "adapter_lr"),
        Column("setting", "options", False),
        Column("seeds", "seeds"),
        Column("accuracy", "accuracy, % [95% interval]"),
        Column("auc", "AUC"),
        Column("majority", "majority, %"),
        Column("accuracy_before", "before, %"),
        Column("best_dev_loss", "dev loss"),
        Column("forward_equivalents", "forward-eq."),
        Column("train_s", "training, s"),
        Column("peak_memory_bytes", "peak, MiB"),
        Column("artifact_bytes", "to store, KiB"),
    ]
    rows = []
    for group in groups:
        cell = (group.model, group.task, group.method, group.adapter, group.optimizer)
        stands = "stands for its cell" if group.is_chosen and per_cell[cell] > 1 else ""
        rows.append(
            (
                Cell(name := treatment_of(group, groups), name, stands, mark="name short"),
                Cell(group.task, group.task),
                Cell(group.model, group.model),
                _rate(group.base_lr),
                _rate(group.adapter_lr),
                Cell(group.setting, group.setting),
                Cell(str(len(group.seeds)), float(len(group.seeds))),
                _score(group),
                estimate_cell(group.auc, 1, ".3f", with_interval=False),
                _number(group.majority, ".1f", 100),
                estimate_cell(group.accuracy_before, 100, ".1f", with_interval=False),
                estimate_cell(group.best_dev_loss, 1, ".4f", with_interval=False),
                _number(group.costs["forward_equivalents"], ",.0f"),
                _number(group.costs["train_s"], ",.1f"),
                _number(group.costs["peak_memory_bytes"], ",.0f", 1 / _MIB),
                _number(group.costs["artifact_bytes"], ",.0f", 1 / 1024),
            )
        )
    return make_table(columns, rows)


def _score(group: Group) -> Cell:
    cell = estimate_cell(group.accuracy, 100, ".2f")
    if group.majority is not None and group.accuracy.mean <= group.majority:
        return Cell(cell.text, cell.value, f"{cell.aside} ≤ majority".strip(), mark="weak")
    return cell


def pair_table(pairs: Sequence[Pair]) -> Table:
    """Hybrid against fo-peft, one row a pair."""
    columns = [
        Column("task", "task", False),
        Column("model", "model", False),
        Column("adapter", "adapter", False),
        Column("optimizer", "optimizer", False),
        Column("hybrid", "hybrid, %"),
        Column("fo_peft", "fo-peft, %"),
        Column("difference", "difference, points [95% interval]"),
        Column("seeds", "seeds"),
        Column("outcome", "outcome", False),
        Column("forward_equivalents", "× forward-eq."),
        Column("train_s", "× seconds"),
        Column("peak_memory_bytes", "× peak memory"),
        Column("unlike", "other options that differ", False),
    ]
    rows = []
    for pair in pairs:
        group, difference = pair.hybrid, pair.difference
        rows.append(
            (
                Cell(group.task, group.task, mark="name"),
                Cell(group.model, group.model),
                Cell(group.adapter, group.adapter),
                Cell(group.optimizer, group.optimizer),
                _number(pair.hybrid_mean, ".2f", 100),
                _number(pair.fo_peft_mean, ".2f", 100),
                estimate_cell(difference.estimate, 100, "+.2f"),
                Cell(str(len(difference.seeds)), float(len(difference.seeds))),
                Cell(
                    _OUTCOMES[difference.outcome],
                    difference.outcome,
                    mark=f"outcome {difference.outcome}",
                ),
                *(
                    _number(pair.cost_ratios[cost], ".2f")
                    for cost in ("forward_equivalents", "train_s", "peak_memory_bytes")
                ),
                Cell(_unlike(pair.unlike), _unlike(pair.unlike)),
            )
        )
    return make_table(columns, rows)


def reach_table(pairs: Sequence[Pair]) -> Table:
    """What it took to reach fo-peft's best dev loss, one row a pair."""
    columns = [
        Column("task", "task", False),
        Column("model", "model", False),
        Column("adapter", "adapter", False),
        Column("optimizer", "optimizer", False),
        Column("reached", "seeds in which hybrid got there"),
    ]
    for cost, title in (
        ("step", "steps"),
        ("forward_equivalents", "forward-eq."),
        ("elapsed_s", "seconds"),
    ):
        columns += [
            Column(f"hybrid_{cost}", f"{title}, hybrid"),
            Column(f"fo_peft_{cost}", f"{title}, fo-peft"),
        ]
    rows = []
    for pair in pairs:
        group, num = pair.hybrid, len(pair.difference.seeds)
        row = [
            Cell(group.task, group.task, mark="name"),
            Cell(group.model, group.model),
            Cell(group.adapter, group.adapter),
            Cell(group.optimizer, group.optimizer),
            Cell(f"{pair.num_reached} of {num}", float(pair.num_reached)),
        ]
        for cost, form in (
            ("step", ",.0f"),
            ("forward_equivalents", ",.0f"),
            ("elapsed_s", ",.1f"),
        ):
            for spent in pair.reach[cost] or (None, None):
                never = spent is not None and math.isinf(spent)
                row.append(Cell("never", math.inf) if never else _number(spent, form))
        rows.append(row)
    return make_table(columns, rows)


def rank_table(ranks: Ranks) -> Table:
    """Mean ranks, and Nemenyi's p-values against each other treatment."""
    names = list(ranks.mean_ranks)
    columns = [
        Column("method", "method", False),
        Column("rank", "mean rank"),
        *(Column(f"p_{i}", f"p against {name}") for i, name in enumerate(names)),
    ]
    rows = []
    for name, rank in ranks.mean_ranks.items():
        row = [Cell(name, name, mark="name"), _number(rank, ".2f")]
        for other in names:
            p_value = ranks.p_values.get((name, other), ranks.p_values.get((other, name)))
            row.append(_number(p_value, ".3f") if other != name else Cell("–", None))
        rows.append(row)
    return make_table(columns, rows)


def run_table(rows: Sequence[Any], links: Mapping[str, str], reasons: Mapping[str, str]) -> Table:
    """All runs, or some of them.

    Args:
        rows: of `Runs.table`.
        links: run -> where its folder lies.
        reasons: run -> why it is not compared.
    """
    columns = [
        Column("run", "run", False),
        Column("status", "status", False),
        Column("why", "why", False),
        Column("stage", "stage", False),
        Column("task", "task", False),
        Column("model", "model", False),
        Column("method", "method", False),
        Column("adapter", "adapter", False),
        Column("base_lr", "base_lr"),
        Column("adapter_lr", "adapter_lr"),
        Column("seed", "seed"),
        Column("steps", "steps"),
        Column("accuracy", "accuracy, %"),
        Column("best_dev_loss", "best dev loss"),
        Column("train_s", "training, s"),
    ]
    found = []
    for row in rows:
        steps = _number(row.steps, ",.0f")
        if _known(row.planned_steps) is not None:
            steps = Cell(f"{steps.text or '0'} of {row.planned_steps:,.0f}", steps.value)
        why = row.error or reasons.get(row.run, "")
        why = why or ("no result yet" if row.status == "unfinished" else "")
        found.append(
            (
                Cell(row.run, row.run, href=links[row.run], mark="name"),
                Cell(row.status, row.status, mark=f"status {row.status}"),
                Cell(why, why),
                Cell(row.stage, row.stage),
                Cell(row.task, row.task),
                Cell(row.model, row.model),
                Cell(row.method, row.method),
                Cell(row.adapter if row.adapter != "none" else "", row.adapter),
                _rate(row.base_lr),
                _rate(row.adapter_lr),
                _number(row.seed, ".0f"),
                steps,
                _number(row.accuracy, ".2f", 100),
                _number(row.best_dev_loss, ".4f"),
                _number(row.train_s, ",.1f"),
            )
        )
    return make_table(columns, found)


def estimate_cell(
    estimate: Estimate | None, scale: float, form: str, *, with_interval: bool = True
) -> Cell:
    """A mean, with its interval beside it; sorted by the mean, unscaled."""
    if estimate is None:
        return Cell("", None)
    text = f"{scale * estimate.mean:{form}}"
    if not with_interval:
        return Cell(text, estimate.mean)
    if estimate.low is None or estimate.high is None:
        return Cell(text, estimate.mean, "no interval")
    interval = f"[{scale * estimate.low:{form}}, {scale * estimate.high:{form}}]"
    return Cell(text, estimate.mean, interval)


def _rate(rate: float | str | None) -> Cell:
    """A learning rate; a map of them is text."""
    return Cell(rate, rate) if isinstance(rate, str) else _number(rate, "g")


def _number(value: float | None, form: str, scale: float = 1) -> Cell:
    known = _known(value)
    return Cell("", None) if known is None else Cell(f"{scale * known:{form}}", known)


def _known(value: float | None) -> float | None:
    return None if value is None or math.isnan(value) else float(value)


def _unlike(options: Mapping[str, tuple[Any, Any]]) -> str:
    return "; ".join(f"{key}: {ours} against {theirs}" for key, (ours, theirs) in options.items())
