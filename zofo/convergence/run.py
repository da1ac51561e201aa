"""Run a study: compute missing cells, then write the claims as JSON and as a page.

A folder holds `cells/` (one file per finished cell), `convergence.json` and `convergence.html`. The
last two cover the experiments of the last command. A stopped study continues with the missing
cells.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Sequence
from typing import Any

from rich.console import Console

from zofo.convergence import cells as storage
from zofo.convergence.cells import Result
from zofo.convergence.claims import Finding, findings
from zofo.convergence.experiments.table import CLAIMS
from zofo.convergence.measures import Study
from zofo.convergence.plan import JSON_NAME, PAGE_NAME, Plan
from zofo.disk.files import finite, write_json


def run(plan: Plan, console: Console) -> list[Finding]:
    """Run the missing cells, judge the claims, and write JSON and page.

    Raises:
        UserError: if the folder cannot be written.
    """
    results = _results(plan, console)
    study = Study(results)
    names = {e.name for e in plan.experiments}
    found = findings(study, [claim for claim in CLAIMS if claim.experiment in names])
    write_json(plan.folder / JSON_NAME, summary_of(plan, results, found))
    from zofo.convergence.page import write_page

    write_page(plan, results, found, plan.folder / PAGE_NAME)
    return found


def _results(plan: Plan, console: Console) -> list[Result]:
    from zofo.console import new_progress

    every = plan.cells()
    done = [storage.read(plan.folder, cell, plan.engine) for cell in every]
    num = sum(result is not None for result in done)
    if num:
        console.print(f"{num} of {len(every)} cells are finished already", highlight=False)
    progress = new_progress(console, "cells")
    task = progress.add_task("convergence", total=len(every), completed=num, text="")
    if console.is_terminal:
        progress.start()
    results: list[Result] = []
    try:
        for place, (cell, known) in enumerate(zip(every, done, strict=True)):
            if known is not None:
                results.append(known)
                continue
            last_shown = 0.0

            # Epochs can take microseconds, so the line is drawn at most five times a second.
            def show(share: float, name: str = cell.name) -> None:
                nonlocal last_shown
                if time.monotonic() - last_shown > 0.2:
                    last_shown = time.monotonic()
                    progress.update(task, text=f"{name} {share:.0%}")

            on_progress = show if console.is_terminal else None
            results.append(storage.finish(plan.folder, cell, plan.engine, on_progress))
            progress.update(task, advance=1)
            if not console.is_terminal:
                line = f"{place + 1}/{len(every)} {cell.name}: {results[-1].elapsed_s:.1f} s"
                console.print(line, highlight=False, soft_wrap=True)
    finally:
        progress.stop()
    return results


def summary_of(plan: Plan, results: Sequence[Result], found: Sequence[Finding]) -> dict[str, Any]:
    """The results as plain values. Infinite and undefined numbers become null."""
    from zofo.environment import environment

    return finite(
        {
            "scale": dataclasses.asdict(plan.scale),
            "engine": plan.engine,
            "environment": environment(),
            "elapsed_s": sum(result.elapsed_s for result in results),
            "experiments": [
                {
                    "name": e.name,
                    "title": e.title,
                    "question": e.question,
                    "design": e.design,
                    "num_cells": sum(r.cell.experiment == e.name for r in results),
                }
                for e in plan.experiments
            ],
            "claims": [_claim(finding) for finding in found],
        }
    )


def _claim(finding: Finding) -> dict[str, Any]:
    claim, measured = finding.claim, finding.measured
    return {
        "name": claim.name,
        "experiment": claim.experiment,
        "statement": claim.statement,
        "source": claim.source,
        "claimed": claim.claimed,
        "candidates": dict(claim.candidates),
        "measured": dataclasses.asdict(measured.interval),
        "outcome": finding.outcome,
        "reason": finding.reason,
        "x_title": measured.x_title,
        "y_title": measured.y_title,
        "series": [dataclasses.asdict(series) for series in measured.series],
    }
