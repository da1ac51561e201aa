"""Draw figure 1 of the hybrid paper again, and print its tables, from `zofo smoothness` folders.

    python benchmarks/smoothness_figures.py runs/a runs/b --to docs/figures/smoothness-minilm

The script writes TO-KIND.svg for every kind of constant (gradient, alone, whole). Each figure shows
the local gradient-Lipschitz constant of base and adapter against ‖∇f‖, with one panel per run and
the fit L0 + L1 ‖∇f‖ as a line. The script also prints Markdown tables of constants and fits.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from svg import Panel, scatter_panels

from zofo.disk.files import write_text
from zofo.smoothness.summary import SERIES, series_of
from zofo.smoothness.tables import read_summary

TITLES = {
    "gradient": "Curvature of each block along its own gradient",
    "alone": "Gradient difference over the step of one block alone",
    "whole": "Gradient difference of each block over the whole step",
}
BLOCKS = ("base", "adapter")


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("runs", nargs="+", type=Path, help="folders of zofo smoothness")
    parser.add_argument("--to", type=Path, required=True, help="beginning of the files' names")
    given = parser.parse_args(arguments)
    summaries = []
    for folder in given.runs:
        found = read_summary(folder)
        if found is None:
            parser.error(f"{folder} holds no smoothness.json of this version")
        summaries.append(found)
    for kind in SERIES:
        panels = [panel for found in summaries if (panel := panel_of(found, kind))]
        if panels:
            path = given.to.with_name(f"{given.to.name}-{kind}.svg")
            text = scatter_panels(TITLES[kind], "‖∇f‖", "local constant", panels)
            write_text(path, text)
            print(path)
    print(spectra(summaries))
    print(fits(summaries))


def panel_of(summary: Mapping[str, Any], kind: str) -> Panel | None:
    """Return the points and fits of both blocks, or None where nothing was measured."""
    groups, lines = {}, {}
    for block in BLOCKS:
        points = [(u, value) for _, u, value in series_of(summary["path"], kind, block)]
        if not points:
            continue
        groups[block] = points
        fit = summary["fits"].get(kind, {}).get(block)
        if fit is not None:
            constant, slope = (fit["linear"][k]["value"] for k in ("constant", "slope"))
            low, high = min(u for u, _ in points), max(u for u, _ in points)
            xs = [low * (high / low) ** (i / 24) for i in range(25)]
            lines[block] = [(x, constant + slope * x) for x in xs]
    return Panel(f"{summary['model']}, {summary['adapter']}", groups, lines) if groups else None


def spectra(summaries: Sequence[Mapping[str, Any]]) -> str:
    """Return a table of the spectra, with one row per run, block and step.

    The columns are the extreme eigenvalues, the trace, the ranks, and the majoriser's κ.
    """
    lines = [
        "| run | block | step | largest eigenvalue | smallest | trace [95%] | tr/‖H‖ | "
        "‖H‖²_F/‖H‖² | κ |",
        "|---|---|--:|--:|--:|--:|--:|--:|--:|",
    ]
    for found in summaries:
        kappas = {r["step"]: r.get("kappa") for r in found["majoriser"]}
        for record in found["spectra"]:
            top, bottom, trace = record["top"], record["bottom"], record["trace"]
            kappa = kappas.get(record["step"])
            cells = [
                f"{found['model']}, {found['adapter']}",
                record["block"],
                f"{record['step']}",
                f"{top['value']:.3g} ± {top['residual']:.0e}",
                f"{bottom['value']:.3g} ± {bottom['residual']:.0e}",
                _estimate(trace["mean"], trace),
                "–"
                if record["effective_rank"] is None
                else f"{record['effective_rank']['mean']:.2g}",
                "–" if record["stable_rank"] is None else f"{record['stable_rank']['mean']:.2g}",
                "–" if kappa is None else f"{kappa:.3g}",
            ]
            lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def fits(summaries: Sequence[Mapping[str, Any]]) -> str:
    """Return a table of the fits, with one row per run, kind and block."""
    lines = [
        "| run | constant | block | ‖∇f‖ differs by | level | L0 | L1 | exponent p | grows | "
        "p < 2 |",
        "|---|---|---|--:|--:|--:|--:|--:|---|---|",
    ]
    for found in summaries:
        for kind, blocks in found["fits"].items():
            for block, fit in blocks.items():
                values = (
                    fit["level"],
                    fit["linear"]["constant"],
                    fit["linear"]["slope"],
                    fit["power"]["exponent"],
                )
                cells = [
                    f"{found['model']}, {found['adapter']}",
                    kind,
                    block,
                    f"× {fit['spread']:.3g}",
                    *(_estimate(v["value"], v) for v in values),
                    fit["grows"].partition(" ")[0],
                    fit["is_subquadratic"].partition(" ")[0],
                ]
                lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def _estimate(value: float, bounds: Mapping[str, Any]) -> str:
    if bounds["low"] is None:
        return f"{value:.2g}"
    return f"{value:.2g} [{bounds['low']:.2g}, {bounds['high']:.2g}]"


if __name__ == "__main__":
    main()
