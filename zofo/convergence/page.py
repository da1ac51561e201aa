"""The page: figures and the table of claims in one file that needs no network."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from zofo.convergence.cells import Result
from zofo.convergence.claims import CONFIRMED, REFUTED, UNDECIDED, Finding
from zofo.convergence.figures import figures_of
from zofo.disk.files import write_text
from zofo.pages.document import json_of, render_document
from zofo.pages.themes import THEMES, template_of

if TYPE_CHECKING:
    from zofo.convergence.plan import Plan

MARK: Final = '<meta name="generator" content="zofo convergence">'
_CLASSES: Final = {CONFIRMED: "win", REFUTED: "loss", UNDECIDED: "undecided"}


def number(value: float) -> str:
    """Three digits after the point, or four significant digits from 10 on."""
    return f"{value:+.3f}" if abs(value) < 10 else f"{value:.4g}"


def measured_text(finding: Finding) -> str:
    """Value and interval."""
    found = finding.measured.interval
    return f"{number(found.value)} [{number(found.low)}, {number(found.high)}]"


def claimed_text(finding: Finding) -> str:
    """The claimed candidate or range."""
    claim = finding.claim
    if isinstance(claim.claimed, str):
        name, value = claim.claimed.split(" (")[0], f"{claim.candidates[claim.claimed]:.3g}"
        return value if name == value else f"{name}: {value}"
    low, high = claim.claimed
    if high == float("inf"):
        return f"above {low:g}"
    return f"below {high:g}" if low == 0 else f"{low:.3g} to {high:.3g}"


def write_page(plan: Plan, results: Sequence[Result], found: Sequence[Finding], path: Path) -> None:
    """Write the page of a plan, its cells and the findings.

    Raises:
        UserError: if the file cannot be written.
    """
    write_text(path, render(plan, results, found))


def render(plan: Plan, results: Sequence[Result], found: Sequence[Finding]) -> str:
    """The page as text."""
    figures = {name: figures_of(found, theme) for name, theme in THEMES.items()}
    data: dict[str, Any] = {
        "figures": {
            name: {key: choices.figures for key, choices in chosen.items()}
            for name, chosen in figures.items()
        },
        "templates": {name: template_of(theme) for name, theme in THEMES.items()},
    }
    rows = [
        {
            "claim": f.claim,
            "claimed": claimed_text(f),
            "measured": measured_text(f),
            "value": f.measured.interval.value,
            "outcome": f.outcome,
            "mark": _CLASSES[f.outcome],
            "reason": f.reason,
        }
        for f in found
    ]
    return render_document(
        "convergence.html.j2",
        mark=MARK,
        data=json_of(data),
        figures=figures["light"],
        experiments=plan.experiments,
        rows=rows,
        counts=Counter(f.outcome for f in found),
        classes=_CLASSES,
        scale=plan.scale,
        engine=plan.engine,
        num_cells=len(results),
        minutes=sum(result.elapsed_s for result in results) / 60,
        written=datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
    )
