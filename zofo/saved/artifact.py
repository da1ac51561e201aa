"""The artefact: a folder that holds a trained model and is small enough to share.

    zofo.json                       base, method, task, fingerprint of the base, digests of files
    rows.safetensors                digests of the rows that it was trained, selected and tested on
    adapter/                        files of peft (methods with an adapter)
    base_trajectory.safetensors     updates of the base, one scalar a direction (hybrid, zo-ft)
    model/                          the whole model (fo-ft, which has no such scalars)

The adapter lies in a subfolder so that `PeftModel.from_pretrained` on the artefact fails. Otherwise
peft would attach the adapter to the original base, with which it was not trained.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from zofo.disk.files import fingerprint, reason_of_failed_write
from zofo.disk.folders import share_files
from zofo.errors import UserError
from zofo.models.saved_adapters import adapter_folder, sort_sets
from zofo.optim.blocks import split_parameters
from zofo.optim.methods import METHODS
from zofo.optim.moved import saving_adapter
from zofo.optim.trajectory import TRAJECTORY_FILE, Trajectory
from zofo.perturb.shards import Whole, gathered, is_sharded
from zofo.saved import hub
from zofo.saved.buffers import save_buffers
from zofo.saved.manifest import (
    ADAPTER_FOLDER,
    CARD_FILE,
    HEADER_FILE,
    MODEL_FOLDER,
    BaseSpec,
    find_artifact,
    read_header,
    write_header,
)
from zofo.saved.source import open_source
from zofo.tasks.digests import ROWS_FILE, RowDigests

__all__ = [
    "HEADER_FILE",
    "Artifact",
    "BaseSpec",
    "find_artifact",
    "load",
    "read_header",
    "save_artifact",
]


@dataclass(frozen=True)
class Artifact:
    """A trained model in evaluation mode, with its tokenizer."""

    model: nn.Module
    tokenizer: Any
    base: BaseSpec  # the base that training began with
    method: str  # name of the method that trained the model
    task: dict[str, Any] | None  # its options; None if the model learned a task outside zofo
    labels: tuple[str, ...]  # names of the classes
    rows: RowDigests | None = None  # its rows; None if it was saved without them


def save_artifact(
    folder: str | Path,
    model: Any,
    *,
    base: BaseSpec,
    method: str,
    trajectory: Trajectory | None = None,
    base_fingerprint: str | None = None,
    tokenizer: Any = None,
    task: dict[str, Any] | None = None,
    labels: tuple[str, ...] = (),
    rows: RowDigests | None = None,
    buffers: Mapping[str, Tensor] | None = None,
) -> Path:
    """Write an artefact.

    If FSDP2 shards the model, all processes call this, and the first one writes. No process gathers
    the base.

    Args:
        folder: the folder of the artefact; it is created if it does not exist.
        model: the trained model.
        base: the base that training began with.
        method: name of the method.
        trajectory: the updates of the base. Methods that train the base by zeroth order need it.
        base_fingerprint: fingerprint of the base before training. The same methods need it.
        tokenizer: the tokenizer, which is saved if the whole model is saved.
        task: options of the task.
        labels: names of the classes.
        rows: digests of the task's rows, by which they are found again in changed data.
        buffers: buffers that training has changed (`moved_buffers` of a trainer), for methods
            whose artefact does not hold the whole model.

    Raises:
        UserError: if the folder cannot be written, or an argument that the method needs is missing.
    """
    folder, orders = Path(folder), METHODS[method]
    if orders.base == "zeroth" and trajectory is None:
        raise UserError(f"method {method} moves the base; give its trajectory")
    if base_fingerprint is None and orders.base == "zeroth":
        raise UserError("give base_fingerprint, of the base before training; a trainer has it")
    if base_fingerprint is None and orders.base == "frozen":  # Training left the base unchanged.
        base_fingerprint = fingerprint(Whole(split_parameters(model).base))
    if orders.needs_adapter:
        _active_adapter(model)  # The check comes before the folder.
    blocks = split_parameters(model)
    if orders.base == "first" and any(map(is_sharded, blocks.base.values())):
        raise UserError(
            f"an artefact of method {method} holds the whole base, which is sharded here; save it "
            "with torch.distributed.checkpoint, and make the artefact of the model it loads"
        )
    values: dict[str, Any] = {"method": method, "base": vars(base)}
    values |= {"base_fingerprint": base_fingerprint, "task": task, "labels": list(labels)}
    with gathered(model, blocks.adapter.values()) as is_writer:
        if is_writer:
            _write(folder, model, values, trajectory, tokenizer, rows, buffers)
    return folder


def _write(
    folder: Path,
    model: Any,
    values: dict[str, Any],
    trajectory: Trajectory | None,
    tokenizer: Any,
    rows: RowDigests | None,
    buffers: Mapping[str, Tensor] | None,
) -> None:
    """Write the files of an artefact; `values` are those of its header."""
    orders = METHODS[values["method"]]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if orders.needs_adapter:
            save_adapter(model, folder / ADAPTER_FOLDER, base_name=values["base"]["name"])
        elif orders.base == "first":
            model.save_pretrained(folder / MODEL_FOLDER)
            if tokenizer is not None:
                tokenizer.save_pretrained(folder / MODEL_FOLDER)
        for part in (ADAPTER_FOLDER, MODEL_FOLDER):
            if (folder / part).is_dir():
                share_files(folder / part)
    except Exception as error:
        reason = reason_of_failed_write(error)
        if reason is None:
            raise
        raise UserError(
            f"cannot write {folder}: {reason}; free space, or make the folder writable"
        ) from error
    if trajectory is not None:
        trajectory.save(folder / TRAJECTORY_FILE, base_fingerprint=values["base_fingerprint"])
    if rows is None:
        (folder / ROWS_FILE).unlink(missing_ok=True)  # of an earlier artefact
    else:
        rows.save(folder)
    if orders.base != "first":
        save_buffers(folder, buffers or {})
    # The header goes last, because it records the digests of the other files.
    write_header(folder, values)


def save_adapter(model: Any, folder: Path, *, base_name: str) -> None:
    """Write the active adapter of a `PeftModel`, with `base_name` as the base it belongs to."""
    name = _active_adapter(model)
    for config in model.peft_config.values():
        config.base_model_name_or_path = base_name
    # zofo's adapters leave the vocabulary as it is. Without this option, peft would ask the hub.
    with saving_adapter(model):
        model.save_pretrained(folder, save_embedding_layers=False, selected_adapters=[name])
    sort_sets(model, folder)
    own = adapter_folder(folder, name)
    if own != folder:  # Only an adapter called default has no folder of its own.
        for path in own.iterdir():
            path.replace(folder / path.name)
        own.rmdir()
    # The card of peft shows how to attach the adapter to the original base, which would be wrong.
    (folder / CARD_FILE).unlink(missing_ok=True)


def _active_adapter(model: Any) -> str:
    """The name of the adapter that is saved."""
    name, *others = model.active_adapters
    if others:
        raise UserError(
            f"an artefact holds one adapter, and the model has {', '.join(model.active_adapters)} "
            "active; use the trainer's checkpoint, which zofo.load_checkpoint reads, or join them "
            "with peft's add_weighted_adapter"
        )
    return str(name)


def load(
    folder: str | Path,
    *,
    device: str = "cpu",
    trust_remote_code: bool = False,
    revision: str | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Artifact:
    """Load an artefact that `save_artifact` or `zofo train` wrote.

    Args:
        folder: an artefact, a run folder that holds one, or the hub id of an artefact.
        device: device of the loaded model.
        trust_remote_code: whether to run code from the base's repository, if the base needs it. The
            artefact cannot grant this permission.
        revision: branch, tag or commit of the hub id.
        progress: called during the replay with the number of weights done and the total number.

    Raises:
        UserError: if there is no artefact, a file is damaged, or the base cannot be loaded or
            differs from the one that training began with.
    """
    name = str(folder)
    if not Path(name).expanduser().exists() and hub.looks_like_hub_id(name):
        folder = hub.download(name, revision=revision)
    find_artifact(folder)  # A checkpoint, which `open_source` takes too, is refused.
    source = open_source(folder, trust_remote_code=trust_remote_code)
    model, tokenizer = source.load(progress, device=device)
    model.to(device)
    return Artifact(
        model,
        tokenizer,
        source.base,
        source.method,
        source.task,
        source.labels,
        RowDigests.load(source.folder),
    )
