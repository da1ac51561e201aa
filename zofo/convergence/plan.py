"""The plan of a convergence study: the chosen experiments at the chosen scale."""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from zofo.convergence.cells import ENGINES, Engine
from zofo.convergence.experiments.table import EXPERIMENTS, FULL, QUICK, Experiment, Scale
from zofo.disk.files import problem_of_target
from zofo.errors import UserError

JSON_NAME: Final = "convergence.json"
PAGE_NAME: Final = "convergence.html"


@dataclass(frozen=True)
class Plan:
    """What is run; `engine` is "compiled", or "optimizer" for `zofo.HybridOptimizer` itself."""

    folder: Path
    experiments: tuple[Experiment, ...]
    scale: Scale
    engine: Engine

    def cells(self) -> list[Any]:
        """All cells, in order."""
        return [cell for e in self.experiments for cell in e.build(self.scale)]


def make_plan(
    folder: str | Path,
    names: Sequence[str] = (),
    *,
    quick: bool = False,
    engine: str = "compiled",
    num_seeds: int | None = None,
) -> Plan:
    """Check a request and make its plan.

    Args:
        folder: folder of the study.
        names: names of experiments; empty for all.
        quick: use few seeds, epochs and rates, to try the study out. The results support no
            conclusions.
        engine: "compiled" or "optimizer".
        num_seeds: replaces the number of seeds of the scale.

    Raises:
        UserError: for values outside their ranges, all of them at once.
    """
    known = {e.name: e for e in EXPERIMENTS}
    wrong = []
    for name in names:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            wrong.append(
                f"experiment {name!r} does not exist{hint}; choose from {', '.join(known)}"
            )
    if engine not in ENGINES:
        wrong.append(f"engine is {engine!r}; choose one of {', '.join(ENGINES)}")
    if num_seeds is not None and num_seeds < 3:
        wrong.append(f"seeds is {num_seeds}; an interval needs at least 3")
    target = Path(folder).expanduser()
    problem = problem_of_target(target, is_folder=True)
    if problem is not None:
        wrong.append(problem)
    if wrong:
        raise UserError("; ".join(wrong))
    scale = QUICK if quick else FULL
    if num_seeds is not None:
        scale = dataclasses.replace(scale, num_seeds=num_seeds)
    chosen = tuple(e for e in EXPERIMENTS if not names or e.name in names)
    return Plan(target, chosen, scale, engine)  # type: ignore[arg-type]
