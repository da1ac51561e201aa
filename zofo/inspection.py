"""What lies in a folder of zofo's, whether it is whole, and whether it does what it says.

`inspect` reads files only; `verify` loads the base and does everything that loading does, one
check after the other; `replay_base` goes back in time along the recorded steps.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from zofo.artifact import HEADER_FILE, find_artifact, read_header
from zofo.checkpoint_files import checkpoints, find_damage
from zofo.config import load_config
from zofo.errors import UserError
from zofo.export import Content, check_target, load_plain, write_folder
from zofo.export_card import EXPORT_FILE, Exported
from zofo.export_check import Samples, logits_of, sample_inputs
from zofo.files import read_json, refusing
from zofo.manifest import ADAPTER_FOLDER, check_files
from zofo.methods import split_parameters
from zofo.opening import (
    STATE_FILE,
    Source,
    attach,
    drop_weights,
    is_checkpoint,
    open_source,
    plain_base,
)
from zofo.resume import CONFIG_FILE, RESULT_FILE
from zofo.trajectory import TRAJECTORY_FILE, Trajectory, check_base


@dataclass
class Info:
    """What a folder is; None where a kind of folder does not say.

    Attributes:
        path: the folder.
        kind: "run", "artefact", "checkpoint" or "export".
        is_whole: whether nothing is missing or damaged; a run is whole when it has ended.
        problem: what is missing or damaged.
        method: how it was trained.
        base: name of the base.
        base_fingerprint: of the base before training.
        adapter: type of peft's adapter.
        task: name of the task.
        seed: of the run.
        step: of a checkpoint, or of a base that went back in time.
        num_recorded_steps: updates of the base that can be replayed.
        checkpoints: of a run: step -> whether it is whole.
        size_bytes: of all files.
        scores: of the test rows, before and after.
    """

    path: Path
    kind: str
    is_whole: bool = True
    problem: str | None = None
    method: str | None = None
    base: str | None = None
    base_fingerprint: str | None = None
    adapter: str | None = None
    task: str | None = None
    seed: int | None = None
    step: int | None = None
    num_recorded_steps: int | None = None
    checkpoints: dict[int, bool] = field(default_factory=dict)
    size_bytes: int = 0
    scores: dict[str, Any] | None = None

    def as_dict(self) -> dict[str, Any]:
        """Plain values, without what does not apply."""
        values = asdict(self) | {"path": str(self.path)}
        return {key: value for key, value in values.items() if value not in (None, {})}

    def miss(self, problem: str) -> None:
        """Note the first thing that is wrong."""
        self.is_whole, self.problem = False, self.problem or problem


@dataclass(frozen=True)
class Check:
    """One step of `verify`.

    Attributes:
        name: what was looked at.
        is_sound: None if an earlier failure kept it from being tried.
        detail: what was found.
    """

    name: str
    is_sound: bool | None
    detail: str


def inspect(path: str | Path) -> Info:
    """Say what a folder is, from its files alone.

    Raises:
        UserError: if it is no run, artefact, checkpoint or export.
    """
    folder = Path(path).expanduser()
    readers: dict[str, Callable[[Info], None]] = {
        "artefact": _read_artifact,
        "export": _read_export,
        "checkpoint": _read_checkpoint,
        "run": _read_run,
    }
    info = Info(folder, _kind(folder))
    info.size_bytes = sum(f.stat().st_size for f in folder.rglob("*") if f.is_file())
    try:
        readers[info.kind](info)
    except UserError as error:
        info.miss(str(error))
    return info


def replay_base(
    path: str | Path,
    to: str | Path,
    step: int,
    *,
    dtype: str | None = None,
    max_shard_size: str = "5GB",
    trust_remote_code: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> Exported:
    """Write the base as it was after some updates, as a plain Hugging Face folder.

    The adapter's history is not recorded, so there is none in the folder.

    Args:
        path: a run, artefact or checkpoint whose method moves the base by zeroth order.
        to: where to; must not exist, or be empty.
        step: number of updates, from 0 (the original base) to all that are recorded.
        dtype: of the weights; None: the base's.
        max_shard_size: largest safetensors file.
        trust_remote_code: run code that the base's repository brings, if the base needs that.
        progress: called with the numbers of weights done and to be done.

    Raises:
        UserError: for a step that is not recorded, and as `zofo.export_model`.
    """
    to = check_target(to, dtype, max_shard_size)
    source = open_source(path, trust_remote_code=trust_remote_code)
    history = source.history()
    if not 0 <= step <= len(history):
        raise UserError(
            f"step is {step}; {path} has {len(history)} recorded updates of the base, so give a "
            f"number from 0 to {len(history)}"
        )
    start, tokenizer = source.load_start()
    drop_weights(start)  # base and adapter fit; the base alone is what is written
    model = plain_base(source, stop=step, progress=progress)
    samples = sample_inputs(source, model, tokenizer)
    content = Content(model, None, source, tokenizer, samples, logits_of(model, samples), step=step)
    return write_folder(content, to, dtype=dtype, max_shard_size=max_shard_size)


def verify(path: str | Path, *, trust_remote_code: bool = False) -> Iterator[Check]:
    """Do what loading does, check by check, and stop trying at the first that fails.

    Args:
        path: a run, artefact, checkpoint or export.
        trust_remote_code: run code that the base's repository brings, if the base needs that.

    Raises:
        UserError: if it is none of these.
    """
    folder = Path(path).expanduser()
    steps = (
        _export_steps(folder, trust_remote_code)
        if _kind(folder) == "export"
        else _source_steps(folder, trust_remote_code)
    )
    has_failed = False
    for name, step in steps:
        if has_failed:
            yield Check(name, None, "not tried")
            continue
        try:
            with refusing(name, "this is a fault of zofo's or of the files; copy them again"):
                detail = step()
        except UserError as error:
            has_failed = True
            yield Check(name, False, str(error))
        else:
            if detail is not None:
                yield Check(name, True, detail)


def _kind(folder: Path) -> str:
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
    if (folder / TRAJECTORY_FILE).is_file():
        trajectory, header = Trajectory.load(folder / TRAJECTORY_FILE)
        info.num_recorded_steps, info.seed = len(trajectory), trajectory.seed
        info.base_fingerprint = info.base_fingerprint or header.get("base_fingerprint")


def _read_adapter(info: Info, folder: Path) -> None:
    path = folder / "adapter_config.json"
    if path.is_file():
        config = read_json(path)
        info.adapter = str(config.get("peft_type")) if isinstance(config, dict) else None


def _read_export(info: Info) -> None:
    record = read_json(info.path / EXPORT_FILE)
    with refusing(f"{info.path / EXPORT_FILE} is damaged"):
        info.method, info.base, info.task = record["method"], record["base"], record["task"]
        info.step, is_merged = record["step"], record["is_merged"]
    if not is_merged:
        _read_adapter(info, info.path / ADAPTER_FOLDER)
    _check_export_files(info.path, is_merged)


def _check_export_files(folder: Path, is_merged: bool) -> None:
    """Every file that the loaders want, its header readable.

    Raises:
        UserError: if one is missing or cut short.
    """
    from safetensors import safe_open

    index = folder / "model.safetensors.index.json"
    names = {"model.safetensors"}
    if index.is_file():
        with refusing(f"{index} is damaged"):
            names = set(read_json(index)["weight_map"].values())
    if not is_merged:
        names |= {"adapter/adapter_model.safetensors", "adapter/adapter_config.json"}
    for name in sorted(names | {"config.json", "tokenizer_config.json"}):
        if not (folder / name).is_file():
            raise UserError(f"{folder} lacks {name}; export again")
        if name.endswith(".safetensors"):
            with (
                refusing(f"{folder / name} is damaged", "export again"),
                safe_open(folder / name, framework="pt"),
            ):
                pass


def _read_checkpoint(info: Info) -> None:
    run = info.path.resolve().parent
    if (run / CONFIG_FILE).is_file():
        _read_config(info, run)
    damage = find_damage(info.path)
    if damage is not None:
        raise UserError(damage)
    info.step = read_json(info.path / STATE_FILE)["global_step"]
    _read_adapter(info, info.path)
    _read_history(info, info.path)


def _read_config(info: Info, run: Path) -> None:
    config = load_config(run / CONFIG_FILE)
    info.method, info.base, info.seed = config.method, config.model.name, config.seed
    info.task = config.task.name


def _read_run(info: Info) -> None:
    _read_config(info, info.path)
    info.checkpoints = {
        step: find_damage(path) is None for step, path in checkpoints(info.path).items()
    }
    if (info.path / RESULT_FILE).is_file():
        with refusing(f"{info.path / RESULT_FILE} is damaged"):
            info.scores = read_json(info.path / RESULT_FILE).get("test")
    if not (info.path / "artifact" / HEADER_FILE).is_file():
        more = any(info.checkpoints.values())
        remedy = f"continue it with 'zofo train --resume {info.path}'" if more else "start it anew"
        raise UserError(f"the run has not ended; {remedy}")
    _read_artifact(info, info.path / "artifact")


def _source_steps(
    folder: Path, trust_remote_code: bool
) -> Iterator[tuple[str, Callable[[], str | None]]]:
    """Name and action of each check of a run, artefact or checkpoint."""
    opened: list[Source] = []
    model: Any = None

    def header() -> str:
        opened.append(open_source(folder, trust_remote_code=trust_remote_code))
        source = opened[0]
        return f"{source.kind} of method {source.method} on {source.base.name}"

    def files() -> str | None:
        if opened[0].kind == "artefact":
            found = find_artifact(folder)
            check_files(found, read_header(found))
        return "every digest holds"  # a checkpoint's were compared when it was opened

    def history() -> str | None:
        if opened[0].trajectory is None:
            return None
        return f"{len(opened[0].history())} updates of the base, digest holds"

    def base() -> str | None:
        nonlocal model
        if opened[0].whole is not None and opened[0].trajectory is None:
            return None
        model = opened[0].base.load()[0]
        return f"{opened[0].base.name} loads"

    def adapter() -> str | None:
        nonlocal model
        if opened[0].adapter is None:
            return None
        model = attach(model, opened[0].adapter)
        return f"{len(split_parameters(model).adapter)} tensors attached"

    def fingerprint() -> str | None:
        expected = opened[0].expected_fingerprint()
        if model is None or expected is None:
            return None
        check_base(split_parameters(model).base, expected, str(folder))
        return f"{expected} is that of the base"

    def replay() -> str | None:
        if opened[0].trajectory is None:
            return None
        opened[0].history().replay(split_parameters(model).base)
        _require_finite(model)
        return "every update applies, weights are finite"

    def whole() -> str:
        nonlocal model
        if model is None or opened[0].whole is not None:
            model = None  # one of them at a time
            model = opened[0].load()[0]
        samples = Samples((tuple(range(8)),), (), "")
        if not all(bool(x.isfinite().all()) for x in logits_of(model.eval(), samples)):
            raise UserError("the model's logits are not finite")
        return "the model runs, logits are finite"

    yield "header", header
    yield "files", files
    yield "history", history
    yield "base", base
    yield "adapter", adapter
    yield "fingerprint", fingerprint
    yield "replay", replay
    yield "model", whole


def _export_steps(
    folder: Path, trust_remote_code: bool
) -> Iterator[tuple[str, Callable[[], str | None]]]:
    """Name and action of each check of an export."""
    record: dict[str, Any] = {}

    def header() -> str:
        record.update(read_json(folder / EXPORT_FILE))
        return f"export of method {record['method']} on {record['base']}"

    def files() -> str:
        _check_export_files(folder, record["is_merged"])
        return "all there, headers readable"

    def whole() -> str:
        model, _ = load_plain(folder, record["head"], trust_remote_code=trust_remote_code)
        if not record["is_merged"]:
            model = attach(model, folder / ADAPTER_FOLDER)
        _require_finite(model)
        return "loads with plain transformers, weights are finite"

    yield "header", header
    yield "files", files
    yield "model", whole


def _require_finite(model: torch.nn.Module) -> None:
    for name, parameter in model.named_parameters():
        if not bool(parameter.isfinite().all()):
            raise UserError(f"the weight {name!r} is not finite")
