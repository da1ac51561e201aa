"""Figures of the dev loss over the learning rates that were tried, and over their ratio."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from zofo.pages.figures import Choices, Figure, plain
from zofo.pages.themes import DASHES, Theme
from zofo.results.comparison import Grid


def rate_figures(grids: Sequence[Grid], theme: Theme) -> tuple[Choices, Choices]:
    """Heat maps of dev loss over both rates, and dev loss against the ratio of the rates."""
    panels = {}
    for i, grid in enumerate(grids):
        parts = (grid.task, grid.model, grid.method, grid.adapter, grid.optimizer)
        panels[str(i)] = ", ".join(part for part in parts if part not in ("", "none"))
    maps = {str(i): _heat_map(grid, theme) for i, grid in enumerate(grids)}
    with_ratio = {str(i): grid for i, grid in enumerate(grids) if any(map(_ratio, grid.points))}
    ratios = {key: _ratio_figure(grid, theme) for key, grid in with_ratio.items()}
    return (
        Choices(panels, {}, maps),
        Choices({key: panels[key] for key in with_ratio}, {}, ratios),
    )


# A point is (base_lr, adapter_lr, dev loss, number of runs, whether the rates were chosen).
def _ratio(point: Sequence[Any]) -> float | None:
    return point[0] / point[1] if point[0] and point[1] else None


def _heat_map(grid: Grid, theme: Theme) -> Figure:
    import plotly.graph_objects as go

    xs = _rates([point[1] for point in grid.points])
    ys = _rates([point[0] for point in grid.points])
    points = {(point[0], point[1]): point for point in grid.points}
    values, texts, hovers = [], [], []
    for y in ys:
        row = [points.get((y, x)) for x in xs]
        values.append([None if p is None else p[2] for p in row])
        texts.append([_heat_text(p) for p in row])
        hovers.append([_heat_hover(p) for p in row])
    figure = go.Figure(
        go.Heatmap(
            x=[_rate(x) for x in xs],
            y=[_rate(y) for y in ys],
            z=values,
            text=texts,
            texttemplate="%{text}",
            textfont={"color": theme.text},
            customdata=hovers,
            hovertemplate="%{customdata}<extra></extra>",
            colorscale=[[i / 3, colour] for i, colour in enumerate(theme.scale)],  # four colours
            colorbar={"title": {"text": "dev loss"}, "thickness": 12, "outlinewidth": 0},
            xgap=3,
            ygap=3,
            hoverongaps=False,
        )
    )
    figure.update_layout(
        height=150 + 60 * max(2, len(ys)),
        xaxis={"title": "adapter_lr", "type": "category", "showgrid": False},
        yaxis={"title": "base_lr", "type": "category", "showgrid": False},
    )
    return plain(figure)


def _heat_text(point: Sequence[Any] | None) -> str:
    if point is None:
        return ""
    return ("failed" if point[2] is None else f"{point[2]:.3f}") + (" ★" if point[4] else "")


def _heat_hover(point: Sequence[Any] | None) -> str:
    if point is None:
        return ""
    ratio = _ratio(point)
    lines = [f"base_lr {_rate(point[0])}, adapter_lr {_rate(point[1])}"]
    lines += [f"ratio {ratio:.3g}"] if ratio else []
    lines.append("no dev loss" if point[2] is None else f"best dev loss {point[2]:.4f}")
    lines.append(f"{point[3]} run{'s' if point[3] > 1 else ''}{', chosen' if point[4] else ''}")
    return "<br>".join(lines)


def _ratio_figure(grid: Grid, theme: Theme) -> Figure:
    import plotly.graph_objects as go

    figure = go.Figure()
    for i, adapter_lr in enumerate(_rates([point[1] for point in grid.points])):
        points = sorted(
            (ratio, point)
            for point in grid.points
            if point[1] == adapter_lr and point[2] is not None and (ratio := _ratio(point))
        )
        if not points:
            continue
        figure.add_scatter(
            x=[ratio for ratio, _ in points],
            y=[point[2] for _, point in points],
            mode="lines+markers",
            name=f"adapter_lr {_rate(adapter_lr)}",
            line={"color": theme.steps[i % len(theme.steps)], "dash": DASHES[i % len(DASHES)]},
            marker={
                "opacity": 1,
                "line": {"width": 0},
                "size": [14 if point[4] else 8 for _, point in points],
                "symbol": ["star" if point[4] else "circle" for _, point in points],
            },
            customdata=[_heat_hover(point) for _, point in points],
            hovertemplate="%{customdata}<extra></extra>",
        )
    figure.update_layout(
        height=360,
        xaxis={
            "title": "base_lr / adapter_lr",
            "type": "log",
            "exponentformat": "power",
            "dtick": 1,
        },
        yaxis_title="best dev loss, nats",
    )
    return plain(figure)


def _rates(rates: Sequence[float | None]) -> list[float | None]:
    """The distinct rates in ascending order; None, a frozen block, comes first."""
    return sorted(set(rates), key=lambda rate: -1.0 if rate is None else rate)


def _rate(rate: float | None) -> str:
    return "frozen" if rate is None else f"{rate:g}"
