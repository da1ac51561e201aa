"""What one ships: the adapter and the base's trajectory, bound to the base they belong to.

    zofo.json                       how to load: base, head, method, task; the base's fingerprint
    adapter/                        peft's files (methods with an adapter)
    base_trajectory.safetensors     how the base moved (hybrid, zo-ft)
    model/                          the whole model (fo-ft, whose history is not a few scalars)

The adapter lies in a folder of its own: `PeftModel.from_pretrained` on the artefact fails, instead
of silently joining the adapter to a base that it was not trained with.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from zofo.disk.files import fingerprint
from zofo.errors import UserError
from zofo.optim.blocks import split_parameters
from zofo.optim.methods import METHODS
from zofo.optim.trajectory import TRAJECTORY_FILE, Trajectory
from zofo.saved import hub
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
    """A trained model, ready to use.

    Attributes:
        model: in evaluation mode.
        tokenizer: its tokenizer.
        base: where it came from.
        method: how it was trained.
        task: the task's options (plain values), None if it was trained on none of zofo's.
        labels: names of the classes.
    """

    model: nn.Module
    tokenizer: Any
    base: BaseSpec
    method: str
    task: dict[str, Any] | None
    labels: tuple[str, ...]


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
) -> Path:
    """Write an artefact.

    Args:
        folder: where to; made if it does not exist.
        model: the trained model.
        base: the base it was trained from.
        method: the method.
        trajectory: of the base, for methods that move it by zeroth order.
        base_fingerprint: of the base before training; needed where the base moved by zeroth order.
        tokenizer: saved with a whole model.
        task: the task's options.
        labels: names of the classes.

    Raises:
        UserError: if the folder cannot be written, or what the method needs is not given.
    """
    folder, orders = Path(folder), METHODS[method]
    if orders.base == "zeroth" and trajectory is None:
        raise UserError(f"method {method} moves the base; give its trajectory")
    if base_fingerprint is None and orders.base == "zeroth":
        raise UserError("give base_fingerprint, of the base before training; a trainer has it")
    if base_fingerprint is None and orders.base == "frozen":
        base_fingerprint = fingerprint(split_parameters(model).base)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if orders.needs_adapter:
            for config in model.peft_config.values():
                config.base_model_name_or_path = base.name
            # No adapter of ours changes the vocabulary; looking it up would ask the hub.
            model.save_pretrained(folder / ADAPTER_FOLDER, save_embedding_layers=False)
            # peft's card shows how to join the adapter to a base it was not trained with.
            (folder / ADAPTER_FOLDER / CARD_FILE).unlink(missing_ok=True)
        elif orders.base == "first":
            model.save_pretrained(folder / MODEL_FOLDER)
            if tokenizer is not None:
                tokenizer.save_pretrained(folder / MODEL_FOLDER)
    except OSError as error:
        raise UserError(f"cannot write {folder}: {error.strerror or error}") from error
    if trajectory is not None:
        trajectory.save(folder / TRAJECTORY_FILE, base_fingerprint=base_fingerprint)
    values = {
        "method": method,
        "base": vars(base),
        "base_fingerprint": base_fingerprint,
        "task": task,
        "labels": list(labels),
    }
    write_header(folder, values)
    return folder


def load(
    folder: str | Path,
    *,
    device: str = "cpu",
    trust_remote_code: bool = False,
    revision: str | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Artifact:
    """Load what `save_artifact` or `zofo train` wrote.

    Args:
        folder: an artefact, a run folder that holds one, or an artefact's hub id.
        device: where the model goes.
        trust_remote_code: run code that the base's repository brings, if the base needs that. What
            the artefact says of it is not enough.
        revision: of the hub id: branch, tag or commit.
        progress: called during the replay with the numbers of weights done and to be done.

    Raises:
        UserError: if it is no artefact, is damaged, or its base cannot be found or is another.
    """
    name = str(folder)
    if not Path(name).expanduser().exists() and hub.looks_like_hub_id(name):
        folder = hub.download(name, revision=revision)
    source = open_source(find_artifact(folder), trust_remote_code=trust_remote_code)
    model, tokenizer = source.load(progress)
    model.to(device)
    return Artifact(model, tokenizer, source.base, source.method, source.task, source.labels)
