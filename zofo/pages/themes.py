"""Colours and markers of the figures, in a light and a dark theme.

A method has a colour, a marker and a name, so that a reader who cannot distinguish the colours can
use the others. The colours are those of Okabe and Ito, lightened for the dark theme.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final


@dataclass(frozen=True)
class Theme:
    """Colours of a theme."""

    text: str
    faint: str  # of less important text and lines
    grid: str  # of grid lines
    methods: dict[str, str]  # method -> colour
    scale: tuple[str, ...]  # of a heat map, lowest first; text is readable on each
    steps: tuple[str, ...]  # of an ordered quantity, such as a learning rate


THEMES: Final = {
    "light": Theme(
        text="#1d2530",
        faint="#5b6675",
        grid="#e1e6ec",
        methods={
            "hybrid": "#c2410c",
            "fo-peft": "#0067a8",
            "zo-peft": "#2f8fc9",
            "fo-ft": "#00795a",
            "zo-ft": "#a23b7a",
        },
        scale=("#5fa8d3", "#a9d0e6", "#d8e7f0", "#f1f4f7"),
        steps=("#0b3c5d", "#1f78b4", "#4a90bd", "#5b6675"),
    ),
    "dark": Theme(
        text="#e6ebf2",
        faint="#a3afbf",
        grid="#2c3644",
        methods={
            "hybrid": "#ff9a56",
            "fo-peft": "#6db8f2",
            "zo-peft": "#a8d8fa",
            "fo-ft": "#4fd0a4",
            "zo-ft": "#eda3cd",
        },
        scale=("#256a99", "#234f70", "#21394d", "#1f2833"),
        steps=("#d6ecfa", "#8cc4ea", "#4a93c4", "#a3afbf"),
    ),
}
MARKS: Final = {
    "hybrid": "circle",
    "fo-peft": "square",
    "zo-peft": "diamond",
    "fo-ft": "triangle-up",
    "zo-ft": "x",
}
DASHES: Final = ("solid", "dash", "dot", "dashdot", "longdash")
"""Line styles that distinguish the adapters of one method."""


def template_of(theme: Theme) -> dict[str, Any]:
    """The plotly template of a theme."""
    axis = {
        "gridcolor": theme.grid,
        "linecolor": theme.grid,
        "zerolinecolor": theme.grid,
        "automargin": True,
        "title": {"standoff": 12},
    }
    return {
        "layout": {
            "paper_bgcolor": "rgba(0,0,0,0)",
            "plot_bgcolor": "rgba(0,0,0,0)",
            "font": {
                "family": "system-ui, -apple-system, 'Segoe UI', Roboto, sans-serif",
                "size": 13,
                "color": theme.text,
            },
            "xaxis": axis,
            "yaxis": axis,
            "margin": {"l": 16, "r": 16, "t": 16, "b": 16},
            "hoverlabel": {"align": "left", "font": {"size": 13}},
            "legend": {"orientation": "h", "y": 1.02, "yanchor": "bottom", "x": 0},
        }
    }


def faded(colour: str, opacity: float) -> str:
    """A colour of six hex digits with an opacity from 0 to 1."""
    red, green, blue = (int(colour[i : i + 2], 16) for i in (1, 3, 5))
    return f"rgba({red},{green},{blue},{opacity})"


def add_band(
    figure: Any,
    xs: Sequence[float],
    low: Sequence[float | None],
    high: Sequence[float | None],
    *,
    colour: str,
    group: str,
) -> None:
    """Shade the range between two lines of a figure; it comes and goes with a legend's group."""
    figure.add_scatter(
        x=[*xs, *reversed(xs)],  # The outline runs along the minimum and back along the maximum.
        y=[*low, *reversed(high)],
        fill="toself",
        fillcolor=faded(colour, 0.16),
        line={"width": 0},
        legendgroup=group,
        showlegend=False,
        hoverinfo="skip",
        mode="lines",
    )
