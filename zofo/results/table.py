"""Run folders as tables: one row per run, and one row per evaluation on dev.

A file may be missing (the run continues), incomplete (the run was killed) or written by another
version. Therefore a value that cannot be read is blank, and a run that cannot be read at all is a
row with the reason.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from zofo.disk.files import (
    json_digest,
    problem_of_name,
    read_json,
)
from zofo.disk.recorded import alterations, read_digests
from zofo.disk.yaml import read_yaml
from zofo.errors import UserError
from zofo.optim.methods import METHODS
from zofo.results.answers import FIGURES, reward_points
from zofo.results.belonging import mixed_up
from zofo.results.log import log_lines, number_of

if TYPE_CHECKING:
    import pandas as pd

CONFIG_FILE: Final = "run.yaml"
STUDY_FILE: Final = "study.json"
RECORDED: Final = (CONFIG_FILE, "metrics.jsonl", "result.json", STUDY_FILE)
"""Files of a run that its study records, because tables are made from them."""
COLUMNS: Final[dict[str, str]] = {
    "run": "name of the run, unique in the table",
    "folder": "path of the run folder",
    "study": "name of the study",
    "stage": "search (of learning rates), or final: a seed at the chosen rates, or a single run",
    "status": "done, failed, stopped, damaged, or unfinished: no result yet",
    "error": "why it failed, or cannot be read",
    "chosen": "whether the study chose its rates",
    "model": "base",
    "task": "name, with the file name if the rows are the user's own",
    "method": f"{', '.join(METHODS)}; a study's hybrid-tied has one rate for both",
    "adapter": "type of the adapter, or the name of its configuration file",
    "optimizer": "optimizer of the first-order block; blank if there is none",
    "base_lr": "learning rate of the base, a map of several as text; blank if the base is frozen",
    "adapter_lr": "learning rate of the adapter; blank if there is none",
    "rates": "both learning rates as text, which group the runs",
    "seed": "seed of the run",
    "setting": "digest of every other option that can change a result",
    "steps": "optimizer steps done",
    "planned_steps": "optimizer steps configured; blank if epochs are configured",
    "accuracy": "accuracy on the test rows, after training",
    "accuracy_before": "accuracy on the test rows, before training",
    "auc": "area under the ROC curve on the test rows, after training (two classes)",
    "majority": "share of the most frequent class of the test rows",
    "test_loss": "loss on the test rows, after training",
    "num_test": "number of test rows",
    "reward": "mean reward on the held-out prompts, after training with rewards",
    "reward_before": "mean reward on the held-out prompts, before training",
    "drift": "KL divergence from the model before training, in nats per token (with rewards)",
    "best_dev_loss": "lowest loss on dev",
    "last_dev_loss": "loss on dev when last measured",
    "forward_equivalents": "cost of training, in forward passes of a micro-batch without gradients",
    "train_s": "seconds of training, without evaluations and checkpoints",
    "peak_memory_bytes": "peak memory of the process, or of the accelerator",
    "artifact_bytes": "size of the artefact, without the base",
}
"""The columns of `Runs.table`, and what they mean."""
CURVE_COLUMNS: Final[dict[str, str]] = {
    "run": "as in the table of runs",
    "step": "optimizer steps done",
    "forward_equivalents": "forward-equivalents until then",
    "elapsed_s": "seconds of training until then",
    "dev_loss": "loss on the dev rows",
    "dev_accuracy": "accuracy on the dev rows",
}
REWARD_COLUMNS: Final[dict[str, str]] = {
    **{key: CURVE_COLUMNS[key] for key in ("run", "step", "forward_equivalents", "elapsed_s")},
    **FIGURES,
}
_NUMBERS: Final = (
    *("adapter_lr", "seed", "steps", "planned_steps", "accuracy", "accuracy_before"),
    *("auc", "majority", "test_loss", "num_test", "best_dev_loss", "last_dev_loss"),
    *("reward", "reward_before", "drift"),
    *("forward_equivalents", "train_s", "peak_memory_bytes", "artifact_bytes"),
)
APART: Final = frozenset(
    (
        *(
            "model.name",
            "model.quantization",
            "task.name",
            "task.train",
            "method",
            "adapter.type",
            "adapter.config_file",
        ),
        *("optimizer", "base_lr", "adapter_lr", "seed", "output_dir", "log_every", "report_to"),
        *("num_threads", "device", "eval_batch_size", "snapshot_every"),
        *("measure_test", "early_stopping", "watch_task"),
    )
)
"""Options or sections with a column of their own, or without effect on a result."""


def is_apart(key: str) -> bool:
    """Whether an option with a dotted key is one of `APART`, or in such a section."""
    return not APART.isdisjoint((key, key.partition(".")[0]))


@dataclass(frozen=True)
class Runs:
    """The contents of run folders.

    Attributes:
        table: one row per run, with the columns `COLUMNS`.
        curves: one row per evaluation on dev, with the columns `CURVE_COLUMNS`.
        rewards: one row per step with figures of rewards, with the columns `REWARD_COLUMNS`.
        configs: run -> its resolved configuration, with dotted keys.
        environments: run -> versions and machine, with dotted keys.
    """

    table: pd.DataFrame
    curves: pd.DataFrame
    rewards: pd.DataFrame
    configs: dict[str, dict[str, Any]] = field(default_factory=dict)
    environments: dict[str, dict[str, Any]] = field(default_factory=dict)


def read_runs(paths: Sequence[str | Path]) -> Runs:
    """Read run folders.

    Args:
        paths: run folders, or folders that contain them: that of a study, or its folder `runs`.

    Raises:
        UserError: if a path neither is nor contains a run folder.
    """
    import pandas as pd

    folders = find_runs(paths)
    rows: list[dict[str, Any]] = []
    points: list[dict[str, Any]] = []
    rewards: list[dict[str, Any]] = []
    configs, environments = {}, {}
    for name, folder in zip(_names(folders), folders, strict=True):
        config = _read_config(folder)
        row, curve, figures = _read_run(folder, config)
        rows.append({"run": name, "folder": folder, **row})
        points += [{"run": name, **point} for point in curve]
        rewards += [{"run": name, **point} for point in figures]
        configs[name] = flat(config)
        environments[name] = flat(_mapping(folder / "environment.json"))
    table = pd.DataFrame(rows, columns=list(COLUMNS))
    for column in _NUMBERS:
        table[column] = pd.to_numeric(table[column], errors="coerce").astype(float)
    curves, steps = (
        pd.DataFrame(found, columns=list(columns)).astype(dict.fromkeys(list(columns)[1:], float))
        for found, columns in ((points, CURVE_COLUMNS), (rewards, REWARD_COLUMNS))
    )
    return Runs(table, curves, steps, configs, environments)


def find_runs(paths: Sequence[str | Path]) -> list[Path]:
    """The run folders at or in the paths, in their order and without repetition.

    Raises:
        UserError: if a path neither is nor contains a run folder.
    """
    if not paths:
        raise UserError("no runs are named; name run folders, or a study's folder")
    found: dict[Path, Path] = {}
    for path in map(Path, paths):
        problem = problem_of_name(path)
        if problem is not None:
            raise UserError(problem)
        folder = path.expanduser()
        if not folder.is_dir():
            raise UserError(f"{path} is no folder; name run folders, or a study's folder")
        inside = [folder] if _is_run(folder) else [*_runs_in(folder / "runs"), *_runs_in(folder)]
        inside += _lost_runs(folder)
        if not inside:
            raise UserError(
                f"{path} is no run folder (no {CONFIG_FILE}), and neither it nor {path}/runs holds "
                "any; name run folders, or a study's folder"
            )
        for run in inside:
            found.setdefault(run.resolve(), run)
    return list(found.values())


def _runs_in(folder: Path) -> list[Path]:
    if not folder.is_dir():
        return []
    return [f for f in sorted(folder.iterdir()) if f.is_dir() and _is_run(f)]


def _lost_runs(folder: Path) -> list[Path]:
    """Places of runs that the study in a folder has recorded, and that hold no run any more."""
    study = folder.absolute().parent if folder.name == "runs" else folder
    places = {Path(name).parent for name in read_digests(study) if name.startswith("runs/")}
    return [study / place for place in sorted(places) if not _is_run(study / place)]


def _alterations(folder: Path) -> list[str]:
    """How the files of a run differ from those that it and its study have recorded."""
    place = folder.absolute()
    found = []
    if place.parent.name == "runs":
        found = alterations(place.parents[1], [place / name for name in RECORDED])
    mixed = None if found else mixed_up(folder)
    return found if mixed is None else [mixed]


def _is_run(folder: Path) -> bool:
    # If a run of a study failed at its start, its folder contains only the file of the study.
    return any((folder / name).is_file() for name in (CONFIG_FILE, STUDY_FILE))


def _names(folders: Sequence[Path]) -> list[str]:
    """Folder names, with as many parents as make them unique."""
    paths = [folder.resolve() for folder in folders]
    names = [path.name for path in paths]
    length = 1
    while len(set(names)) < len(names):
        length += 1
        names = ["/".join(path.parts[-length:]) for path in paths]
    return names


def _read_run(
    folder: Path, config: Mapping[str, Any]
) -> tuple[dict[str, Any], list[dict[str, Any]], list[dict[str, Any]]]:
    """The row of a run, its evaluations, and the figures of its rewards."""
    study = _mapping(folder / STUDY_FILE)
    altered = _alterations(folder)
    if altered:
        error = "; ".join(altered)
        known = {"study": _text(study.get("study")), "stage": "final", "chosen": False}
        return {**known, "status": "damaged", "error": error, **_what_ran(config, study)}, [], []
    is_chosen = study.get("chosen") is True
    result = _mapping(folder / "result.json")
    log = list(log_lines(folder / "metrics.jsonl"))
    curve = _curve(log)
    before, after = _inner(result, "test", "before"), _inner(result, "test", "after")
    is_final = is_chosen and bool(after)
    cost, last = _inner(result, "cost"), _last_values(log)
    losses = [point["dev_loss"] for point in curve if point["dev_loss"] is not None]
    elapsed = last.get("elapsed_s")
    row = {
        "study": _text(study.get("study")),
        # A run of the search becomes final if its rates are chosen and it is scored on test.
        "stage": "search" if study.get("stage") == "search" and not is_final else "final",
        "chosen": is_chosen,
        **_status(folder, study, result, config, last),
        **_what_ran(config, study),
        "steps": number_of(cost.get("steps", last.get("step"))),
        "planned_steps": number_of(config.get("steps")),
        "accuracy": number_of(after.get("accuracy")),
        "accuracy_before": number_of(before.get("accuracy")),
        "auc": number_of(after.get("auc")),
        "majority": number_of(after.get("majority")),
        "test_loss": number_of(after.get("loss")),
        "num_test": number_of(after.get("num_rows")),
        "reward": number_of(_inner(result, "rewards", "after").get("reward")),
        "reward_before": number_of(_inner(result, "rewards", "before").get("reward")),
        "drift": number_of(_inner(result, "dev", "after").get("drift")),
        "best_dev_loss": min(losses, default=None),
        "last_dev_loss": losses[-1] if losses else None,
        "forward_equivalents": number_of(
            cost.get("forward_equivalents", last.get("forward_equivalents"))
        ),
        "train_s": number_of(cost.get("train_s") if elapsed is None else elapsed),
        "peak_memory_bytes": number_of(
            cost.get("peak_memory_bytes", last.get("peak_memory_bytes"))
        ),
        "artifact_bytes": number_of(cost.get("artifact_bytes", _size(folder / "artifact"))),
    }
    return row, curve, reward_points(log)


def _status(
    folder: Path,
    study: Mapping[str, Any],
    result: Mapping[str, Any],
    config: Mapping[str, Any],
    last: Mapping[str, Any],
) -> dict[str, Any]:
    """`status` and `error`, from the study if it recorded a failure, else from the run's files."""
    said, error = study.get("status"), _text(study.get("error"))
    if said in ("failed", "stopped"):
        return {"status": said, "error": error}
    if not config:
        return {"status": "damaged", "error": f"{CONFIG_FILE} is missing or cannot be read"}
    if result:
        return {"status": "done", "error": ""}
    if (folder / "result.json").is_file():
        return {"status": "damaged", "error": "result.json cannot be read"}
    if last.get("non_finite") == 1 and config.get("on_non_finite") != "skip":
        return {"status": "stopped", "error": f"loss not finite at step {last.get('step')}"}
    return {"status": "unfinished", "error": error}


def _what_ran(config: Mapping[str, Any], study: Mapping[str, Any]) -> dict[str, Any]:
    """The columns that identify a run, with the names of the study if it has any."""
    cell, rates = _inner(study, "cell"), _inner(study, "rates")
    model, task, adapter = (_inner(config, key) for key in ("model", "task", "adapter"))
    method = _text(config.get("method") or str(cell.get("method", "")).removesuffix("-tied"))
    name = _text(cell.get("task") or task.get("name"))
    if task.get("train") and not cell.get("task"):
        name += f": {Path(_text(task['train'])).name}"
    kind = _text(cell.get("adapter") or adapter.get("type") or "none")
    if adapter.get("config_file") and not cell.get("adapter"):
        kind = Path(_text(adapter["config_file"])).stem
    base_lr = adapter_lr = None
    orders = METHODS.get(method)
    if orders is not None and orders.base != "frozen":
        base_lr = _base_lr(config.get("base_lr", rates.get("base_lr")))
    if orders is not None and orders.needs_adapter:
        adapter_lr = number_of(config.get("adapter_lr", rates.get("adapter_lr")))
    has_optimizer = orders is not None and orders.first is not None
    return {
        "model": _text(cell.get("model") or _model_name(model)),
        "task": name,
        "method": _text(cell.get("method") or method),
        "adapter": kind,
        "optimizer": _text(config.get("optimizer") or cell.get("optimizer"))
        if has_optimizer
        else "",
        "base_lr": base_lr,
        "adapter_lr": adapter_lr,
        "rates": f"{base_lr}, {adapter_lr}",
        "seed": number_of(config.get("seed", study.get("seed"))),
        "setting": json_digest({k: v for k, v in flat(config).items() if not is_apart(k)})[:8],
    }


def _model_name(model: Mapping[str, Any]) -> str:
    """The name of a base, with its quantisation if it has one."""
    return "-".join(_text(model[key]) for key in ("name", "quantization") if model.get(key))


def _base_lr(rate: Any) -> float | str | None:
    if isinstance(rate, Mapping):
        return ", ".join(f"{key}: {value}" for key, value in rate.items())
    return number_of(rate)


def _curve(log: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The evaluations on dev; the training entry of the same step supplies missing costs."""
    at_step = {entry.get("step"): entry for entry in log if "loss" in entry}
    points = {}  # by step; if a step was measured twice, the last entry counts
    for entry in log:
        if "eval_loss" not in entry:
            continue
        step = number_of(entry.get("step"))
        both = {**at_step.get(entry.get("step"), {}), **entry}
        points[step] = {
            "step": step,
            "forward_equivalents": number_of(both.get("forward_equivalents")),
            "elapsed_s": number_of(both.get("elapsed_s")),
            "dev_loss": number_of(entry.get("eval_loss")),
            "dev_accuracy": number_of(entry.get("eval_accuracy")),
        }
    return sorted((p for s, p in points.items() if s is not None), key=lambda p: p["step"])


def _last_values(log: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    return {key: value for entry in log for key, value in entry.items()}


def _read_config(folder: Path) -> dict[str, Any]:
    """The configuration as written, or empty if it cannot be read.

    `load_config` would refuse a run of another version, which still deserves a row.
    """
    try:
        return read_yaml(folder / CONFIG_FILE)
    except UserError:
        return {}


def _mapping(path: Path) -> dict[str, Any]:
    try:
        value = read_json(path)
    except UserError:
        return {}
    return value if isinstance(value, dict) else {}


def _inner(values: Mapping[str, Any], *path: str) -> Mapping[str, Any]:
    for key in path:
        inner = values.get(key)
        values = inner if isinstance(inner, Mapping) else {}
    return values


def _text(value: Any) -> str:
    return "" if value is None else str(value)


def _size(folder: Path) -> int | None:
    if not folder.is_dir():
        return None
    return sum(f.stat().st_size for f in folder.rglob("*") if f.is_file())


def flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested keys as dotted keys; a map of learning rates stays one value."""
    result: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, Mapping) and prefix + str(key) != "base_lr":
            result |= flat(value, f"{prefix}{key}.")
        else:
            result[f"{prefix}{key}"] = value
    return result


def relative_to(folder: Path, start: Path) -> str:
    """The relative path from `start` to `folder` with slashes, or an absolute URI."""
    try:
        return Path(os.path.relpath(folder.resolve(), start.resolve())).as_posix()
    except ValueError:  # Windows has no relative path to another drive
        return folder.resolve().as_uri()
