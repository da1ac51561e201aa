"""Adapters on disk, in peft's layout: save, attach to a base, load into a model.

    FOLDER/adapter_config.json, adapter_model.safetensors     the adapter called default
    FOLDER/NAME/...                                           an adapter of another name

If an adapter changes the embeddings, then peft also writes them, as they are after training.
Loading ignores them: the base belongs to the trajectory, which turns the original into them.
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from torch import nn

from zofo.console import quiet
from zofo.disk.files import (
    file_digest,
    open_tensors,
    read_json_object,
    read_tensors,
    refusing,
    write_json,
    write_tensors,
)
from zofo.errors import UserError
from zofo.models.limits import check_adapter_values, limited_memory
from zofo.optim.blocks import is_peft, split_parameters
from zofo.optim.trajectory import TRAJECTORY_FILE, Trajectory
from zofo.perturb.shards import reshard, sharded_as

ACTIVE_KEY: Final = "active_adapters"
"""Key in the metadata of a trajectory: the names of the adapters that were trained."""
CONFIG_FILE: Final = "adapter_config.json"
PROMPT_FILE: Final = "prompt_encoder.safetensors"
_WEIGHTS_FILE: Final = "adapter_model.safetensors"
_DEFAULT: Final = "default"


def adapter_folder(folder: Path, name: str) -> Path:
    """The folder in which peft saves the adapter of that name."""
    return folder if name == _DEFAULT else folder / name


def names_in(folder: Path) -> list[str]:
    """The names of the adapters that were saved in a folder; default comes first."""
    others = sorted(path.parent.name for path in folder.glob(f"*/{CONFIG_FILE}"))
    return [_DEFAULT, *others] if (folder / CONFIG_FILE).is_file() else others


def attach_adapter(model: nn.Module, folder: Path, header: Mapping[str, Any] | None = None) -> Any:
    """Attach the adapters in a folder to a model, as a `PeftModel`.

    Args:
        model: the base.
        folder: the folder that the adapters were saved in.
        header: metadata of the trajectory in the same folder, which says which adapters are active.
            None: all of them.

    Raises:
        UserError: if the files are damaged, lack tensors, or do not fit the model.
    """
    from peft import PeftModel

    names = names_in(folder)
    active = _active_in(folder, names, header)
    problem = f"the adapter in {folder} cannot be attached to this model"
    with refusing(problem, "copy it again, and load the base that it was trained on"):
        if not names:
            raise FileNotFoundError(f"{CONFIG_FILE} is missing")
        # The active ones go first, because peft makes the first one active.
        ordered = [*active, *(name for name in names if name not in active)]
        for name in ordered:
            check_adapter_values(
                read_json_object(adapter_folder(folder, name) / CONFIG_FILE), model
            )
        limited = limited_memory(model, f"the adapter in {folder}")
        with quiet(), limited, _keeping_embeddings(model, folder, names):
            # peft only warns of missing tensors and would keep initial values in their place.
            warnings.filterwarnings("error", message=".*missing adapter keys")
            first = str(adapter_folder(folder, ordered[0]))
            adapted: Any = PeftModel.from_pretrained(model, first, adapter_name=ordered[0])
            for name in ordered[1:]:
                adapted.load_adapter(str(adapter_folder(folder, name)), adapter_name=name)
            if len(active) > 1:
                adapted.base_model.set_adapter(list(active))
    return adapted


def _active_in(
    folder: Path, names: Sequence[str], header: Mapping[str, Any] | None
) -> Sequence[str]:
    """The adapters that were trained, in the order in which the model adds them."""
    recorded = None if header is None else header.get(ACTIVE_KEY)
    if recorded is None:
        if header is None or len(names) < 2 or _DEFAULT not in names:
            return names
        warnings.warn(
            f"{folder} holds the adapters {', '.join(names)}, and the version of zofo that wrote "
            "it did not record which of them it had trained; default is used",
            stacklevel=4,
        )
        return [_DEFAULT]
    if not isinstance(recorded, list) or not recorded or not all(n in names for n in recorded):
        raise UserError(
            f"{folder} was trained with the adapters {recorded!r} and holds "
            f"{', '.join(names) or 'none'}; copy it again"
        )
    return recorded


@contextlib.contextmanager
def _keeping_embeddings(model: Any, folder: Path, names: Collection[str]) -> Iterator[None]:
    """Put the embeddings of the base back if the files of an adapter hold copies of them."""
    layers: list[Any] = []
    for get in ("get_input_embeddings", "get_output_embeddings"):
        with contextlib.suppress(AttributeError, NotImplementedError):
            layers.append(getattr(model, get)())
    weights: set[Any] = {layer.weight for layer in layers if layer is not None}
    ends = tuple(
        f"{name}.{inserted}weight"
        for name, module in model.named_modules()
        for inserted in ("", "base_layer.")
        if getattr(module, "weight", None) in weights
    )
    files = [adapter_folder(folder, name) / _WEIGHTS_FILE for name in names]
    stored = [key for file in files if file.is_file() for key in open_tensors(file)[0]]
    copied = any(key.endswith(ends) for key in stored) if ends else False
    kept = [(weight, weight.detach().clone()) for weight in weights] if copied else []
    yield
    for weight, value in kept:
        weight.data.copy_(value)


def save_prompt_encoder(model: Any, folder: Path) -> None:
    """Write the parameters of a prompt encoder; other adapters have none.

    peft saves only the output of the encoder. To continue training, the encoder needs its own
    parameters.
    """
    if is_peft(model) and hasattr(model, "prompt_encoder"):
        write_tensors(folder / PROMPT_FILE, _prompt_parameters(model), {})


def _prompt_parameters(model: Any) -> dict[str, nn.Parameter]:
    """The adapter and what peft freezes in its prompt encoder, such as CARTRIDGE's first tokens."""
    encoder = model.prompt_encoder[model.active_adapter]
    inside = {id(parameter) for parameter in encoder.parameters()}
    frozen = {name: p for name, p in model.named_parameters() if id(p) in inside}
    return {**frozen, **split_parameters(model).adapter}


def load_adapter(model: Any, folder: Path) -> None:
    """Load every adapter of a model into its parameters in place, of shards each process its own.

    Raises:
        UserError: if a file is missing or damaged, does not belong to the trajectory beside it, or
            does not fit the model, or if other adapters were trained than are active now.
    """
    reshard(model)
    active = list(model.active_adapters)
    saved = names_in(folder)
    if (folder / TRAJECTORY_FILE).exists():
        header = Trajectory.load(folder / TRAJECTORY_FILE)[1]
        trained = header.get(ACTIVE_KEY, active)
        if trained != active:
            raise UserError(
                f"{folder} was trained with the active adapters {', '.join(map(str, trained))}, "
                f"and this model has {', '.join(active)}; activate the same ones in the same order"
            )
        for name in saved:
            check_adapter(folder, header, name)
    if (folder / PROMPT_FILE).exists():
        stored, _ = read_tensors(folder / PROMPT_FILE)
        with refusing(f"{folder / PROMPT_FILE} does not fit this model"):
            for key, parameter in _prompt_parameters(model).items():
                parameter.data.copy_(sharded_as(stored[key], parameter))
        return
    for name in model.peft_config:
        if name in active or name in saved:
            with refusing(f"the adapter {name!r} in {folder} cannot be loaded into this model"):
                _load_weights(model, adapter_folder(folder, name), name)


def _load_weights(model: Any, folder: Path, name: str) -> None:
    """Load the weights of one adapter, without the copies of base weights that peft saves."""
    from peft import get_peft_model_state_dict, load_peft_weights, set_peft_model_state_dict

    weights = load_peft_weights(str(folder), device="cpu")
    own = get_peft_model_state_dict(model, adapter_name=name, save_embedding_layers=False)
    if missing := sorted(own.keys() - weights.keys()):
        raise ValueError(f"it lacks {len(missing)} tensors, such as {missing[0]}")
    base = {id(parameter) for parameter in split_parameters(model).base.values()}
    of_base = {n for n, p in model.named_parameters(remove_duplicate=False) if id(p) in base}
    if strange := sorted(weights.keys() - own.keys() - of_base):
        raise ValueError(f"it holds {len(strange)} tensors more, such as {strange[0]}")
    values = {key: sharded_as(weights[key], own[key]) for key in own}
    with quiet():
        set_peft_model_state_dict(model, values, adapter_name=name)


def sort_sets(model: Any, folder: Path) -> None:
    """Sort the lists in the saved adapter_config.json that stand for sets, such as target_modules.

    The order of a set changes from process to process, and with it the digest of the file.
    """
    for name, config in model.peft_config.items():
        path = adapter_folder(folder, name) / CONFIG_FILE
        sets = [key for key, value in vars(config).items() if isinstance(value, set)]
        if sets and path.is_file():
            saved = read_json_object(path)
            write_json(path, saved | {key: sorted(saved[key], key=str) for key in sets})


def adapter_digests(folder: Path, name: str) -> dict[str, str]:
    """File -> digest, for each file that loading the adapter reads."""
    adapter = adapter_folder(folder, name)
    paths = [adapter / file for file in (CONFIG_FILE, _WEIGHTS_FILE)]
    return {
        path.relative_to(folder).as_posix(): file_digest(path)
        for path in (*paths, folder / PROMPT_FILE)
        if path.is_file()
    }


def check_adapter(folder: Path, header: Mapping[str, Any], name: str = _DEFAULT) -> None:
    """Refuse an adapter that is damaged or was not saved with the trajectory beside it."""
    recorded = header.get("files")
    for file, digest in adapter_digests(folder, name).items():
        if not isinstance(recorded, dict) or recorded.get(file) != digest:
            raise UserError(
                f"{folder / file} is damaged or of another run than {TRAJECTORY_FILE} beside it; "
                "copy the checkpoint again"
            )
