"""Draw a study's figures for a document as plain SVG, from the same tables as `zofo report`.

    python benchmarks/study_figures.py studies/minilm --to docs/figures/minilm
    python benchmarks/study_figures.py studies/one-rate --to docs/figures/one-rate --rates

The script writes TO-differences.svg (hybrid − fo-peft, one row per pair) and
TO-curves-TASK-ADAPTER.svg (dev loss against forward-equivalents, with bands from the lowest to the
highest seed). With --rates it writes TO.svg instead: the dev loss at every tried pair of rates, as
a mean over seeds.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Sequence
from pathlib import Path

import pandas as pd
from svg import Interval, Series, interval_chart, line_chart

from zofo.disk.files import write_text
from zofo.report.data import Report, make_report
from zofo.results.comparison import Group

METHODS = ("fo-peft", "hybrid", "zo-peft", "zo-ft", "fo-ft", "hybrid-tied")
"""The methods in the order of their colours."""
HIGHEST = 1.2
"""Largest dev loss on the chart of rates, in nats."""


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("studies", nargs="+", type=Path)
    parser.add_argument("--to", type=Path, required=True, help="beginning of the files' names")
    parser.add_argument("--rates", action="store_true", help="a curve a pair of rates")
    given = parser.parse_args(arguments)
    report = make_report(given.studies)
    try:
        figures = rates(report) if given.rates else differences_and_curves(report)
    except ValueError as error:
        parser.error(str(error))
    for name, text in figures.items():
        path = given.to.with_name(f"{given.to.name}{name}.svg")
        write_text(path, text)
        print(path)


def differences_and_curves(report: Report) -> dict[str, str]:
    """Return a dict from the end of a figure's name to the figure."""
    found = {}
    rows = []
    for pair in report.comparison.pairs:
        estimate = pair.difference.estimate
        bounds = [None if math.isnan(x) else 100 * x for x in (estimate.low, estimate.high)]
        label = ", ".join(_place(pair.hybrid, report))
        values = [100 * value for value in pair.values.values()]
        rows.append(Interval(label, 100 * estimate.value, *bounds, values))
    total = report.verdict.estimate
    if total is not None:
        bounds = [None if math.isnan(x) else 100 * x for x in (total.low, total.high)]
        rows.append(Interval("all pairs", 100 * total.value, *bounds))
        found["-differences"] = interval_chart(
            "Hybrid − fo-peft",
            "points of test accuracy; ticks are seeds, lines 95% intervals",
            rows,
        )
    chosen = [group for group in report.comparison.groups if group.is_chosen]
    for pair in report.comparison.pairs:
        task, adapter = pair.hybrid.task, pair.hybrid.adapter
        beside = [g for g in chosen if (g.model, g.task) == (pair.hybrid.model, task)]
        own = adapter, pair.hybrid.optimizer
        groups = [g for g in beside if g.adapter == "none" or (g.adapter, g.optimizer) == own]
        groups.sort(key=lambda g: METHODS.index(g.method))
        place = _place(pair.hybrid, report)
        found["-".join(("-curves", *place))] = line_chart(
            ", ".join(place),
            "forward-equivalents",
            "dev loss",
            [_series(group, report.runs.curves) for group in groups],
        )
    return found


def _place(group: Group, report: Report) -> tuple[str, ...]:
    """Return task and adapter, before them the model and after them the optimizer if several."""
    groups = [other for pair in report.comparison.pairs for other in (pair.hybrid, pair.fo_peft)]
    model = (group.model,) if len({other.model for other in groups}) > 1 else ()
    optimizer = (group.optimizer,) if len({other.optimizer for other in groups}) > 1 else ()
    return (*model, group.task, group.adapter, *optimizer)


def _series(group: Group, curves: pd.DataFrame) -> Series:
    own = curves[curves["run"].isin(group.runs)].groupby("forward_equivalents")["dev_loss"]
    table = own.agg(["mean", "min", "max", "count"]).reset_index()
    # Patience ends runs at different costs, and a mean over the others would jump there.
    table = table[table["count"] == table["count"].max()]
    return Series(
        group.method,
        [list(zip(table["forward_equivalents"], table["mean"], strict=True))],
        list(zip(table["forward_equivalents"], table["min"], table["max"], strict=True)),
    )


def rates(report: Report) -> dict[str, str]:
    """Draw one figure with the mean over seeds at every pair of rates."""
    table, curves = report.runs.table, report.runs.curves
    merged = curves.merge(table[["run", "method", "base_lr", "adapter_lr"]], on="run")
    series = []
    for (method, base, adapter), rows in merged.groupby(["method", "base_lr", "adapter_lr"]):
        # A run that was stopped for its loss keeps its last value.
        wide = rows.pivot_table(index="step", columns="run", values="dev_loss").ffill()
        mean = wide.mean(axis=1)
        name = f"one rate {base}" if method == "hybrid-tied" else f"{base} and {adapter}"
        series.append(Series(name, [list(zip(mean.index, mean, strict=True))]))
    return {"": line_chart("One rate, or two", "step", "dev loss", series, y_max=HIGHEST)}


if __name__ == "__main__":
    main()
