"""Shows the progress of a study: counts and the estimated remaining time, as table or as lines.

    remaining = sum over open runs of (forward-equivalents · seconds for one) / number of workers

The seconds for one forward-equivalent come from ended runs with the same model and task, else with
the same model, else from all ended runs.
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from rich.console import Console, Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

from zofo.console import duration_text
from zofo.study.grid import Cell, Grid, Run, cost_of
from zofo.study.jobs import Task, all_tasks, run_of, start_error, state_of
from zofo.study.records import StudyFolder

if TYPE_CHECKING:
    from zofo.study.worker import Job, Worker

PHASES = {"search": "search", "final": "other seeds", "start": "untrained", "test": "test"}
STATES = ("done", "running", "failed", "stopped", "open")


@dataclass
class Summary:
    """The state of a study.

    Attributes:
        counts: phase -> state -> number of tasks.
        running: names of the running tasks.
        failed: name of a failed task -> reason.
        remaining_s: estimated seconds for one worker; None if no run has been timed.
        num_unchosen: number of cells without rates, because every pair failed.
    """

    counts: dict[str, dict[str, int]]
    running: list[str] = field(default_factory=list)
    failed: dict[str, str] = field(default_factory=dict)
    remaining_s: float | None = None
    num_unchosen: int = 0

    @property
    def num_open(self) -> int:
        """Number of tasks that have not ended."""
        return sum(c["open"] + c["running"] for c in self.counts.values())


class Costs:
    """The cost of the runs of a study; each cell is computed once."""

    def __init__(self, grid: Grid) -> None:
        self.grid = grid
        self._costs: dict[Cell, float] = {}

    def of(self, cell: Cell) -> float:
        """Forward-equivalents of a run of a cell, for any rates and any seed."""
        if cell not in self._costs:
            run = Run(cell, self.grid.rates[cell][0], self.grid.spec.seeds[0])
            self._costs[cell] = cost_of(self.grid.config(run))
        return self._costs[cell]

    def total(self) -> float:
        """Forward-equivalents of the whole study."""
        choosing, other = len(self.grid.spec.choosing_seeds), len(self.grid.other_seeds)
        numbers = {cell: len(pairs) * choosing + other for cell, pairs in self.grid.rates.items()}
        return math.fsum(self.of(cell) * num for cell, num in numbers.items())


def seconds_per_forward(records: Sequence[Mapping[str, Any]]) -> dict[tuple[str, ...], float]:
    """(model, task), (model,) and () -> seconds for a forward-equivalent, with evaluations."""
    sums: dict[tuple[str, ...], tuple[float, float]] = {}
    for record in records:
        cost, cell = record["cost"], record["cell"]
        if not cost.get("forward_equivalents"):
            continue
        for key in ((cell["model"], cell["task"]), (cell["model"],), ()):
            spent, forwards = sums.get(key, (0.0, 0.0))
            sums[key] = spent + cost["total_s"], forwards + cost["forward_equivalents"]
    return {key: spent / forwards for key, (spent, forwards) in sums.items()}


def summarize(
    folder: StudyFolder, costs: Costs, tasks: Mapping[str, Task], running: Sequence[str] = ()
) -> Summary:
    """Count the tasks in each state. The choices of `folder` must be up to date.

    Args:
        folder: the files of the study.
        costs: the costs of its runs.
        tasks: all tasks by name.
        running: names of the running tasks.
    """
    counts = {phase: dict.fromkeys(STATES, 0) for phase in PHASES}
    records = [r for r in map(folder.record, folder.known_runs()) if r is not None]
    paces = seconds_per_forward(records)
    result, left = Summary(counts, list(running)), 0.0
    for name, task in tasks.items():
        state, why = _state(task, folder, name in running)
        if state is None:
            continue
        counts[task.kind][state] += 1
        if state == "failed":
            result.failed[name] = why or ""
        if state in ("open", "running") and task.cell is not None and task.kind != "test":
            keys: list[tuple[str, ...]] = [(task.model, task.task), (task.model,), ()]
            # Without a timed run the pace is NaN, which makes the whole estimate unknown.
            pace = next((paces[key] for key in keys if key in paces), math.nan)
            left += costs.of(task.cell) * pace
    result.remaining_s = None if math.isnan(left) else left
    known = folder.choices_known.values()
    result.num_unchosen = sum(choice.rates is None for choice in known)
    return result


def _state(task: Task, folder: StudyFolder, is_running: bool) -> tuple[str | None, str | None]:
    """One of `STATES`, and the error; the state is None if the task is no longer needed."""
    if is_running:
        return "running", None
    if state_of(task, folder) != "ended":
        return "open", None
    run = run_of(task, folder)
    if task.kind == "start":
        # Only a choice of rates leads to test scores that a start is compared with.
        chosen = [cell for cell, choice in folder.choices_known.items() if choice.rates]
        if (task.model, task.task) not in [(cell.model, cell.task) for cell in chosen]:
            return None, None
        error = start_error(task, folder)
        return ("done" if error is None else "failed"), error
    record = None if run is None else folder.record(run)
    if record is None:
        return None, None
    if task.kind != "test":
        return record["status"], record["error"]
    if record["status"] != "done":
        return None, None
    return ("done" if record["test_error"] is None else "failed"), record["test_error"]


def table_of(summary: Summary, num_workers: int = 1) -> Table:
    """The counts of a summary as a table."""
    table = Table("", *STATES, title=_title(summary, num_workers))
    for phase, counts in summary.counts.items():
        if any(counts.values()):
            table.add_row(PHASES[phase], *(str(counts[state] or "") for state in STATES))
    return table


def _title(summary: Summary, num_workers: int) -> str:
    if not summary.num_open:
        return "everything has ended"
    if summary.remaining_s is None:
        return "no run has been timed yet"
    return f"about {duration_text(summary.remaining_s / max(num_workers, 1))} left"


class StudyDisplay:
    """Reports a worker's progress: a live table on a terminal, else a line per ended task."""

    def __init__(self, grid: Grid, console: Console) -> None:
        self.console, self.costs = console, Costs(grid)
        self.tasks = all_tasks(grid)
        self._live: Live | None = None
        self._has_reported_failure = False

    def started(self, worker: Worker, job: Job) -> None:
        """Report that a job begins."""
        self.refreshed(worker)

    def ended(self, worker: Worker, job: Job) -> None:
        """Print a permanent line about a job that has ended."""
        took = duration_text(time.monotonic() - job.began)
        line = f"{job.task.name}: {self._outcome(worker, job)}, {took}"
        if self._live is None and self.console.is_terminal:
            self.refreshed(worker)
        if self._live is None:
            summary = self._summary(worker)
            num = sum(sum(c.values()) for c in summary.counts.values())
            line = f"{num - summary.num_open}/{num} {line}; {_title(summary, worker.num_slots)}"
        self._print(line)

    def refreshed(self, worker: Worker) -> None:
        """Update the table."""
        if not self.console.is_terminal:
            return
        summary = self._summary(worker)
        lines = [
            Text(f"{job.task.name}  {duration_text(time.monotonic() - job.began)}")
            for job in worker.jobs
        ]
        if self._live is None:
            self._live = Live(console=self.console, transient=True, auto_refresh=False)
            self._live.start()
        table = table_of(summary, max(worker.num_slots, len(summary.running)))
        self._live.update(Group(table, *lines), refresh=True)

    def database_failed(self, worker: Worker, error: Exception) -> None:
        """Report once that the database does not answer."""
        if not self._has_reported_failure:
            self._has_reported_failure = True
            first = (str(error).strip().splitlines() or [repr(error)])[0]
            self._print(f"the queue's database does not answer ({first}); trying again")

    def close(self) -> None:
        """Remove the table from the screen."""
        if self._live is not None:
            self._live.stop()
            self._live = None

    def _print(self, line: str) -> None:
        # Names and errors may contain brackets, which rich would read as markup.
        self.console.print(line, highlight=False, markup=False, soft_wrap=True)

    def _summary(self, worker: Worker) -> Summary:
        running = {job.task.name for job in worker.jobs} | (worker.others() or set())
        return summarize(worker.folder, self.costs, self.tasks, sorted(running))

    def _outcome(self, worker: Worker, job: Job) -> str:
        state, error = _state(job.task, worker.folder, False)
        record = None if job.run is None else worker.folder.record(job.run)
        if error:
            return f"{state}: {error.splitlines()[-1]}"
        if record is not None and record["dev"] is not None and job.task.kind != "test":
            return f"{state}, dev loss {record['dev']['loss']:.4f}"
        return str(state)
