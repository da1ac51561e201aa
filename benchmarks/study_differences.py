"""Print paired differences of a study from the JSON file of `zofo report --json`.

    python benchmarks/study_differences.py benchmarks/results/regime-short.json

The table has accuracy in points, AUC and the best dev loss, each with its 95% interval over seeds:
fo-ft (AdamW) − fo-peft, hybrid − fo-peft, hybrid − zo-ft and hybrid − fo-ft for each adapter and
optimizer. Means over the adapters follow, where an optimizer has several.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

from zofo.statistics.estimates import Estimate, mean_over_pairs, paired_difference

SCORES: Final = {"accuracy": (100, ".1f"), "auc": (1, ".3f"), "best_dev_loss": (1, ".3f")}
AGAINST: Final = (
    ("fo-ft", "fo-peft"),
    ("hybrid", "fo-peft"),
    ("hybrid", "zo-ft"),
    ("hybrid", "fo-ft"),
)
Cell = tuple[str, str, str]
Values = dict[int, float]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("json", type=Path)
    found = json.loads(parser.parse_args().json.read_text())
    runs = {run["run"]: run for run in found["runs"]}
    groups = {
        (group["method"], group["adapter"], group["optimizer"]): group
        for group in found["groups"]
        if group["is_chosen"]
    }
    print("| adapter | optimizer | difference | accuracy, points | AUC | dev loss |")
    print("|---|---|---|---|---|---|")
    places = [(adapter, optimizer) for method, adapter, optimizer in groups if method == "fo-peft"]
    for adapter, optimizer in places:
        for one, other in AGAINST:
            cells = _cell(one, adapter, optimizer), _cell(other, adapter, optimizer)
            if all(cell in groups for cell in cells):
                estimates = {}
                for score in SCORES:
                    values = [_values(groups[cell], runs, score) for cell in cells]
                    difference = paired_difference(*values)
                    estimates[score] = difference.estimate if difference else None
                _print(adapter, optimizer, f"{one} − {other}", estimates)
    gains: dict[str, dict[str, list[Values]]] = {}
    for optimizer in dict.fromkeys(optimizer for _, optimizer in places):
        cells = [
            (("hybrid", *place), ("fo-peft", *place)) for place in places if place[1] == optimizer
        ]
        gains[optimizer] = {
            score: [
                _minus(*(_values(groups[cell], runs, score) for cell in pair)) for pair in cells
            ]
            for score in SCORES
        }
        if len(cells) > 1:
            _print("mean", optimizer, "hybrid − fo-peft", _means(gains[optimizer]))
    if {"adamw", "sgd"} <= gains.keys():
        adapters = [adapter for adapter, optimizer in places if optimizer == "sgd"]
        both = {
            score: [
                _minus(*pair)
                for pair in zip(gains["sgd"][score], gains["adamw"][score], strict=True)
            ]
            for score in SCORES
        }
        _print("mean", "sgd − adamw", "of hybrid − fo-peft", _means(both))
        peft = {
            score: [
                _minus(
                    *(_values(groups["fo-peft", adapter, o], runs, score) for o in ("sgd", "adamw"))
                )
                for adapter in adapters
            ]
            for score in SCORES
        }
        _print("mean", "sgd − adamw", "of fo-peft", _means(peft))


def _cell(method: str, adapter: str, optimizer: str) -> Cell:
    if method == "fo-ft":
        return method, "none", "adamw"
    return (method, "none", "") if method == "zo-ft" else (method, adapter, optimizer)


def _values(group: Mapping[str, Any], runs: Mapping[str, Any], score: str) -> Values:
    return {
        int(seed): runs[run][score] for seed, run in zip(group["seeds"], group["runs"], strict=True)
    }


def _minus(one: Values, other: Values) -> Values:
    return {seed: one[seed] - other[seed] for seed in one.keys() & other.keys()}


def _means(gains: Mapping[str, list[Values]]) -> dict[str, Estimate | None]:
    """Return the means over pairs of one task, whose seeds are the same rows."""
    return {score: mean_over_pairs(pairs, ["task"] * len(pairs)) for score, pairs in gains.items()}


def _print(adapter: str, optimizer: str, title: str, found: Mapping[str, Estimate | None]) -> None:
    shown = []
    for score, (scale, form) in SCORES.items():
        e = found[score]
        ends = [] if e is None else [f"{scale * x:+{form}}" for x in (e.value, e.low, e.high)]
        shown.append(f"{ends[0]} [{ends[1]}, {ends[2]}]" if ends else "")
    print("| " + " | ".join((adapter, optimizer, title, *shown)) + " |")


if __name__ == "__main__":
    main()
