"""Plotly figures on a page, and the choice between them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

Figure = dict[str, Any]


@dataclass(frozen=True)
class Choices:
    """The figures that a reader can choose from."""

    panels: dict[str, str]  # key -> label of the subject, such as a task
    axes: dict[str, str]  # key -> label of the x axis; empty if there is only one
    figures: dict[str, Figure]  # "panel" or "panel|axis" -> figure


def plain(figure: Any) -> Figure:
    """The JSON of a figure without its template, because the page adds that of its theme."""
    found = figure.to_plotly_json()
    found["layout"].pop("template", None)
    return found
