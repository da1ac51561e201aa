"""What a finished run leaves: its artefact and `result.json`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from zofo.config.schema import RunConfig
from zofo.disk.files import write_json
from zofo.environment import peak_memory_bytes
from zofo.results.belonging import digests_of
from zofo.run.prepare import Prepared
from zofo.run.task_trainer import TaskTrainer
from zofo.saved.artifact import save_artifact
from zofo.saved.card import write_card
from zofo.saved.layout import ARTIFACT_FOLDER, RESULT_FILE
from zofo.scoring.evaluate import Metrics
from zofo.tasks.digests import RowDigests


@dataclass(frozen=True)
class Result:
    """The result of a run."""

    folder: Path  # the run folder
    before: Metrics | None  # scores on the test rows before training; None without measure_test
    after: Metrics | None  # the same after training
    cost: dict[str, float]  # seconds, forward-equivalents, peak memory, bytes of the artefact
    held_out: Mapping[str, Mapping[str, Mapping[str, float | None]]] = field(default_factory=dict)
    """"rewards" or "preference" -> "before" and "after" training -> figures of held-out rows."""
    watch: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    """Scores of the second task on dev rows, "before" and "after" training; empty without it."""


def save_run_artifact(
    folder: Path, config: RunConfig, prepared: Prepared, trainer: TaskTrainer
) -> Path:
    """Save the artefact of a finished run, and return its folder."""
    return save_artifact(
        folder / ARTIFACT_FOLDER,
        prepared.model,
        base=prepared.base,
        method=config.method,
        trajectory=trainer.trajectory,
        base_fingerprint=prepared.base_fingerprint,
        tokenizer=prepared.tokenizer,
        task=config.task.model_dump(),
        labels=prepared.splits.labels,
        rows=RowDigests.of(prepared.splits),
        buffers=trainer.moved_buffers,
    )


def run_cost(
    trainer: TaskTrainer, artifact: Path, *, train_s: float, total_s: float
) -> dict[str, float]:
    """The cost of a finished run, for `Result.cost`."""
    return {
        "steps": trainer.state.global_step,
        "train_s": round(train_s, 3),
        "total_s": round(total_s, 3),
        "forward_equivalents": trainer.forward_equivalents,
        "peak_memory_bytes": peak_memory_bytes(trainer.args.device),
        "artifact_bytes": sum(f.stat().st_size for f in artifact.rglob("*") if f.is_file()),
    }


def write_result(
    artifact: Path,
    config: RunConfig,
    prepared: Prepared,
    trainer: TaskTrainer,
    result: Result,
    dev_before: Metrics | None,
) -> None:
    """Write result.json and, with the same numbers, the artefact's card."""
    best = trainer.state.best_model_checkpoint
    scores = {}
    if result.before is not None and result.after is not None:
        scores = {"before": result.before.as_dict(), "after": result.after.as_dict()}
    summary = {
        "method": config.method,
        "task": config.task.name,
        "model": config.model.name,
        "adapter": config.adapter.label,
        "seed": config.seed,
        **({"test": scores} if scores else {}),
        **result.held_out,
        "dev": {
            **({} if dev_before is None else {"before": dev_before.as_dict()}),
            "after": scores_at_end(trainer.state, config.select_best),
        },
        **({"watch": {"task": prepared.watched.name, **result.watch}} if prepared.watched else {}),
        "best_dev": trainer.state.best_metric,
        "best_checkpoint": Path(best).name if best else None,
        "cost": result.cost,
        "notes": [*prepared.splits.notes, *trainer.own.notes],
        "files": digests_of(result.folder),
    }
    write_json(result.folder / RESULT_FILE, summary)
    write_card(
        artifact,
        base=prepared.base,
        task=config.task.model_dump(),
        num_rows={part: len(rows) for part, rows in prepared.rows.items()},
        summary=summary,
    )


def watch_scores(state: Any, select_best: bool) -> dict[str, dict[str, float]]:
    """The logged scores of the second task "before" and "after"; empty without such a task."""
    first = next((entry for entry in state.log_history if "watch_loss" in entry), None)
    if first is None:
        return {}
    before = {k.removeprefix("watch_"): v for k, v in first.items() if k.startswith("watch_")}
    return {"before": before, "after": scores_at_end(state, select_best, "watch_")}


def scores_at_end(state: Any, select_best: bool, prefix: str = "eval_") -> dict[str, float]:
    """The logged scores of the saved model: of the best checkpoint, or of the last step."""
    measured = {
        entry["step"]: {k.removeprefix(prefix): v for k, v in entry.items() if k.startswith(prefix)}
        for entry in state.log_history
        if "eval_loss" in entry
    }
    step = state.best_global_step if select_best and state.best_global_step else max(measured)
    return {"step": step, **measured[step]}
