"""Reads and writes the study folder and the record of each run.

    study.yaml            the complete study
    study.db              the queue (SQLite), unless `storage` names a database
    study.id              name of the study in the queue's database
    configs/RUN.yaml      configuration of a run
    runs/RUN/             run folder, with `study.json` once the run has ended
    runs/RUN.log          output of a run
    untrained/START/      test scores of the untrained model for a task and seed
    locks/                locks of the running tasks
    zofo_digests.json     digests of the files that tables are made from
    selection.json        the choice of every cell, and the dev scores behind it
    results.json          one entry per run

`study.json` holds dev scores. Test scores are written into `result.json`; the choice of rates does
not read that file.
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any, Final, Literal

import pydantic

from zofo.disk.files import read_json_object, refusing, remove_file, write_json, write_text
from zofo.disk.recorded import alterations, forget_files, record_files, write_recorded
from zofo.errors import UserError, shown
from zofo.results.belonging import CONFIG, digests_of
from zofo.results.table import RECORDED, STUDY_FILE
from zofo.saved.checkpoint_folders import checkpoints
from zofo.saved.layout import ARTIFACT_FOLDER, BASE_COPIES, RESULT_FILE
from zofo.study.grid import Cell, Grid, Run, as_json
from zofo.study.select import Choice, DevScore, choose
from zofo.study.spec import SPEC_FILE

RECORD_FILE: Final = STUDY_FILE
Record = dict[str, Any]
_REMEDY: Final = "put the file back, or remove the folder of the run and the study repeats it"


class _Form(pydantic.BaseModel):
    """The keys of a record that are read; more may follow."""

    model_config = pydantic.ConfigDict(strict=True)

    cell: dict[str, Any]
    chosen: bool
    status: Literal["done", "failed", "stopped"]
    error: str | None
    dev: dict[str, Any] | None
    cost: dict[str, Any]
    test_error: str | None


class StudyFolder:
    """Reads and writes the files of a study; the record of each ended run is read once."""

    def __init__(self, grid: Grid) -> None:
        self.grid, self.path = grid, Path(grid.spec.output)
        self._records: dict[str, Record] = {}
        self._choices: dict[Cell, Choice] = {}
        self._measured: set[str] = set()

    def begin(self) -> None:
        """Create the folder and write the study into it."""
        for name in ("configs", "runs", "locks", "untrained"):
            (self.path / name).mkdir(parents=True, exist_ok=True)
        write_text(self.path / SPEC_FILE, self.grid.spec.to_yaml())

    def run_folder(self, run: Run) -> Path:
        """Run folder of a run."""
        return self.path / "runs" / run.id

    def log_file(self, name: str) -> Path:
        """File of the output of a run."""
        return self.path / "runs" / f"{name}.log"

    def config_file(self, run: Run) -> Path:
        """The configuration file with which a run begins; written on first use."""
        path = self.path / "configs" / f"{run.id}.yaml"
        if not path.exists():
            write_text(path, self.grid.config(run).to_yaml())
        return path

    def start_folder(self, model: str, task: str, seed: int) -> Path:
        """Folder of the test scores of an untrained model."""
        return self.path / "untrained" / f"{model}_{task}_s{seed}"

    def record(self, run: Run) -> Record | None:
        """The record of a run; None if it has not ended."""
        if run.id not in self._records:
            folder = self.run_folder(run)
            if os.path.lexists(folder) and not folder.is_dir():
                raise UserError(
                    f"{folder} is no folder, so the files of this run are lost; remove it, and the "
                    "study repeats the run"
                )
            path = folder / RECORD_FILE
            if not path.exists():
                return None
            self._check(run)
            record = read_json_object(path)
            with refusing(f"{path} is damaged", _REMEDY):
                _Form.model_validate(record)
            if record.get("id", run.id) != run.id:
                raise UserError(
                    f"{path} belongs to the run {shown(record['id'])}, and not to {run.id}; "
                    f"{_REMEDY}"
                )
            self._records[run.id] = record
        return self._records[run.id]

    def _check(self, run: Run) -> None:
        """Compare the files of an ended run with their digests."""
        folder = self.run_folder(run)
        problems = alterations(self.path, [folder / name for name in RECORDED])
        if problems:
            raise UserError(
                f"{' and '.join(problems)}, of a run in the cell {run.cell.name}; {_REMEDY}"
            )

    def write_record(self, run: Run, record: Record) -> None:
        """Write the record of a run."""
        # A run that failed at its start has no folder yet.
        self.run_folder(run).mkdir(parents=True, exist_ok=True)
        write_recorded(self.path, self.run_folder(run) / RECORD_FILE, record)
        self._records[run.id] = record

    def has_failed(self, run: Run) -> bool:
        """Whether a run has ended with an error."""
        record = self.record(run)
        return record is not None and record["status"] == "failed"

    def restore(self, run: Run) -> None:
        """Delete a completed run without an artefact, so that it runs again.

        Artefacts are deleted when other rates are chosen, but a new choice may need them.
        """
        record, folder = self.record(run), self.run_folder(run)
        is_done = record is not None and record["status"] == "done"
        if is_done and not (folder / ARTIFACT_FOLDER).exists():
            shutil.rmtree(folder)
            forget_files(self.path, folder)
            self._records.pop(run.id)

    def forget(self, run: Run) -> None:
        """Delete the record of a failed run, so that it continues from its last checkpoint."""
        remove_file(self.run_folder(run) / RECORD_FILE)
        forget_files(self.path, self.run_folder(run))
        self._records.pop(run.id, None)
        self._choices.pop(run.cell, None)

    @property
    def choices_known(self) -> dict[Cell, Choice]:
        """The choices that `choices` has found so far."""
        return self._choices

    def choices(self) -> dict[Cell, Choice]:
        """The choice of every cell whose search has ended; marks the runs of each new choice."""
        waiting = [run for run in self.grid.search if run.cell not in self._choices]
        scores = []
        for run in waiting:
            record = self.record(run)
            if record is not None:
                scores.append(DevScore(run.cell, run.rates, run.seed, self._score(record)))
        for cell, choice in choose(self.grid, scores).items():
            self._choices[cell] = choice
            for run in (r for r in waiting if r.cell == cell):
                self._records.pop(run.id)  # read again: another worker may have changed it
                record = self.record(run)
                assert record is not None
                is_chosen = run.rates == choice.rates
                if record["chosen"] != is_chosen:
                    self.write_record(run, {**record, "chosen": is_chosen})
                if not is_chosen and self.grid.spec.keep == "chosen":
                    shutil.rmtree(self.run_folder(run) / ARTIFACT_FOLDER, ignore_errors=True)
        return self._choices

    def final_run(self, cell: Cell, seed: int) -> Run | None:
        """The run of a seed at the chosen rates of a cell; None if there are no such rates."""
        choice = self._choices.get(cell)
        return None if choice is None or choice.rates is None else Run(cell, choice.rates, seed)

    def is_measured(self, run: Run) -> bool:
        """Whether a run has its test scores, or can never get them."""
        if run.id in self._measured:
            return True
        record = self.record(run)
        if record is None:
            return False
        is_over = record["status"] != "done" or record["test_error"] is not None
        if is_over or "test" in read_json_object(self.run_folder(run) / RESULT_FILE):
            self._measured.add(run.id)  # remembered, so that the file is read only once
        return run.id in self._measured

    def forget_measurement(self, run: Run) -> None:
        """Delete the error of a failed measurement, so that it is tried again."""
        record = self.record(run)
        if record is not None and record["test_error"] is not None:
            self._measured.discard(run.id)
            self.write_record(run, {**record, "test_error": None})

    def ended(self, run: Run, status: str, error: str | None, is_final: bool) -> Record:
        """Record the end of a run, and delete files that are only needed to resume it."""
        folder = self.run_folder(run)
        result = read_json_object(folder / RESULT_FILE) if status == "done" else {}
        record = {
            "study": self.grid.spec.name,
            **as_json(run),
            "stage": "final" if is_final else "search",
            "chosen": is_final,
            "status": status,
            "error": error,
            "dev": result["dev"]["after"] if status == "done" else None,
            "cost": dict(result.get("cost", {})),
            "test_error": None,
            "files": digests_of(folder, [CONFIG]),
        }
        # A failed run keeps its checkpoints, because it may be tried again.
        if self.grid.spec.keep == "chosen" and status != "failed":
            for checkpoint in checkpoints(folder).values():
                shutil.rmtree(checkpoint, ignore_errors=True)
            for name in BASE_COPIES:
                remove_file(folder / name, is_needed=False)
        files = [folder / name for name in RECORDED if name != RECORD_FILE]
        record_files(self.path, [path for path in files if path.is_file()])
        self.write_record(run, record)
        return record

    def write_results(self) -> None:
        """Write `selection.json` and `results.json`, from the files of the runs."""
        selection = [
            {
                "cell": cell._asdict(),
                "rates": None if choice.rates is None else choice.rates._asdict(),
                "dev": [{**pair._asdict(), "score": s} for pair, s in choice.scores.items()],
            }
            for cell, choice in sorted(self.choices().items())
        ]
        write_json(self.path / "selection.json", selection)
        runs, timings = [], {}
        for run in sorted(self.known_runs(), key=lambda run: run.id):
            record = self.record(run)
            if record is None:
                continue
            entry = {k: v for k, v in record.items() if k not in ("study", "cost")}
            cost = record["cost"]
            entry |= {k: cost.get(k) for k in ("steps", "forward_equivalents")}
            has_result = record["status"] == "done"
            result = read_json_object(self.run_folder(run) / RESULT_FILE) if has_result else {}
            rewards = {"rewards": result["rewards"]} if "rewards" in result else {}
            runs.append({**entry, "test": result.get("test"), **rewards})
            timings[run.id] = {k: v for k, v in cost.items() if k not in entry}
        # Timings differ between repetitions of a study, so they stand apart from the results.
        study, dropped = self.grid.spec.name, self.grid.dropped
        results = {"study": study, "runs": runs, "dropped": dropped, "timings": timings}
        write_json(self.path / "results.json", results)

    def known_runs(self) -> list[Run]:
        """The runs of the search, and the runs of the other seeds at rates chosen so far."""
        later = [self.final_run(c, s) for c in self.grid.rates for s in self.grid.other_seeds]
        return [*self.grid.search, *(run for run in later if run is not None)]

    def _score(self, record: Record) -> float | None:
        dev = record["dev"]
        if dev is None:
            return None
        loss = self.grid.spec.select_by == "loss"
        return float(dev["loss"]) if loss else 1 - float(dev["accuracy"])
