"""Figures of smoothness as plotly's JSON: figure 1 of the hybrid paper, spectra, the path."""

from __future__ import annotations

import html
import math
from collections.abc import Mapping, Sequence
from typing import Any, Final

from zofo.pages.figures import Choices, Figure, plain
from zofo.pages.themes import Theme
from zofo.smoothness.summary import SERIES, series_of

AXES: Final = {
    "gradient": "each block along its gradient",
    "alone": "steps of one block alone",
    "whole": "whole steps",
}
_MARKS: Final = {"base": "circle", "adapter": "square"}
_DECADES: Final = range(-12, 13)


def colour_of(block: str, theme: Theme) -> str:
    """The colour of a block; parts of the base are faint."""
    return {"base": theme.methods["hybrid"], "adapter": theme.methods["fo-peft"]}.get(
        block, theme.faint
    )


def path_figures(summaries: Mapping[str, Mapping[str, Any]], theme: Theme) -> Choices:
    """Figure 1 of the hybrid paper: local constants against ‖∇f‖, with one panel per run.

    Args:
        summaries: label -> summary, as from `zofo.smoothness.summary.summarise`.
        theme: colours.
    """
    panels, figures = {}, {}
    shown = dict.fromkeys(SERIES, False)
    for i, (label, summary) in enumerate(summaries.items()):
        found = {k: _figure_one(summary, k, theme) for k in SERIES if _has(summary, k)}
        if not found:
            continue
        panels[str(i)] = label
        for kind in SERIES:
            shown[kind] |= kind in found
            # The page switches all panels at once, so a run without a kind shows another one.
            figures[f"{i}|{kind}"] = found.get(kind) or next(iter(found.values()))
    axes = {kind: AXES[kind] for kind in SERIES if shown[kind]}
    return Choices(panels, axes, {k: f for k, f in figures.items() if k.split("|")[1] in axes})


def step_figures(summary: Mapping[str, Any], theme: Theme) -> Choices:
    """Local constants and gradient norms against the step."""
    kinds = [kind for kind in SERIES if _has(summary, kind)]
    return Choices(
        {"0": ""},
        {kind: AXES[kind] for kind in kinds},
        {f"0|{kind}": _over_steps(summary, kind, theme) for kind in kinds},
    )


def spectrum_figures(summary: Mapping[str, Any], theme: Theme) -> Choices:
    """Ritz values of every block on a signed logarithmic axis, with one panel per step."""
    steps = sorted({record["step"] for record in summary["spectra"]})
    return Choices(
        {str(step): f"after {step} steps" for step in steps},
        {},
        {str(step): _spectra(summary, step, theme) for step in steps},
    )


def signed_log(value: float, smallest: float) -> float:
    """sign(v) log10(1 + |v| / smallest): linear near 0, logarithmic beyond."""
    return math.copysign(math.log10(1 + abs(value) / smallest), value)


def _has(summary: Mapping[str, Any], kind: str) -> bool:
    return any(series_of(summary["path"], kind, block) for block in _MARKS)


def _figure_one(summary: Mapping[str, Any], kind: str, theme: Theme) -> Figure:
    import plotly.graph_objects as go

    figure = go.Figure()
    for block, mark in _MARKS.items():
        found = series_of(summary["path"], kind, block)
        if not found:
            continue
        colour = colour_of(block, theme)
        figure.add_scatter(
            x=[u for _, u, _ in found],
            y=[v for *_, v in found],
            mode="markers",
            name=block,
            legendgroup=block,
            marker={"symbol": mark, "color": colour, "size": 8, "opacity": 0.8},
            customdata=[s for s, *_ in found],
            hovertemplate=(
                f"{block}, step %{{customdata}}<br>‖∇f‖ %{{x:.4g}}<br>constant %{{y:.4g}}"
                "<extra></extra>"
            ),
        )
        fit = summary["fits"].get(kind, {}).get(block)
        low, high = min(u for _, u, _ in found), max(u for _, u, _ in found)
        if fit is None or high <= low:
            continue
        xs = [low * (high / low) ** (i / 40) for i in range(41)]  # even on the logarithmic axis
        linear, power = fit["linear"], fit["power"]
        constant, slope = linear["constant"]["value"], linear["slope"]["value"]
        factor, exponent = power["factor"]["value"], power["exponent"]["value"]
        for name, dash, ys in (
            (
                f"{block}: {constant:.3g} + {slope:.3g} u",
                "solid",
                [constant + slope * x for x in xs],
            ),
            (f"{block}: {factor:.3g} u^{exponent:.2f}", "dot", [factor * x**exponent for x in xs]),
        ):
            figure.add_scatter(
                x=xs,
                y=ys,
                mode="lines",
                name=name,
                legendgroup=block,
                line={"color": colour, "width": 1.6, "dash": dash},
                hoverinfo="skip",
            )
    figure.update_layout(
        height=460,
        xaxis={"type": "log", "title": {"text": "‖∇f‖ on the measured rows"}},
        yaxis={"type": "log", "title": {"text": "local gradient-Lipschitz constant"}},
    )
    return plain(figure)


def _over_steps(summary: Mapping[str, Any], kind: str, theme: Theme) -> Figure:
    import plotly.graph_objects as go

    figure = go.Figure()
    points = summary["path"]
    for block, mark in _MARKS.items():
        found = series_of(points, kind, block)
        colour = colour_of(block, theme)
        figure.add_scatter(
            x=[s for s, *_ in found],
            y=[v for *_, v in found],
            mode="lines+markers",
            name=f"constant, {block}",
            line={"color": colour, "width": 2},
            marker={"symbol": mark, "size": 6},
        )
        norms = [(p["step"], p["grad_norm"].get(block)) for p in points]
        figure.add_scatter(
            x=[s for s, v in norms if v],
            y=[v for _, v in norms if v],
            mode="lines",
            name=f"gradient norm, {block}",
            line={"color": colour, "width": 1.4, "dash": "dot"},
        )
    figure.update_layout(
        height=400,
        xaxis={"title": {"text": "optimizer steps done"}},
        yaxis={"type": "log", "title": {"text": "constant; gradient norm (dotted)"}},
    )
    return plain(figure)


def _spectra(summary: Mapping[str, Any], step: int, theme: Theme) -> Figure:
    import plotly.graph_objects as go

    records = [r for r in summary["spectra"] if r["step"] == step]
    values = [abs(v) for r in records for ritz in r["ritz"] for v in ritz["values"] if v]
    largest = max(values, default=1.0)
    smallest = 10.0 ** math.floor(math.log10(largest) - 4)  # four decades or more stay visible
    figure = go.Figure()
    names = [html.escape(str(r["block"]), quote=False) for r in records]
    for name, record in zip(names, records, strict=True):
        nodes = [
            (v, w / len(record["ritz"]))
            for ritz in record["ritz"]
            for v, w in zip(ritz["values"], ritz["weights"], strict=True)
        ]
        figure.add_scatter(
            x=[signed_log(v, smallest) for v, _ in nodes],
            y=[name] * len(nodes),
            mode="markers",
            name=name,
            showlegend=False,
            marker={
                "symbol": "line-ns-open",
                "color": colour_of(str(record["block"]), theme),
                # Weights span many decades; the fourth root keeps the small ones visible.
                "size": [8 + 20 * w**0.25 for _, w in nodes],
                "line": {"width": 2},
            },
            customdata=[[v, w] for v, w in nodes],
            hovertemplate=(
                "%{y}<br>Ritz value %{customdata[0]:.4g}<br>share of the spectrum "
                "%{customdata[1]:.2g}<extra></extra>"
            ),
        )
    ticks = _ticks(smallest, largest)
    figure.add_vline(x=0, line={"color": theme.faint, "width": 1, "dash": "dot"})
    figure.update_layout(
        height=150 + 34 * len(records),
        xaxis={
            "title": {"text": "eigenvalue (signed logarithmic axis)"},
            "tickvals": [signed_log(t, smallest) for t in ticks],
            "ticktext": [f"{t:g}" for t in ticks],
        },
        yaxis={"categoryorder": "array", "categoryarray": names[::-1], "showgrid": False},
    )
    return plain(figure)


def _ticks(smallest: float, largest: float) -> Sequence[float]:
    # The first decade has no label, because it lies too close to 0.
    decades = [10.0**k for k in _DECADES if 5 * smallest <= 10.0**k <= 10 * largest]
    return [-d for d in reversed(decades)] + [0.0] + decades
