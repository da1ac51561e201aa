"""A plotly figure on a page, with its choices."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

Figure = dict[str, Any]


@dataclass(frozen=True)
class Choices:
    """A figure that has several states.

    Attributes:
        panels: key -> label of what is shown (a task, a grid).
        axes: key -> label of the x axis; empty: there is one.
        figures: "panel" or "panel|axis" -> figure.
    """

    panels: dict[str, str]
    axes: dict[str, str]
    figures: dict[str, Figure]


def plain(figure: Any) -> Figure:
    """JSON without a template, which the page supplies by theme."""
    found = figure.to_plotly_json()
    found["layout"].pop("template", None)
    return found
