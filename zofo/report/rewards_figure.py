"""The figures of runs with rewards: reward, answers and drift while training."""

from __future__ import annotations

import html
import math
from collections import Counter
from typing import TYPE_CHECKING, Any, Final

from zofo.pages.figures import Choices, Figure, plain
from zofo.pages.themes import DASHES, Theme, add_band
from zofo.report.scores_figure import panel_labels
from zofo.results.comparison import Comparison, treatment_of
from zofo.results.table import Runs

if TYPE_CHECKING:
    import pandas as pd

REWARD_AXES: Final = {"step": "steps", "forward_equivalents": "forward-equivalents"}
PANELS: Final = {
    "reward": "reward",
    "answers_differ": "share of answers that differ",
    "answer_words": "length of the answers, words",
    "answers_left_out": "answers left out",
    "eval_drift": "drift, nats per token",
}
_MAX_POINTS: Final = 120  # of a line; further points would not be seen, but make the page larger


def reward_figures(comparison: Comparison, runs: Runs, theme: Theme) -> Choices:
    """Each figure of the rewards against steps and cost, with one line per group of runs.

    A line is the mean over the seeds. Runs that belong to no group have thin lines.
    """
    lines = _lines(comparison, runs)
    panels = list(dict.fromkeys((line["model"], line["task"]) for line in lines))
    labels, figures = {}, {}
    for i, (panel, label) in enumerate(zip(panels, panel_labels(panels).values(), strict=True)):
        inside = [line for line in lines if (line["model"], line["task"]) == panel]
        of_panel = runs.rewards[runs.rewards["run"].isin({r for x in inside for r in x["runs"]})]
        for key, title in PANELS.items():
            if of_panel[key].isna().all():
                continue
            labels[f"{i} {key}"] = title if len(panels) == 1 else f"{label}: {title}"
            for axis in REWARD_AXES:
                figures[f"{i} {key}|{axis}"] = _figure(inside, of_panel, key, axis, theme)
    return Choices(labels, REWARD_AXES, figures)


def _lines(comparison: Comparison, runs: Runs) -> list[dict[str, Any]]:
    """Groups and single runs that have figures of rewards; each has a name of its own."""
    known = set(runs.rewards["run"])
    groups = [group for group in comparison.groups if known.intersection(group.runs)]
    names = Counter((g.model, g.task, treatment_of(g, groups)) for g in groups)
    lines = []
    for group in groups:
        name = treatment_of(group, groups)
        if names[group.model, group.task, name] > 1:  # They differ in an option or a rate.
            name += f", {group.runs[0]}{' …' if len(group.runs) > 1 else ''}"
        keys = ("model", "task", "method", "runs")
        lines.append({key: getattr(group, key) for key in keys} | {"name": name, "alone": False})
    grouped = {run for group in comparison.groups for run in group.runs}
    for row in runs.table.itertuples():
        apart: Any = row
        is_known = apart.run in known - grouped - comparison.left_out.keys()
        if is_known and apart.stage == "final":
            name = f"{apart.run} ({apart.status})"
            line = {key: getattr(apart, key) for key in ("model", "task", "method")}
            lines.append(line | {"runs": (apart.run,), "name": name, "alone": True})
    return lines


def _figure(
    lines: list[dict[str, Any]], rewards: pd.DataFrame, key: str, axis: str, theme: Theme
) -> Figure:
    import plotly.graph_objects as go

    figure = go.Figure()
    num_of_method: Counter[str] = Counter()
    for line in lines:
        method = line["method"]
        colour = theme.methods.get(method, theme.text)
        dash = DASHES[num_of_method[method] % len(DASHES)]
        num_of_method[method] += 1
        points = mean_line(rewards[rewards["run"].isin(line["runs"])], key, axis)
        if not len(points):
            continue
        name = html.escape(line["name"], quote=False)
        xs, ys = points["x"].tolist(), points[key].tolist()
        of_line = {"x": xs, "legendgroup": name, "mode": "lines"}
        if key == "reward":
            spread = points["reward_spread"].fillna(0)
            low, high = (_short((points[key] + sign * spread).tolist()) for sign in (-1, 1))
            add_band(figure, xs, low, high, colour=colour, group=name)
            figure.add_scatter(
                **of_line,
                y=_short(points["reward_best"].tolist()),
                name=f"{name}: best",
                showlegend=False,
                line={"color": colour, "width": 1, "dash": "dot"},
                hovertemplate="%{fullData.name} %{y:.4g}<extra></extra>",
            )
        figure.add_scatter(
            **of_line | {"mode": "lines+markers" if len(xs) < 30 else "lines"},
            y=_short(ys),
            name=name,
            line={"color": colour, "width": 1 if line["alone"] else 2.2, "dash": dash},
            marker={"size": 5},
            customdata=points["step"].tolist(),
            hovertemplate=(
                f"%{{fullData.name}}, step %{{customdata}}<br>{PANELS[key]} %{{y:.4g}}"
                "<extra></extra>"
            ),
        )
    figure.update_layout(
        height=400, showlegend=True, xaxis_title=REWARD_AXES[axis], yaxis_title=PANELS[key]
    )
    return plain(figure)


def mean_line(rewards: pd.DataFrame, key: str, axis: str) -> pd.DataFrame:
    """The mean over runs of a figure, at each step that all runs have.

    Many points become some, each the mean of neighbours and the best of their best.

    Returns:
        Columns step, x (mean cost), `key`, and reward_spread and reward_best for the reward.
    """
    known = rewards[rewards[key].notna() & rewards[axis].notna()]
    means = {"x": ("x", "mean"), key: (key, "mean"), "num": ("x", "size")}
    if key == "reward":
        means["reward_spread"] = ("reward_spread", "mean")
        means["reward_best"] = ("reward_best", "max")
    found = known.assign(x=known[axis]).groupby("step").agg(**means)
    found = found[found["num"] == known["run"].nunique()].reset_index()
    size = math.ceil(len(found) / _MAX_POINTS)
    if size > 1:
        del means["num"]
        found = found.groupby(found.index // size).agg(step=("step", "max"), **means)
    return found


def _short(values: list[float]) -> list[float | None]:
    """Values with the digits that a figure can show; None where there is none."""
    return [None if math.isnan(value) else float(f"{value:.5g}") for value in values]
