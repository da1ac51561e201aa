"""The page on the smoothness of one run: one file that needs no network."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Final

from zofo.disk.files import read_json, write_text
from zofo.pages.document import check_target, json_of, render_document
from zofo.pages.figures import Choices
from zofo.pages.tables import Table
from zofo.pages.themes import THEMES, Theme, template_of
from zofo.smoothness.figures import path_figures, spectrum_figures, step_figures
from zofo.smoothness.tables import claims_table, constants_table, fits_table, majoriser_table

MARK: Final = '<meta name="generator" content="zofo smoothness">'


def write_page(summary: Path, to: Path) -> None:
    """Write the page of a `smoothness.json`, or replace an earlier one.

    Raises:
        UserError: if the summary cannot be read, or if `to` exists and is not such a page.
    """
    check_target(to, MARK)
    write_text(to, render(read_json(summary)))


def render(summary: dict[str, Any]) -> str:
    """The page as text."""
    figures = {name: _figures(summary, theme) for name, theme in THEMES.items()}
    return render_document(
        "smoothness.html.j2",
        mark=MARK,
        summary=summary,
        claims=_nonempty(claims_table(summary["claims"])),
        fits=_nonempty(fits_table(summary)),
        constants=_nonempty(constants_table(summary)),
        majoriser=_nonempty(majoriser_table(summary)),
        figures=figures["light"],
        data=json_of(
            {
                "summary": summary,
                "figures": {
                    name: {key: choices.figures for key, choices in found.items()}
                    for name, found in figures.items()
                },
                "templates": {name: template_of(theme) for name, theme in THEMES.items()},
            }
        ),
    )


def _figures(summary: dict[str, Any], theme: Theme) -> dict[str, Choices]:
    found = {
        "figure-one": path_figures({"": summary}, theme),
        "steps": step_figures(summary, theme),
        "spectra": spectrum_figures(summary, theme),
    }
    return {name: choices for name, choices in found.items() if choices.figures}


def _nonempty(table: Table) -> Table | None:
    return table if table.rows else None
