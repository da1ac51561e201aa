"""Plotly figures on a page, and the choice between them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

Figure = dict[str, Any]


@dataclass(frozen=True)
class Choices:
    """The figures that a reader can choose from.

    Attributes:
        panels: key -> label of the subject, such as a task.
        axes: key -> label of the x axis; empty if there is only one.
        figures: "panel" or "panel|axis" -> figure.
    """

    panels: dict[str, str]
    axes: dict[str, str]
    figures: dict[str, Figure]


def plain(figure: Any) -> Figure:
    """The JSON of a figure without its template, because the page adds that of its theme."""
    found = figure.to_plotly_json()
    found["layout"].pop("template", None)
    return found
