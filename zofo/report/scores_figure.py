"""Figures of scores as plotly's JSON: hybrid against fo-peft, score against cost.

Plotly interprets some HTML, and names come from run folders, so names are escaped.
"""

from __future__ import annotations

import html
import math
from collections.abc import Iterable, Sequence
from typing import Any, Final

from zofo.pages.figures import Choices, Figure, plain
from zofo.pages.themes import MARKS, Theme
from zofo.results.comparison import Group, Pair, treatment_of
from zofo.statistics.estimates import Estimate

COST_AXES: Final = {
    "forward_equivalents": ("forward-equivalents", 1.0),
    "train_s": ("training, s", 1.0),
    "peak_memory_bytes": ("peak memory, MiB", 2.0**20),
    "artifact_bytes": ("to store, MiB", 2.0**20),
}


def difference_figure(pairs: Sequence[Pair], total: Estimate, theme: Theme) -> Figure:
    """Hybrid minus fo-peft: a line per pair with its seeds and interval, and the mean of all."""
    import plotly.graph_objects as go

    labels = [pair_label(pair, pairs) for pair in pairs]
    colour = theme.methods["hybrid"]
    figure = go.Figure()
    xs, ys = [], []
    for label, pair in zip(labels, pairs, strict=True):
        xs += [100 * value for value in pair.values.values()]
        ys += [label] * len(pair.values)
    figure.add_scatter(
        x=xs,
        y=ys,
        mode="markers",
        name="one seed",
        marker={"color": theme.faint, "size": 9, "symbol": "line-ns-open", "line": {"width": 2}},
        customdata=[seed for pair in pairs for seed in pair.values],
        hovertemplate="%{y}<br>seed %{customdata}: %{x:+.2f} points<extra></extra>",
    )
    estimates = [pair.difference.estimate for pair in pairs]
    figure.add_scatter(
        **_with_interval(estimates, "x"),
        y=labels,
        mode="markers",
        name="mean of the seeds, 95% interval",
        marker={"color": colour, "size": 10},
        hovertemplate="%{y}<br>%{text} points<extra></extra>",
        text=[_interval_text(e) for e in estimates],
    )
    if len(pairs) > 1:
        figure.add_scatter(
            **_with_interval([total], "x"),
            y=["all pairs"],
            mode="markers",
            name="mean of the pairs",
            marker={"color": theme.text, "size": 13, "symbol": "diamond"},
            hovertemplate="all pairs<br>%{text} points<extra></extra>",
            text=[_interval_text(total)],
        )
    figure.add_vline(x=0, line={"color": theme.faint, "width": 1.5, "dash": "dot"})
    rows = [*labels, *(["all pairs"] if len(pairs) > 1 else [])]
    figure.update_layout(
        height=130 + 42 * len(rows),
        xaxis_title="hybrid − fo-peft, points of test accuracy",
        yaxis={"categoryorder": "array", "categoryarray": rows[::-1], "showgrid": False},
    )
    return plain(figure)


def pareto_figures(groups: Sequence[Group], theme: Theme) -> Choices:
    """Score against each cost with one panel per task; a line marks the Pareto frontier."""
    scored = [group for group in groups if group.accuracy is not None]
    panels = list(dict.fromkeys((group.model, group.task) for group in scored))
    figures = {}
    for i, panel in enumerate(panels):
        inside = [g for g in scored if g.is_chosen and (g.model, g.task) == panel]
        for cost in COST_AXES:
            figures[f"{i}|{cost}"] = _pareto(inside, groups, cost, theme)
    return Choices(
        panel_labels(panels), {key: title for key, (title, _) in COST_AXES.items()}, figures
    )


def _pareto(
    inside: Sequence[Group],
    groups: Sequence[Group],
    cost: str,
    theme: Theme,
) -> Figure:
    import plotly.graph_objects as go

    title, unit = COST_AXES[cost]
    figure = go.Figure()
    known = [
        (g, g.accuracy, value / unit)
        for g in inside
        if (value := g.costs[cost]) is not None and g.accuracy is not None
    ]
    front = frontier([(x, accuracy.value) for _, accuracy, x in known])
    figure.add_scatter(
        x=[x for x, _ in front],
        y=[100 * y for _, y in front],
        mode="lines",
        name="nothing is both better and cheaper",
        line={"color": theme.faint, "width": 1.5, "dash": "dot", "shape": "hv"},
        hoverinfo="skip",
    )
    for group, accuracy, x in known:
        figure.add_scatter(
            x=[x],
            **_with_interval([accuracy], "y"),
            mode="markers",
            name=html.escape(treatment_of(group, groups), quote=False),
            marker={**mark_of(group, theme), "size": 12},
            customdata=[[_interval_text(accuracy, signed=False), len(group.seeds)]],
            hovertemplate=(
                "%{fullData.name}<br>accuracy %{customdata[0]} %<br>"
                f"%{{x:,.4~g}} {title}<br>%{{customdata[1]}} seeds<extra></extra>"
            ),
        )
    majority = [100 * g.majority for g in inside if g.majority is not None]
    if majority:
        figure.add_hline(
            y=majority[0],
            line={"color": theme.faint, "width": 1},
            annotation={
                "text": "majority",
                "font": {"color": theme.faint, "size": 12},
                "xanchor": "right",
            },
            annotation_position="top right",
        )
    figure.update_layout(
        height=420, xaxis_title=title, yaxis_title="test accuracy, %", xaxis_rangemode="tozero"
    )
    return plain(figure)


def frontier(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """The Pareto frontier of (cost, score) points, ordered by cost."""
    front: list[tuple[float, float]] = []
    # In this order, a point is on the frontier if no cheaper or equally cheap one scores as well.
    for cost, score in sorted(points, key=lambda point: (point[0], -point[1])):
        if not front or score > front[-1][1]:
            front.append((cost, score))
    return front


def panel_labels(panels: Sequence[tuple[str, str]]) -> dict[str, str]:
    """Index of a (model, task) -> the task, followed by the model if there are several."""
    is_one = len({model for model, _ in panels}) == 1
    return {
        str(i): task if is_one else f"{task}, {model}" for i, (model, task) in enumerate(panels)
    }


def pair_label(pair: Pair, pairs: Sequence[Pair]) -> str:
    """The task of a pair with everything else that differs between the pairs, escaped."""
    parts = [pair.hybrid.task]
    for key in ("model", "adapter", "optimizer"):
        if len({getattr(other.hybrid, key) for other in pairs}) > 1:
            parts.append(getattr(pair.hybrid, key))
    return html.escape(", ".join(parts), quote=False)


def mark_of(group: Group, theme: Theme) -> dict[str, Any]:
    """Symbol and colour of the method of a group."""
    return {
        "symbol": MARKS.get(group.method, "circle"),
        "color": theme.methods.get(group.method, theme.text),
    }


def _with_interval(estimates: Sequence[Estimate], axis: str) -> dict[str, Any]:
    """Values in percent along an axis, with error bars; no interval means bars of length 0."""

    def lengths(differences: Iterable[float]) -> list[float]:
        return [0.0 if math.isnan(length) else 100 * length for length in differences]

    return {
        axis: [100 * e.value for e in estimates],
        f"error_{axis}": {
            "type": "data",
            "symmetric": False,
            "array": lengths(e.high - e.value for e in estimates),
            "arrayminus": lengths(e.value - e.low for e in estimates),
            "thickness": 2,
            "width": 5,
        },
    }


def _interval_text(estimate: Estimate, *, signed: bool = True) -> str:
    form = "+.2f" if signed else ".2f"
    value, low, high = (f"{100 * x:{form}}" for x in (estimate.value, estimate.low, estimate.high))
    return f"{value} (no interval)" if math.isnan(estimate.low) else f"{value} [{low}, {high}]"
