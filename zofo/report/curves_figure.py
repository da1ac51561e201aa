"""The figure of the dev loss during training against steps, forward-equivalents and seconds."""

from __future__ import annotations

import html
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Final

from zofo.pages.figures import Choices, Figure, plain
from zofo.pages.themes import DASHES, Theme, add_band
from zofo.report.scores_figure import mark_of, panel_labels
from zofo.results.comparison import CURVE_COSTS, Comparison, Group, treatment_of
from zofo.results.table import Runs

if TYPE_CHECKING:
    import pandas as pd

CURVE_AXES: Final = {
    "step": "steps",
    "forward_equivalents": "forward-equivalents",
    "elapsed_s": "training, s",
}


def curve_figures(comparison: Comparison, runs: Runs, theme: Theme) -> Choices:
    """Dev loss against each cost: the mean over seeds, and a band from minimum to maximum.

    Runs that are unfinished or failed belong to no group. They are drawn as thin lines.
    """
    chosen = [group for group in comparison.groups if group.is_chosen]
    grouped = {run for group in comparison.groups for run in group.runs}
    table = runs.table
    alone = table[
        (table["stage"] == "final")
        & ~table["run"].isin(grouped)
        & ~table["run"].isin(comparison.left_out)
        & table["run"].isin(runs.curves["run"])
    ]
    lone = list(alone.itertuples())
    everything: list[Any] = [*chosen, *lone]
    panels = list(dict.fromkeys((x.model, x.task) for x in everything))
    figures = {}
    for i, panel in enumerate(panels):
        groups = [group for group in chosen if (group.model, group.task) == panel]
        others = [run for run in lone if (run.model, run.task) == panel]
        for cost in CURVE_COSTS:
            figures[f"{i}|{cost}"] = _curves(groups, others, comparison, runs.curves, cost, theme)
    return Choices(panel_labels(panels), CURVE_AXES, figures)


def _curves(
    inside: Sequence[Group],
    alone: Sequence[Any],
    comparison: Comparison,
    curves: pd.DataFrame,
    cost: str,
    theme: Theme,
) -> Figure:
    import plotly.graph_objects as go

    figure = go.Figure()
    num_of_method: dict[str, int] = {}
    for group in inside:
        band = band_of(curves[curves["run"].isin(group.runs)], cost)
        colour = theme.methods.get(group.method, theme.text)
        name = html.escape(treatment_of(group, comparison.groups), quote=False)
        # Groups of one method share its colour, so their lines have different dashes.
        dash = DASHES[num_of_method.setdefault(group.method, 0) % len(DASHES)]
        num_of_method[group.method] += 1
        if not len(band):
            continue
        xs = band["x"].tolist()
        if (band["num"] > 1).any():
            low, high = band["low"].tolist(), band["high"].tolist()
            add_band(figure, xs, low, high, colour=colour, group=name)
        figure.add_scatter(
            x=xs,
            y=band["mean"].tolist(),
            mode="lines+markers",
            name=name,
            legendgroup=name,
            line={"color": colour, "width": 2.2, "dash": dash},
            marker={**mark_of(group, theme), "size": 6},
            customdata=band[["low", "high", "num", "step"]].to_numpy().tolist(),
            hovertemplate=(
                "%{fullData.name}, step %{customdata[3]}<br>dev loss %{y:.4f}, "
                "%{customdata[0]:.4f} to %{customdata[1]:.4f}<br>%{customdata[2]} seeds"
                "<extra></extra>"
            ),
        )
    for run in alone:
        points = curves[(curves["run"] == run.run) & curves[cost].notna()]
        figure.add_scatter(
            x=points[cost].tolist(),
            y=points["dev_loss"].tolist(),
            mode="lines+markers",
            name=f"{html.escape(run.run, quote=False)} ({run.status})",
            line={"color": theme.methods.get(run.method, theme.text), "width": 1, "dash": "dot"},
            marker={"symbol": "circle-open", "size": 5},
            hovertemplate="%{fullData.name}<br>dev loss %{y:.4f}<extra></extra>",
        )
    figure.update_layout(height=440, xaxis_title=CURVE_AXES[cost], yaxis_title="dev loss, nats")
    return plain(figure)


def band_of(curves: pd.DataFrame, cost: str) -> pd.DataFrame:
    """Mean and range of the dev loss at each step at which all runs were evaluated.

    Returns:
        Columns step, x (mean cost), mean, low (minimum), high (maximum), num (number of runs).
    """
    known = curves[curves[cost].notna() & curves["dev_loss"].notna()]
    # A copy, because `cost` may be the step, by which the rows are grouped.
    known = known.assign(x=known[cost])
    band = known.groupby("step").agg(
        x=("x", "mean"),
        mean=("dev_loss", "mean"),
        low=("dev_loss", "min"),
        high=("dev_loss", "max"),
        num=("dev_loss", "size"),
    )
    return band[band["num"] == known["run"].nunique()].reset_index()
