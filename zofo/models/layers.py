"""The layers of a model: which of them hold the adapter, and how far a backward pass reaches.

Layers are numbered from 0, in the order of the forward pass. Those of a decoder come after those of
its encoder. A backward pass ends at the lowest layer with a parameter that needs a gradient. With
an adapter in the last k of L layers, it passes k of them, and the activations of the others need
not be kept.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from functools import lru_cache
from typing import TYPE_CHECKING, Any, Final

from zofo.errors import UserError, shown
from zofo.models.adapter_kinds import KINDS

if TYPE_CHECKING:
    from torch import nn

Layers = str | list[int]
ALL: Final = "all"
_FORMS: Final = "all, last 4, first 4 (any number from 1), or a list of layer numbers from 0"


def checked_layers(value: Any) -> Layers:
    """The value, if it has one of the forms.

    Raises:
        ValueError: otherwise.
    """
    is_words = isinstance(value, str) and (value == ALL or _of_words(value) is not None)
    is_list = isinstance(value, list | tuple) and len(value) > 0
    if is_words or (is_list and all(type(number) is int and number >= 0 for number in value)):
        return value if isinstance(value, str) else list(value)
    raise ValueError(f"must be {_FORMS}")


def problem_of_layers(layers: Layers, type: str, *, in_file: bool = False) -> str | None:
    """Why an adapter cannot be restricted to these layers; None if it can.

    Args:
        layers: as in `checked_layers`.
        type: a name in `zofo.models.adapter_kinds.KINDS`.
        in_file: whether a configuration file of peft describes the adapter instead.
    """
    if layers == ALL:
        return None
    given = f"the adapter's layers are {shown(layers)}"
    if in_file:
        return (
            f"{given}, and a configuration file describes the adapter; leave layers out, and "
            "choose them in the file, such as by layers_to_transform"
        )
    if type in KINDS and "layers" not in KINDS[type].options:
        fitting = [name for name, kind in KINDS.items() if "layers" in kind.options]
        return (
            f"{given}, and a {type} reaches every layer; leave layers out, or choose adapter "
            f"{', '.join(fitting[:-1])} or {fitting[-1]}"
        )
    return None


def numbers_of(layers: Layers, num_layers: int, model: str) -> list[int]:
    """The numbers of the chosen layers, ascending.

    Args:
        layers: one of the forms.
        num_layers: number of layers of the model.
        model: its name in messages.

    Raises:
        UserError: for another form, or if the model has fewer layers.
    """
    try:
        layers = checked_layers(layers)
    except ValueError as error:
        raise UserError(f"the adapter's layers are {shown(layers)}; they {error}") from None
    problem = f"the adapter's layers are {shown(layers)}, and {model} has {num_layers} layers"
    if isinstance(layers, list):
        if max(layers) >= num_layers:
            raise UserError(f"{problem}; choose from 0 to {num_layers - 1}")
        return sorted(set(layers))
    end, count = _of_words(layers) or ("first", num_layers)
    if count > num_layers:
        raise UserError(f"{problem}; choose at most {num_layers}, or all")
    return list(range(num_layers))[-count:] if end == "last" else list(range(count))


def _of_words(layers: str) -> tuple[str, int] | None:
    """The end and the number in "last 4" or "first 4"."""
    found = re.fullmatch(r"(first|last) +0*([1-9][0-9]{0,8})", layers.strip())
    return (found[1], int(found[2])) if found else None


def chosen_layers(model: nn.Module, layers: Layers) -> list[str]:
    """The names of the chosen layers of a base.

    Raises:
        UserError: if its layers cannot be found, or it has fewer.
    """
    names, kind = list(_layers(model)), model.__class__.__name__
    if not names:
        raise UserError(
            f"the adapter's layers are {shown(layers)}, and no list of blocks of {kind} is as long "
            "as its configuration says; leave layers out, and name the modules in the adapter's "
            "targets"
        )
    return [names[number] for number in numbers_of(layers, len(names), kind)]


def _layers(model: Any) -> Mapping[str, nn.Module]:
    """Name -> layer, in the order of the forward pass; empty if the layers cannot be found."""
    from torch import nn

    sizes = _stack_sizes(getattr(model, "config", None))
    stacks: dict[str, nn.ModuleList] = {}
    for name, module in model.named_modules():
        # A list inside a layer, such as its experts, is no stack.
        is_inner = any(name.startswith(f"{outer}.") for outer in stacks)
        if isinstance(module, nn.ModuleList) and len(module) in sizes and not is_inner:
            stacks[name] = module
    if [len(stack) for stack in stacks.values()] != sizes:
        return {}
    return {f"{name}.{i}": layer for name, stack in stacks.items() for i, layer in enumerate(stack)}


def _stack_sizes(config: Any) -> list[int]:
    """Number of layers of a model, or of its encoder and of its decoder."""
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    sizes = [getattr(text, "num_hidden_layers", None)]
    if getattr(config, "is_encoder_decoder", False):
        own = (getattr(text, key, None) for key in ("num_decoder_layers", "decoder_layers"))
        sizes.append(next((size for size in own if size is not None), sizes[0]))
    return [size for size in sizes if isinstance(size, int)]


def backward_share(model: Any) -> float:
    """The share of the layers that a backward pass reaches, from 0 to 1.

    It is 1 if the layers cannot be found, or if something below them needs a gradient: a prompt, an
    embedding, or the output of an embedding, as with gradient checkpointing.
    """
    base = model.get_base_model() if hasattr(model, "peft_config") else model
    moved = {p for p in model.parameters() if p.requires_grad}
    layers = list(_layers(base).values())
    if not layers or not moved or _asks_for_gradients_of_inputs(base):
        return 1.0
    # Parameters are registered in the order of the forward pass, so a head follows the layers.
    ordered, inside = list(base.parameters()), [set(layer.parameters()) for layer in layers]
    in_layers = set().union(*inside)
    last = max((i for i, p in enumerate(ordered) if p in in_layers), default=-1)
    if moved - in_layers - set(ordered[last + 1 :]):
        return 1.0
    lowest = next((i for i, own in enumerate(inside) if own & moved), len(layers))
    return 1 - lowest / len(layers)


def _asks_for_gradients_of_inputs(model: nn.Module) -> bool:
    """Whether transformers or peft has put its hook on an embedding; only its name tells."""
    hooks = [hook for module in model.modules() for hook in module._forward_hooks.values()]
    return any("make_inputs_require_grad" in getattr(hook, "__name__", "") for hook in hooks)


@lru_cache(maxsize=64)
def share_by_config(
    layers: str | tuple[int, ...], name: str, revision: str | None, trust_remote_code: bool
) -> float:
    """The `backward_share` of an adapter in these layers, by the model's `config.json` alone.

    Args:
        layers: one of the forms, a list as a tuple.
        name: hub id, folder or alias.
        revision: branch, tag or commit of the hub id.
        trust_remote_code: whether the configuration may come from the repository's code.

    Raises:
        UserError: if the model cannot be read or has fewer layers.
    """
    from zofo.console import quiet
    from zofo.models.loading import explaining, read_model_config, resolve

    source = resolve(name)
    with explaining(name, source), quiet():
        config = read_model_config(
            source, name, revision=revision, trust_remote_code=trust_remote_code
        )
    num_layers = sum(_stack_sizes(config))
    if not num_layers:
        return 1.0
    given = layers if isinstance(layers, str) else list(layers)
    return 1 - numbers_of(given, num_layers, name)[0] / num_layers
