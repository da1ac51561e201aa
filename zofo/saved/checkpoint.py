"""A checkpoint of an adapter and of the base's history, in one folder.

    adapter_model.safetensors       written by peft
    prompt_encoder.safetensors      the parameters of the encoder, with prompt learning only
    base_trajectory.safetensors     all updates of the base since the original
    base_buffers.safetensors        buffers that training has changed, in models that have any

`PeftModel.from_pretrained` would combine the adapter with a base that it was not trained with. A
mark in adapter_config.json makes peft warn; `load_checkpoint` restores both parts.
"""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any, Final

from torch import nn

from zofo.disk.files import read_json_object, write_json
from zofo.errors import UserError
from zofo.models.saved_adapters import (
    ACTIVE_KEY,
    adapter_digests,
    adapter_folder,
    save_prompt_encoder,
    sort_sets,
)
from zofo.optim.blocks import is_peft, split_parameters
from zofo.optim.moved import saving_adapter
from zofo.optim.optimizer import HybridOptimizer
from zofo.optim.trajectory import TRAJECTORY_FILE
from zofo.perturb.shards import gathered
from zofo.saved.assemble import Assembly, Parts
from zofo.saved.buffers import save_buffers

MARK: Final = "zofo_load_with"
"""Key in adapter_config.json. Peft does not know it and warns."""


def save_checkpoint(folder: str | Path, model: Any, optimizer: HybridOptimizer) -> Path:
    """Save a model that a loop of your own trains; `load_checkpoint` loads it.

    If FSDP2 shards the model, all processes call this, and the first one writes. No process gathers
    the base.

    Args:
        folder: the folder; it is created if it does not exist.
        model: the `PeftModel`.
        optimizer: its optimizer, which holds the updates of the base.

    Returns:
        The folder.

    Raises:
        UserError: if the model has no adapter, or the folder cannot be written.
    """
    folder = Path(folder)
    if not is_peft(model):
        raise UserError(
            f"{type(model).__name__} has no adapter of peft, so model.save_pretrained(folder) "
            "holds all of its weights; call that"
        )
    optimizer.original_fingerprint()
    with gathered(model, split_parameters(model).adapter.values()) as is_writer:
        if is_writer:
            _write(folder, model, optimizer)
    return folder


def _write(folder: Path, model: Any, optimizer: HybridOptimizer) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with saving_adapter(model), warnings.catch_warnings():
            # The copy of the embeddings that peft then writes is not read: the base has a record.
            warnings.filterwarnings("ignore", message="Setting `save_embedding_layers`")
            model.save_pretrained(folder)
    except OSError as error:
        raise UserError(f"cannot write {folder}: {error.strerror or error}") from error
    sort_sets(model, folder)
    save_prompt_encoder(model, folder)
    save_history(folder, model, optimizer)


def save_history(folder: Path, model: Any, optimizer: HybridOptimizer) -> None:
    """Mark the saved adapter as incomplete, and write what belongs to it beside it."""
    digests = save_buffers(folder, optimizer.buffers.moved() if is_peft(model) else {})
    for name in getattr(model, "peft_config", {}):
        path = adapter_folder(folder, name) / "adapter_config.json"
        if not path.exists():
            continue
        config = read_json_object(path)
        write_json(path, {**config, MARK: "zofo.load_checkpoint(base, folder)"})
        digests |= adapter_digests(folder, name)
    active = {ACTIVE_KEY: list(model.active_adapters)} if is_peft(model) else {}
    base_fingerprint = optimizer.original_fingerprint()
    optimizer.trajectory.save(
        folder / TRAJECTORY_FILE, base_fingerprint=base_fingerprint, files=digests, **active
    )


def load_checkpoint(base: nn.Module, folder: str | Path) -> nn.Module:
    """Load a checkpoint, or a folder that `HybridTrainer.save_model` or `save_checkpoint` wrote.

    Args:
        base: the model that training began with; it is changed in place. Either it has no adapter,
            or it is the `PeftModel` as it was when training began, perhaps sharded by FSDP2: then
            all processes call this, and each changes its own rows.
        folder: the folder that holds the adapter and the trajectory.

    Returns:
        The trained `PeftModel`, in evaluation mode.

    Raises:
        UserError: if the trajectory is missing, belongs to another base or adapter, or a file is
            damaged.
    """
    folder = Path(folder)
    parts = Parts(folder=folder, adapter=folder, trajectory=folder / TRAJECTORY_FILE)
    model: nn.Module = Assembly(parts, base).run().model
    return model
