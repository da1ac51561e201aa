"""Figures of the page as plotly JSON: one per claim, with the points and the candidates' slopes."""

from __future__ import annotations

import html
import math
from collections.abc import Iterable, Sequence
from typing import Any

from zofo.convergence.claims import Finding
from zofo.pages.figures import Choices, Figure, plain
from zofo.pages.themes import DASHES, Theme


def figures_of(found: Sequence[Finding], theme: Theme) -> dict[str, Choices]:
    """Experiment -> one figure per claim. The key "exponents" holds one figure of all verdicts."""
    choices: dict[str, Choices] = {}
    for experiment in dict.fromkeys(f.claim.experiment for f in found):
        inside = [f for f in found if f.claim.experiment == experiment]
        panels = {str(i): f.claim.statement for i, f in enumerate(inside)}
        figures = {str(i): claim_figure(f, theme) for i, f in enumerate(inside)}
        choices[experiment] = Choices(panels, {}, figures)
    powers = [f for f in found if f.claim.candidates]
    if powers:
        choices["exponents"] = Choices({"": ""}, {}, {"": exponents_figure(powers, theme)})
    return choices


def claim_figure(finding: Finding, theme: Theme) -> Figure:
    """The measured points with intervals, and dotted lines with the candidates' slopes."""
    import plotly.graph_objects as go

    measured, colours = finding.measured, list(theme.methods.values())
    figure = go.Figure()
    for series, colour in zip(measured.series, colours, strict=False):
        figure.add_scatter(
            x=series.x,
            y=_finite(series.y),
            error_y=_bars(zip(series.y, series.low, series.high, strict=True), 1.5, 4),
            mode="lines+markers",
            name=html.escape(series.name, quote=False),
            line={"color": colour, "width": 2},
            marker={"size": 8},
        )
    is_log = measured.is_power  # a power law is a line on logarithmic axes
    if is_log and measured.series:
        _add_candidates(figure, finding, theme)
    elif isinstance(finding.claim.claimed, tuple):
        for end in finding.claim.claimed:
            if math.isfinite(end):
                figure.add_hline(y=end, line={"color": theme.faint, "width": 1.5, "dash": "dot"})
    figure.update_layout(
        height=420,
        xaxis_title=html.escape(measured.x_title, quote=False),
        yaxis_title=html.escape(measured.y_title, quote=False),
        xaxis_type="log",
        yaxis_type="log" if is_log else "linear",
        yaxis_exponentformat="power" if is_log else "none",
    )
    return plain(figure)


def _add_candidates(figure: Any, finding: Finding, theme: Theme) -> None:
    series = finding.measured.series[0]
    points = [(x, y) for x, y in zip(series.x, series.y, strict=True) if math.isfinite(y) and y > 0]
    if len(points) < 2:
        return
    # The lines meet at the last point, because a power law holds best there.
    x_0, (x_1, y_1) = points[0][0], points[-1]
    for (name, power), dash in zip(finding.claim.candidates.items(), DASHES[1:], strict=False):
        figure.add_scatter(
            x=[x_0, x_1],
            y=[y_1 * (x_0 / x_1) ** power, y_1],
            mode="lines",
            name=html.escape(name, quote=False),
            line={"color": theme.faint, "width": 1.2, "dash": dash},
            hoverinfo="skip",
        )


def exponents_figure(found: Sequence[Finding], theme: Theme) -> Figure:
    """Every exponent with its interval. Ticks mark the candidates."""
    import plotly.graph_objects as go

    names = [f.claim.name for f in found]
    figure = go.Figure()
    figure.add_scatter(
        x=[value for f in found for value in f.claim.candidates.values()],
        y=[f.claim.name for f in found for _ in f.claim.candidates],
        customdata=[html.escape(name, quote=False) for f in found for name in f.claim.candidates],
        mode="markers",
        name="candidates",
        marker={"color": theme.faint, "size": 12, "symbol": "line-ns-open", "line": {"width": 2}},
        hovertemplate="%{y}: %{customdata}<extra></extra>",
    )
    figure.add_scatter(
        x=[f.claim.candidates[str(f.claim.claimed)] for f in found],
        y=names,
        mode="markers",
        name="claimed",
        marker={"color": theme.methods["fo-peft"], "size": 14, "symbol": "circle-open"},
        hoverinfo="skip",
    )
    ends = [f.measured.interval for f in found]
    figure.add_scatter(
        x=_finite([e.value for e in ends]),
        y=names,
        error_x=_bars(((e.value, e.low, e.high) for e in ends), 2, 5),
        mode="markers",
        name="measured, 95% interval",
        marker={"color": theme.methods["hybrid"], "size": 8},
        hovertemplate="%{y}: %{x:.3f}<extra></extra>",
    )
    figure.update_layout(
        height=120 + 26 * len(names),
        xaxis_title="exponent",
        yaxis={"categoryorder": "array", "categoryarray": names[::-1], "showgrid": True},
    )
    return plain(figure)


def _bars(ends: Iterable[tuple[float, float, float]], thickness: float, width: int) -> Figure:
    """Error bars from (value, low, high)."""
    lengths = [(high - value, value - low) for value, low, high in ends]
    return {
        "type": "data",
        "symmetric": False,
        "array": _finite([above for above, _ in lengths]),
        "arrayminus": _finite([below for _, below in lengths]),
        "thickness": thickness,
        "width": width,
    }


def _finite(values: Sequence[float]) -> list[float | None]:
    return [value if math.isfinite(value) else None for value in values]
