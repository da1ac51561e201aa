"""What one ships: the adapter and the base's trajectory, bound to the base they belong to.

    zofo.json                       how to load: base, head, method, task; the base's fingerprint
    adapter/                        peft's files (methods with an adapter)
    base_trajectory.safetensors     how the base moved (hybrid, zo-ft)
    model/                          the whole model (fo-ft, whose history is not a few scalars)

The adapter lies in a folder of its own: `PeftModel.from_pretrained` on the artefact fails, instead
of silently joining the adapter to a base that it was not trained with.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from torch import nn

from zofo.errors import UserError
from zofo.files import write_json
from zofo.methods import METHODS, split_parameters
from zofo.trajectory import TRAJECTORY_FILE, Trajectory, check_base

FORMAT_VERSION: Final = 1
HEADER_FILE: Final = "zofo.json"
ADAPTER_FOLDER: Final = "adapter"
MODEL_FOLDER: Final = "model"


@dataclass(frozen=True)
class BaseModel:
    """The base that an artefact belongs to.

    Attributes:
        name: hub id, folder or alias.
        head: "causal-lm" or "classification".
        dtype: of the weights.
        num_labels: classes of a classification head.
        seed: of a fresh head's initial weights.
        revision: of a hub id.
        trust_remote_code: whether it needs code of its own.
        attn_implementation: as in transformers.
    """

    name: str
    head: str = "causal-lm"
    dtype: str = "float32"
    num_labels: int = 2
    seed: int = 0
    revision: str | None = None
    trust_remote_code: bool = False
    attn_implementation: str | None = None

    def load(self) -> tuple[nn.Module, Any]:
        """The base as it was before training, and its tokenizer."""
        from zofo.models import load_model

        return load_model(**vars(self))


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
    base: BaseModel
    method: str
    task: dict[str, Any] | None
    labels: tuple[str, ...]


def save_artifact(
    folder: str | Path,
    model: Any,
    *,
    base: BaseModel,
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
        base_fingerprint: of the base before training.
        tokenizer: saved with a whole model.
        task: the task's options.
        labels: names of the classes.

    Raises:
        UserError: if the folder cannot be written.
    """
    folder = Path(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if METHODS[method].needs_adapter:
            for config in model.peft_config.values():
                config.base_model_name_or_path = base.name
            # No adapter of ours changes the vocabulary; looking it up would ask the hub.
            model.save_pretrained(folder / ADAPTER_FOLDER, save_embedding_layers=False)
        elif METHODS[method].base == "first":
            model.save_pretrained(folder / MODEL_FOLDER)
            if tokenizer is not None:
                tokenizer.save_pretrained(folder / MODEL_FOLDER)
    except OSError as error:
        raise UserError(f"cannot write {folder}: {error.strerror or error}") from error
    if trajectory is not None:
        trajectory.save(folder / TRAJECTORY_FILE, base_fingerprint=base_fingerprint)
    from zofo import __version__

    write_json(
        folder / HEADER_FILE,
        {
            "format": FORMAT_VERSION,
            "zofo_version": __version__,
            "method": method,
            "base": vars(base),
            "base_fingerprint": base_fingerprint,
            "task": task,
            "labels": list(labels),
        },
    )
    return folder


def load(folder: str | Path, *, device: str = "cpu") -> Artifact:
    """Load what `save_artifact` or `zofo train` wrote.

    Args:
        folder: an artefact, or a run folder that holds one.
        device: where the model goes.

    Raises:
        UserError: if it is no artefact, is damaged, or its base cannot be found or is another.
    """
    folder = find_artifact(folder)
    header = read_header(folder)
    base = BaseModel(**header["base"])
    method = header["method"]
    if METHODS[method].base == "first":
        source = BaseModel(**{**vars(base), "name": str(folder / MODEL_FOLDER), "revision": None})
        model, tokenizer = source.load()
    else:
        model, tokenizer = base.load()
        model = _assemble(folder, header, model)
    model.to(device)
    model.eval()
    return Artifact(
        model, tokenizer, base, method, header.get("task"), tuple(header.get("labels", ()))
    )


def find_artifact(folder: str | Path) -> Path:
    """The artefact in a folder: itself, or its `artifact/`.

    Raises:
        UserError: if there is none.
    """
    folder = Path(folder).expanduser()
    for candidate in (folder, folder / "artifact"):
        if (candidate / HEADER_FILE).is_file():
            return candidate
    if not folder.exists():
        raise UserError(f"{folder} does not exist; give a run folder or an artefact of zofo")
    raise UserError(
        f"{folder} holds no {HEADER_FILE}, so it is neither a finished run nor an artefact"
    )


def read_header(folder: Path) -> dict[str, Any]:
    """What `zofo.json` says.

    Raises:
        UserError: if it is damaged or of another version.
    """
    path = folder / HEADER_FILE
    try:
        header = json.loads(path.read_text(encoding="utf-8"))
        version, method, _ = header["format"], header["method"], BaseModel(**header["base"])
    except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError) as error:
        raise UserError(f"{path} is damaged ({error!r}); copy the artefact again") from error
    if version != FORMAT_VERSION or method not in METHODS:
        raise UserError(
            f"{path} has format {version} and method {method!r}; this zofo reads format "
            f"{FORMAT_VERSION}: install the zofo that wrote it"
        )
    return dict(header)


def _assemble(folder: Path, header: dict[str, Any], model: Any) -> nn.Module:
    """Adapter attached, base moved to where training left it."""
    if METHODS[header["method"]].needs_adapter:
        import peft

        from zofo.models import quiet

        try:
            with quiet():
                model = peft.PeftModel.from_pretrained(model, str(folder / ADAPTER_FOLDER))
        except (OSError, ValueError, KeyError, RuntimeError) as error:
            raise UserError(
                f"the adapter in {folder} cannot be attached to {header['base']['name']}: {error}"
            ) from error
    blocks = split_parameters(model)
    expected = header.get("base_fingerprint")
    if expected is not None:
        check_base(blocks.base, expected, f"{folder}, of {header['base']['name']},")
    if METHODS[header["method"]].base == "zeroth":
        trajectory, _ = Trajectory.load(folder / TRAJECTORY_FILE)
        trajectory.replay(blocks.base)
    return model
