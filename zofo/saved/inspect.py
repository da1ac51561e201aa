"""Describe a folder that zofo wrote, and find missing or damaged files.

`inspect` only reads files. `zofo.saved.verify` also loads the model.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated, Any, Final

import pydantic

from zofo.config.load import read_config
from zofo.disk.files import open_tensors, read_json_object, refusing
from zofo.disk.folders import LIST_FILE
from zofo.errors import UserError
from zofo.models.model_folders import check_digests, check_model_folder, files_in_index
from zofo.optim.trajectory import TRAJECTORY_FILE, Trajectory
from zofo.results.belonging import mixed_up
from zofo.saved.checkpoint_folders import checkpoints, find_damage, find_misfit, read_state
from zofo.saved.export_card import EXPORT_FILE, Record, read_record
from zofo.saved.layout import ARTIFACT_FOLDER, BASE_FILE, CONFIG_FILE, RESULT_FILE
from zofo.saved.manifest import ADAPTER_FOLDER, HEADER_FILE, check_files, read_header
from zofo.saved.source import is_checkpoint, read_base, run_id_of

_WITHOUT_DIGESTS: Final = (
    "an older zofo wrote this export without digests, so altered weights are not noticed; export "
    "again to have them checked"
)
_Number = Annotated[float, pydantic.Field(strict=True)]


class _Scores(pydantic.BaseModel):
    """The scores of `result.json` that are shown; others are kept as they are."""

    model_config = pydantic.ConfigDict(extra="allow")

    num_rows: Annotated[int, pydantic.Field(strict=True)]
    f1: _Number | None = None
    exact_match: _Number | None = None
    accuracy: _Number | None = None
    auc: _Number | None = None
    loss: _Number | None = None
    perplexity: _Number | None = None


class _Rewards(pydantic.BaseModel):
    """The rewards of `result.json` that are shown; others are kept as they are."""

    model_config = pydantic.ConfigDict(extra="allow")

    reward: _Number | None = None


_SCORES: Final = pydantic.TypeAdapter(dict[str, _Scores])
_REWARDS: Final = pydantic.TypeAdapter(dict[str, _Rewards])


@dataclass
class Info:
    """Description of a folder; None for what a folder of this kind does not record."""

    path: Path
    kind: str  # "run", "artefact", "checkpoint" or "export"
    is_whole: bool = True  # whether no file is missing or damaged, and a run has ended
    problem: str | None = None  # the first fault, in words
    note: str | None = None  # what could not be checked, in words
    method: str | None = None
    base: str | None = None  # name of the base
    base_fingerprint: str | None = None  # of the base before training
    adapter: str | None = None  # type of the adapter, as peft names it
    task: str | None = None
    seed: int | None = None
    step: int | None = None  # of a checkpoint or of a replayed base
    num_recorded_steps: int | None = None  # updates of the base that can be replayed
    checkpoints: dict[int, bool] = field(default_factory=dict)  # step -> whether it is undamaged
    size_bytes: int = 0  # of all files
    scores: dict[str, Any] | None = None  # on the test rows, before and after training
    rewards: dict[str, Any] | None = None  # on the held-out prompts, before and after training

    def as_dict(self) -> dict[str, Any]:
        """The values that apply, as JSON can hold them."""
        values = asdict(self) | {"path": str(self.path)}
        return {key: value for key, value in values.items() if value not in (None, {})}


def inspect(path: str | Path) -> Info:
    """Describe a folder without loading a model.

    Raises:
        UserError: if the folder is neither a run nor an artefact, a checkpoint or an export.
    """
    folder = Path(path).expanduser()
    readers: dict[str, Callable[[Info], None]] = {
        "artefact": _read_artifact,
        "export": _read_export,
        "checkpoint": _read_checkpoint,
        "run": _read_run,
    }
    info = Info(folder, kind_of(folder))
    info.size_bytes = sum(f.stat().st_size for f in folder.rglob("*") if f.is_file())
    try:
        readers[info.kind](info)
    except UserError as error:
        info.is_whole, info.problem = False, str(error)
    return info


def kind_of(folder: Path) -> str:
    """The kind of a folder: "run", "artefact", "checkpoint" or "export"."""
    if not folder.is_dir():
        raise UserError(f"{folder} does not exist, or is no folder")
    if (folder / HEADER_FILE).is_file():
        return "artefact"
    if (folder / EXPORT_FILE).is_file():
        return "export"
    if is_checkpoint(folder):
        return "checkpoint"
    if (folder / CONFIG_FILE).is_file():
        return "run"
    raise UserError(f"{folder} is no run, artefact, checkpoint or export of zofo")


def _read_artifact(info: Info, folder: Path | None = None) -> None:
    folder = folder or info.path
    header = read_header(folder)
    info.method, info.base = header["method"], header["base"]["name"]
    info.base_fingerprint, info.seed = header["base_fingerprint"], header["base"]["seed"]
    info.task = (header["task"] or {}).get("name")
    check_files(folder, header)
    _read_adapter(info, folder / ADAPTER_FOLDER)
    _read_history(info, folder)


def _read_history(info: Info, folder: Path) -> None:
    if (folder / TRAJECTORY_FILE).exists():
        trajectory, header = Trajectory.load(folder / TRAJECTORY_FILE)
        info.num_recorded_steps, info.seed = len(trajectory), trajectory.seed
        info.base_fingerprint = info.base_fingerprint or header.get("base_fingerprint")


def _read_adapter(info: Info, folder: Path) -> None:
    path = folder / "adapter_config.json"
    if path.exists():
        info.adapter = str(read_json_object(path).get("peft_type"))


def _read_export(info: Info) -> None:
    record = read_record(info.path)
    info.method, info.base, info.task = record.method, record.base, record.task
    info.step = record.step
    if not record.is_merged:
        _read_adapter(info, info.path / ADAPTER_FOLDER)
    info.note = check_export_files(info.path, record)


def check_export_files(folder: Path, record: Record) -> str | None:
    """Check every file that loading reads.

    Returns:
        What could not be checked, in words, for an export of an older version.

    Raises:
        UserError: if a file is missing, damaged, altered or does not belong to the export, or the
            index names one outside the folder.
    """
    check_model_folder(folder)
    if record.has_digests and not (folder / LIST_FILE).is_file():
        raise UserError(f"{folder} lacks {LIST_FILE}; export again")
    check_digests(folder)
    index = folder / "model.safetensors.index.json"
    names = files_in_index(index) if index.exists() else {"model.safetensors"}
    if not record.is_merged:
        names |= {f"{ADAPTER_FOLDER}/adapter_{n}" for n in ("model.safetensors", "config.json")}
    for name in sorted(names | {"config.json", "tokenizer_config.json"}):
        if not (folder / name).is_file():
            raise UserError(f"{folder} lacks {name}; export again")
        if name.endswith(".safetensors"):
            open_tensors(folder / name)
    return None if record.has_digests else _WITHOUT_DIGESTS


def _read_checkpoint(info: Info) -> None:
    run = info.path.resolve().parent
    if (run / CONFIG_FILE).is_file():
        _read_config(info, run)
    damage = find_damage(info.path)
    if damage is None and info.method is not None:
        damage = find_misfit(info.path, info.method, run_id_of(run))
    if damage is not None:
        raise UserError(damage)
    info.step = read_state(info.path)["global_step"]
    _read_adapter(info, info.path)
    _read_history(info, info.path)


def _read_config(info: Info, run: Path) -> None:
    config = read_config(run / CONFIG_FILE)
    info.method, info.base, info.seed = config.method, config.model.name, config.seed
    info.task = config.task.name
    if (run / BASE_FILE).exists():
        info.base = read_base(run)[0].name


def _read_run(info: Info) -> None:
    _read_config(info, info.path)
    method, run_id = str(info.method), run_id_of(info.path)
    info.checkpoints = {
        step: (find_damage(path) or find_misfit(path, method, run_id)) is None
        for step, path in checkpoints(info.path).items()
    }
    if (info.path / RESULT_FILE).exists():
        result = read_json_object(info.path / RESULT_FILE)
        scores, rewards = result.get("test"), result.get("rewards")
        with refusing(f"{info.path / RESULT_FILE} is damaged", "copy it again"):
            _SCORES.validate_python(scores or {})
            _REWARDS.validate_python(rewards or {})
        info.scores, info.rewards = scores, rewards
    if not (info.path / ARTIFACT_FOLDER / HEADER_FILE).is_file():
        more = any(info.checkpoints.values())
        remedy = f"continue it with 'zofo train --resume {info.path}'" if more else "start it again"
        raise UserError(f"the run has not ended; {remedy}")
    mixed = mixed_up(info.path)
    if mixed is not None:
        raise UserError(mixed)
    _read_artifact(info, info.path / ARTIFACT_FOLDER)
