"""The tables of a report, for the page and for the terminal.

A cell has a text that is shown and a value that it is sorted by. Only the text is rounded.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from zofo.pages.tables import Cell, Column, Columns, Table, make_short_table, text_cell
from zofo.results.comparison import Comparison, Group, Pair, treatment_of
from zofo.results.gate import Gate
from zofo.statistics.estimates import Difference, Estimate, Ranks

_MIB = 2**20
_OUTCOMES = {"win": "won", "loss": "lost", "tie": "tie", "undecided": "undecided"}


def group_table(comparison: Comparison) -> Table:
    """The main table: scores with intervals, and costs, with one row per group."""
    groups = comparison.groups

    def cell_of(group: Group) -> tuple[str, ...]:
        return group.model, group.task, group.method, group.adapter, group.optimizer

    sizes = Counter(map(cell_of, groups))

    def name(group: Group) -> Cell:
        is_one_of_many = group.is_chosen and sizes[cell_of(group)] > 1
        text = treatment_of(group, groups)
        return Cell(text, text, "represents its cell" if is_one_of_many else "", mark="name short")

    def accuracy(group: Group) -> Cell:
        cell, majority = estimate_cell(group.accuracy, 100, ".2f"), group.majority
        if group.accuracy and majority is not None and group.accuracy.value <= majority:
            return Cell(cell.text, cell.value, f"{cell.aside} ≤ majority".strip(), mark="weak")
        return cell

    def mean(key: str, form: str, scale: float = 1) -> Any:
        return lambda group: estimate_cell(getattr(group, key), scale, form, with_interval=False)

    def cost(key: str, form: str, scale: float = 1) -> Any:
        return lambda group: _number(group.costs[key], form, scale)

    columns: Columns = {
        Column("method", "method", False): name,
        Column("task", "task", False): lambda group: text_cell(group.task),
        Column("model", "model", False): lambda group: text_cell(group.model),
        Column("base_lr", "base_lr"): lambda group: _rate(group.base_lr),
        Column("adapter_lr", "adapter_lr"): lambda group: _rate(group.adapter_lr),
        Column("setting", "options", False): lambda group: text_cell(group.setting),
        Column("seeds", "seeds"): lambda group: _number(len(group.seeds), ".0f"),
        Column("accuracy", "accuracy, % [95% interval]"): accuracy,
        Column("auc", "AUC"): mean("auc", ".3f"),
        Column("majority", "majority, %"): lambda group: _number(group.majority, ".1f", 100),
        Column("accuracy_before", "before, %"): mean("accuracy_before", ".1f", 100),
        Column("reward", "held-out reward [95% interval]"): lambda group: estimate_cell(
            group.reward, 1, ".4g"
        ),
        Column("reward_before", "reward before"): mean("reward_before", ".4g"),
        Column("drift", "drift, nats"): mean("drift", ".3g"),
        Column("best_dev_loss", "dev loss"): mean("best_dev_loss", ".4f"),
        Column("forward_equivalents", "forward-eq."): cost("forward_equivalents", ",.0f"),
        Column("train_s", "training, s"): cost("train_s", ",.1f"),
        Column("peak_memory_bytes", "peak, MiB"): cost("peak_memory_bytes", ",.0f", 1 / _MIB),
        Column("artifact_bytes", "to store, KiB"): cost("artifact_bytes", ",.0f", 1 / 1024),
    }
    return make_short_table(columns, groups)


_OF_PAIR: Columns = {
    Column("task", "task", False): lambda pair: text_cell(pair.hybrid.task, "name"),
    Column("model", "model", False): lambda pair: text_cell(pair.hybrid.model),
    Column("adapter", "adapter", False): lambda pair: text_cell(pair.hybrid.adapter),
    Column("optimizer", "optimizer", False): lambda pair: text_cell(pair.hybrid.optimizer),
}


def pair_table(pairs: Sequence[Pair]) -> Table:
    """Hybrid against fo-peft, with one row per pair."""

    def outcome(pair: Pair) -> Cell:
        found = pair.difference.outcome
        return Cell(_OUTCOMES[found], found, mark=f"outcome {found}")

    def unlike(pair: Pair) -> Cell:
        texts = (f"{key}: {ours} against {theirs}" for key, (ours, theirs) in pair.unlike.items())
        return text_cell("; ".join(texts))

    def ratio(cost: str) -> Any:
        return lambda pair: _number(pair.cost_ratios[cost], ".2f")

    columns: Columns = {
        **_OF_PAIR,
        Column("hybrid", "hybrid, %"): lambda pair: _number(pair.hybrid_mean, ".2f", 100),
        Column("fo_peft", "fo-peft, %"): lambda pair: _number(pair.fo_peft_mean, ".2f", 100),
        Column("difference", "difference, points [95% interval]"): lambda pair: estimate_cell(
            pair.difference.estimate, 100, "+.2f"
        ),
        Column("seeds", "seeds"): lambda pair: _number(len(pair.difference.seeds), ".0f"),
        Column("outcome", "outcome", False): outcome,
        Column("seeds_to_decide", "seeds that would decide"): lambda pair: _more_seeds(
            pair.difference
        ),
        Column("forward_equivalents", "× forward-eq."): ratio("forward_equivalents"),
        Column("train_s", "× seconds"): ratio("train_s"),
        Column("peak_memory_bytes", "× peak memory"): ratio("peak_memory_bytes"),
        Column("unlike", "other options that differ", False): unlike,
    }
    return make_short_table(columns, pairs)


def gate_table(gates: Sequence[Gate]) -> Table:
    """Full fine-tuning against fo-peft, with one row per fo-peft group."""

    def of(key: str, mark: str = "") -> Any:
        return lambda gate: text_cell(getattr(gate.fo_peft, key), mark)

    columns: Columns = {
        Column("task", "task", False): of("task", "name"),
        Column("model", "model", False): of("model"),
        Column("adapter", "adapter", False): of("adapter"),
        Column("optimizer", "optimizer", False): of("optimizer"),
        Column("difference", "fo-ft − fo-peft, points [95% interval]"): lambda gate: estimate_cell(
            gate.difference.estimate, 100, "+.2f"
        ),
        Column("seeds", "seeds"): lambda gate: _number(len(gate.difference.seeds), ".0f"),
        Column("state", "room for the base", False): lambda gate: text_cell(gate.state),
        Column("seeds_to_decide", "seeds that would decide"): lambda gate: _more_seeds(
            gate.difference
        ),
        Column("forward_equivalents", "× forward-eq."): lambda g: _number(g.cost_ratio, ".2f"),
    }
    return make_short_table(columns, gates)


def reach_table(pairs: Sequence[Pair]) -> Table:
    """The costs until fo-peft's best dev loss was reached, with one row per pair."""

    def reached(pair: Pair) -> Cell:
        return Cell(f"{pair.num_reached} of {len(pair.difference.seeds)}", float(pair.num_reached))

    def spent(cost: str, side: int, form: str) -> Any:
        def cell(pair: Pair) -> Cell:
            value = (pair.reach[cost] or (None, None))[side]
            is_never = value is not None and math.isinf(value)
            return Cell("never", math.inf) if is_never else _number(value, form)

        return cell

    columns = {**_OF_PAIR, Column("reached", "seeds in which hybrid got there"): reached}
    for cost, title, form in (
        ("step", "steps", ",.0f"),
        ("forward_equivalents", "forward-eq.", ",.0f"),
        ("elapsed_s", "seconds", ",.1f"),
    ):
        columns[Column(f"hybrid_{cost}", f"{title}, hybrid")] = spent(cost, 0, form)
        columns[Column(f"fo_peft_{cost}", f"{title}, fo-peft")] = spent(cost, 1, form)
    return make_short_table(columns, pairs)


def rank_table(ranks: Ranks) -> Table:
    """Mean ranks, and Nemenyi's p-value against each other treatment."""

    def p_value(other: str) -> Any:
        def cell(name: str) -> Cell:
            found = ranks.p_values.get((name, other), ranks.p_values.get((other, name)))
            return Cell("–", None) if name == other else _number(found, ".3f")

        return cell

    names = list(ranks.mean_ranks)
    columns: Columns = {
        Column("method", "method", False): lambda name: text_cell(name, "name"),
        Column("rank", "mean rank"): lambda name: _number(ranks.mean_ranks[name], ".2f"),
        **{Column(f"p_{i}", f"p against {name}"): p_value(name) for i, name in enumerate(names)},
    }
    return make_short_table(columns, names)


def run_table(rows: Sequence[Any], links: Mapping[str, str], reasons: Mapping[str, str]) -> Table:
    """A table with one row per row of `Runs.table`.

    `links` maps a run to the link to its folder, `reasons` to the reason why it is not compared.
    """

    def why(row: Any) -> Cell:
        waits = "no result yet" if row.status == "unfinished" else ""
        return text_cell(row.error or reasons.get(row.run, "") or waits)

    def adapter(row: Any) -> Cell:
        return Cell("" if row.adapter == "none" else row.adapter, row.adapter)

    def steps(row: Any) -> Cell:
        done = _number(row.steps, ",.0f")
        if _known(row.planned_steps) is None:
            return done
        return Cell(f"{done.text or '0'} of {row.planned_steps:,.0f}", done.value)

    columns: Columns = {
        Column("run", "run", False): lambda r: Cell(r.run, r.run, href=links[r.run], mark="name"),
        Column("status", "status", False): lambda r: text_cell(r.status, f"status {r.status}"),
        Column("why", "why", False): why,
        Column("stage", "stage", False): lambda row: text_cell(row.stage),
        Column("task", "task", False): lambda row: text_cell(row.task),
        Column("model", "model", False): lambda row: text_cell(row.model),
        Column("method", "method", False): lambda row: text_cell(row.method),
        Column("adapter", "adapter", False): adapter,
        Column("base_lr", "base_lr"): lambda row: _rate(row.base_lr),
        Column("adapter_lr", "adapter_lr"): lambda row: _rate(row.adapter_lr),
        Column("seed", "seed"): lambda row: _number(row.seed, ".0f"),
        Column("steps", "steps"): steps,
        Column("accuracy", "accuracy, %"): lambda row: _number(row.accuracy, ".2f", 100),
        Column("reward", "held-out reward"): lambda row: _number(row.reward, ".4g"),
        Column("best_dev_loss", "best dev loss"): lambda row: _number(row.best_dev_loss, ".4f"),
        Column("train_s", "training, s"): lambda row: _number(row.train_s, ",.1f"),
    }
    return make_short_table(columns, rows)


def estimate_cell(
    estimate: Estimate | None, scale: float, form: str, *, with_interval: bool = True
) -> Cell:
    """A mean with its interval beside it, sorted by the unscaled mean."""
    if estimate is None:
        return Cell("", None)
    aside = ""
    if with_interval:
        aside = f"[{scale * estimate.low:{form}}, {scale * estimate.high:{form}}]"
        aside = "no interval" if math.isnan(estimate.low) else aside
    return Cell(f"{scale * estimate.value:{form}}", estimate.value, aside)


def _more_seeds(difference: Difference) -> Cell:
    """How many seeds would decide a comparison; blank if it is decided, or if nobody can say."""
    is_decided = difference.outcome in ("win", "loss")
    return _number(None if is_decided else difference.seeds_to_decide, ",.0f")


def _rate(rate: float | str | None) -> Cell:
    """A learning rate, or a map of several as text."""
    return text_cell(rate) if isinstance(rate, str) else _number(rate, "g")


def _number(value: float | None, form: str, scale: float = 1) -> Cell:
    known = _known(value)
    return Cell("", None) if known is None else Cell(f"{scale * known:{form}}", known)


def _known(value: float | None) -> float | None:
    return None if value is None or math.isnan(value) else float(value)
