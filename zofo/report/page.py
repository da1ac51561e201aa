"""The page that compares a set of runs, and its data as plain values."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final
from urllib.parse import quote

from zofo.disk.files import write_text
from zofo.pages.document import check_target, json_of, render_document
from zofo.pages.figures import Choices
from zofo.pages.tables import Table
from zofo.pages.themes import THEMES, template_of
from zofo.report.answers import held_out_tables, num_left_out, sample_tables
from zofo.report.curves_figure import curve_figures
from zofo.report.data import Report, make_report, summary_of
from zofo.report.rates_figure import rate_figures
from zofo.report.rewards_figure import reward_figures
from zofo.report.scores_figure import difference_figure, pareto_figures
from zofo.report.tables import (
    gate_table,
    group_table,
    pair_table,
    rank_table,
    reach_table,
    run_table,
)
from zofo.results.table import Runs, relative_to

MARK: Final = '<meta name="generator" content="zofo report">'
_MAX_VALUES: Final = 12  # The page counts further values of an option without listing them.


def write_report(paths: Sequence[str | Path], to: str | Path) -> Report:
    """Write the page on a set of runs to the file `to`, or replace an earlier page there.

    Raises:
        UserError: as `make_report`, or if `to` exists and is not such a page.
    """
    target = Path(to).expanduser()
    check_target(target, MARK)
    report = make_report(paths)
    write_text(target, render(report, target.parent))
    return report


def render(report: Report, folder: Path) -> str:
    """The text of the page; links to runs are relative to `folder`, where the page will lie."""
    return render_document("report.html.j2", mark=MARK, **_context(report, folder))


def _context(report: Report, folder: Path) -> dict[str, Any]:
    from zofo.smoothness.tables import smoothness_table

    runs, comparison, verdict = report.runs, report.comparison, report.verdict
    rows: list[Any] = list(runs.table.itertuples())
    links = {row.run: _link(relative_to(row.folder, folder)) for row in rows}
    unwell = [row for row in rows if row.status != "done" or row.run in comparison.left_out]
    figures = {name: _figures(report, name) for name in THEMES}
    return {
        "studies": sorted({row.study for row in rows if row.study}),
        "written": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "statuses": Counter(row.status for row in rows),
        "num_runs": len(rows),
        "verdict": verdict,
        "groups": _nonempty(group_table(comparison)),
        "gates": _nonempty(gate_table(report.gates)),
        "pairs": _nonempty(pair_table(comparison.pairs)),
        "reach": _nonempty(reach_table(comparison.pairs)),
        "ranks": comparison.ranks,
        "no_ranks": comparison.no_ranks,
        "rank_table": None if comparison.ranks is None else rank_table(comparison.ranks),
        "unwell": _nonempty(run_table(unwell, links, comparison.left_out)),
        "held_out": held_out_tables(runs),
        "samples": sample_tables(runs),
        "num_left_out": num_left_out(runs),
        "links": links,
        "smoothness": smoothness_table(smoothness_of(runs), links),
        "all_runs": run_table(rows, links, comparison.left_out),
        "figures": figures["light"],
        "configuration": _options(runs.configs, ("output_dir",)),
        "environment": _options(runs.environments, ()),
        "data": json_of(
            {
                "summary": summary_of(report),
                "figures": {
                    name: {key: choices.figures for key, choices in found.items()}
                    for name, found in figures.items()
                },
                "templates": {name: template_of(theme) for name, theme in THEMES.items()},
            }
        ),
    }


def _figures(report: Report, theme_name: str) -> dict[str, Choices]:
    """Name -> figures, without those that are empty."""
    from zofo.smoothness.figures import path_figures

    theme, comparison = THEMES[theme_name], report.comparison
    rates, ratios = rate_figures(comparison.grids, theme)
    found = {
        "pareto": pareto_figures(comparison.groups, theme),
        "curves": curve_figures(comparison, report.runs, theme),
        "rewards": reward_figures(comparison, report.runs, theme),
        "rates": rates,
        "ratios": ratios,
        "smoothness": path_figures(smoothness_of(report.runs), theme),
    }
    estimate = report.verdict.estimate
    if estimate is not None:
        figure = difference_figure(comparison.pairs, estimate, theme)
        found["differences"] = Choices({"": ""}, {}, {"": figure})
    return {name: choices for name, choices in found.items() if choices.figures}


def smoothness_of(runs: Runs) -> dict[str, dict[str, Any]]:
    """Run -> summary of `zofo smoothness`, for the runs that have one."""
    from zofo.smoothness.tables import read_summary

    rows: list[Any] = list(runs.table.itertuples())
    found = {row.run: read_summary(row.folder) for row in rows}
    return {run: summary for run, summary in found.items() if summary is not None}


def _options(
    values: Mapping[str, Mapping[str, Any]], ignored: Sequence[str]
) -> dict[str, list[tuple[str, Any]]]:
    """Options with one value in all runs, and the others with the number of runs per value."""
    known = [found for found in values.values() if found]
    alike, unlike = [], []
    for key in dict.fromkeys(key for found in known for key in found):
        if key in ignored:
            continue
        counts = Counter(_shown(found.get(key)) for found in known)
        if len(counts) == 1:
            alike.append((key, next(iter(counts))))
        else:
            shown = [f"{value} ({num})" for value, num in counts.most_common(_MAX_VALUES)]
            more = len(counts) - len(shown)
            unlike.append((key, ", ".join(shown) + (f" and {more} more" if more else "")))
    return {"alike": alike, "unlike": unlike}


def _shown(value: Any) -> str:
    if value is None:
        return "–"
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)


def _nonempty(table: Table) -> Table | None:
    return table if table.rows else None


def _link(path: str) -> str:
    # Without "./", a browser would read a colon in the first part as the end of a protocol.
    return path if path.startswith("file:") else quote(f"./{path}/")
