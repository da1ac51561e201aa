"""The tasks of a study, their order and their states, read from the study's files.

    kind     work                                            it becomes ready
    search   a run that helps to choose the rates            at once
    final    a run of another seed at the chosen rates       once the cell's search has ended
    start    test scores of the untrained model, per seed    once all its cells have a choice
    test     test scores of a run at the chosen rates        once its run and its start have ended

The cells of a start are those with its model and task, so no test row is scored before all choices
on that model and task are made.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from zofo.disk.files import read_json_object
from zofo.errors import UserError
from zofo.study.grid import Cell, Grid, Run
from zofo.study.records import StudyFolder

Kind = Literal["search", "final", "start", "test"]
State = Literal["blocked", "ready", "ended"]
START_FILE = "test.json"
START_ERROR_FILE = "failed.json"


@dataclass(frozen=True)
class Task:
    """A unit of work for a worker. A start has no `cell`, and only a search has a `run`."""

    kind: Kind
    model: str
    task: str
    seed: int
    cell: Cell | None = None
    run: Run | None = None

    @property
    def name(self) -> str:
        """Name of the task, unique in the study."""
        if self.run is not None:
            return f"{self.kind} {self.run.id}"
        place = self.cell.name if self.cell is not None else f"{self.model}_{self.task}"
        return f"{self.kind} {place}_s{self.seed}"


def all_tasks(grid: Grid) -> dict[str, Task]:
    """Name -> task, in the order in which workers should claim them."""
    tasks = [
        Task("search", run.cell.model, run.cell.task, run.seed, run.cell, run)
        for run in grid.search
    ]
    cells = [(cell.model, cell.task, cell) for cell in grid.rates]
    tasks += [Task("final", m, t, seed, cell) for m, t, cell in cells for seed in grid.other_seeds]
    tasks += [Task("start", *start) for start in grid.starts]
    tasks += [Task("test", m, t, seed, cell) for m, t, cell in cells for seed in grid.spec.seeds]
    return {task.name: task for task in tasks}


def run_of(task: Task, folder: StudyFolder) -> Run | None:
    """The run of a task. None for a start, and if the cell of a final or test has no rates."""
    if task.run is not None or task.cell is None:
        return task.run
    return folder.final_run(task.cell, task.seed)


def state_of(task: Task, folder: StudyFolder) -> State:
    """Whether a task can begin now. A task that is no longer needed counts as ended.

    The choices of `folder` must be up to date.
    """
    choices = folder.choices_known
    run = run_of(task, folder)
    if task.kind == "start":
        if start_file(task, folder).exists() or start_error(task, folder) is not None:
            return "ended"
        cells = [c for c in folder.grid.rates if (c.model, c.task) == (task.model, task.task)]
        if any(cell not in choices for cell in cells):
            return "blocked"
        # If every cell failed, no test follows that would need the start for comparison.
        return "ready" if any(choices[cell].rates for cell in cells) else "ended"
    if task.kind != "search" and task.cell not in choices:
        return "blocked"
    if run is None:
        return "ended"
    has_ended = folder.record(run) is not None
    if task.kind != "test":
        return "ended" if has_ended else "ready"
    if not has_ended:
        return "blocked"
    if folder.is_measured(run):
        return "ended"
    return "ready" if state_of(start_of(task), folder) == "ended" else "blocked"


def start_of(task: Task) -> Task:
    """The start with which the scores of a test are compared."""
    return Task("start", task.model, task.task, task.seed)


def start_file(task: Task, folder: StudyFolder) -> Path:
    """File of the test scores of a start."""
    return folder.start_folder(task.model, task.task, task.seed) / START_FILE


def start_error(task: Task, folder: StudyFolder) -> str | None:
    """Why a start has failed; None if it has scores, or has not been tried."""
    path = start_file(task, folder).with_name(START_ERROR_FILE)
    try:
        return str(read_json_object(path).get("error")) if path.exists() else None
    except UserError as error:  # the file is damaged, which is a failure too
        return str(error)
