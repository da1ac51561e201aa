"""What a report says, as plain values: for the page, and as a JSON file for other programs."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from zofo.disk.files import json_text, write_json
from zofo.pages.document import check_target
from zofo.results.comparison import Comparison, compare
from zofo.results.gate import Gate, gates_of
from zofo.results.table import Runs, read_runs
from zofo.results.verdict import Verdict, judge
from zofo.statistics.estimates import Estimate

MARK: Final = {"written_by": "zofo report"}


@dataclasses.dataclass(frozen=True)
class Report:
    """The content of a page: runs, their comparison, the verdict on hybrid, and the gates."""

    runs: Runs
    comparison: Comparison
    verdict: Verdict
    gates: tuple[Gate, ...]


def make_report(paths: Sequence[str | Path]) -> Report:
    """Read runs and compare them; a path is a run folder or contains some, as that of a study.

    Raises:
        UserError: if a path neither is nor contains a run folder.
    """
    runs = read_runs(paths)
    comparison = compare(runs)
    gates = gates_of(comparison.groups, runs)
    return Report(runs, comparison, judge(comparison.pairs, gates), gates)


def summary_of(report: Report) -> dict[str, Any]:
    """The results as plain values; NaN becomes None, and infinity becomes "never"."""
    comparison, verdict = report.comparison, report.verdict
    table = report.runs.table.drop(columns="folder")
    indices = {id(group): i for i, group in enumerate(comparison.groups)}
    pairs = [
        vars(p) | {"hybrid": indices[id(p.hybrid)], "fo_peft": indices[id(p.fo_peft)]}
        for p in comparison.pairs
    ]
    gates = [
        vars(gate) | {"full": indices[id(gate.full)], "fo_peft": indices[id(gate.fo_peft)]}
        for gate in report.gates
    ]
    ranks = comparison.ranks and vars(comparison.ranks) | {
        "p_values": [[*names, p] for names, p in comparison.ranks.p_values.items()]
    }
    return _plain(
        {
            "verdict": verdict,
            "groups": comparison.groups,
            "pairs": pairs,
            "gates": gates,
            "ranks": ranks,
            "grids": comparison.grids,
            "left_out": comparison.left_out,
            "runs": table.to_dict(orient="records"),
        }
    )


def write_report_json(report: Report, to: str | Path) -> None:
    """Write the results and every evaluation on dev as JSON, or replace an earlier such file.

    Raises:
        UserError: as `check_json_target`.
    """
    check_json_target(to)
    curves = report.runs.curves.to_dict(orient="records")
    content = {**MARK, **summary_of(report), "curves": _plain(curves)}
    write_json(Path(to).expanduser(), content)


def check_json_target(to: str | Path) -> None:
    """Refuse to replace a file that is not an earlier report.

    Raises:
        UserError: if `to` is a folder, or a file that this module did not write.
    """
    mark = json_text(MARK).strip("{}\n ")
    check_target(Path(to).expanduser(), mark, "--json", "report.json")


def _plain(value: Any) -> Any:
    if isinstance(value, Estimate):
        value = value.as_dict()
    elif dataclasses.is_dataclass(value):
        value = vars(value)
    if isinstance(value, Mapping):
        return {str(key): _plain(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(inner) for inner in value]
    if isinstance(value, float) and not math.isfinite(value):  # JSON has no such numbers.
        return None if math.isnan(value) else "never"
    if value is None or isinstance(value, bool | int | float | str):
        return value
    return str(value)
