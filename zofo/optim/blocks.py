"""The two blocks of a model: which parameters belong to the base, and which to the adapter."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Final

from torch import nn

from zofo.errors import UserError
from zofo.perturb.compiled import WRAPPED_NAME
from zofo.perturb.quantized import (
    Scales,
    give_units,
    has_moving_scales,
    is_quantized,
    places_of,
    unit_of,
    unnest_scales,
)
from zofo.perturb.shards import is_sharded, reshard

ADAPTER_TENSORS_FROM: Final = 1 << 19
"""First tensor index of the adapter. Base indices lie below it, so no direction is shared."""
_NEVER_TRAINED: Final = (".ranknum.", ".frozen_embedding")
"""Marks of what peft freezes inside an adapter: AdaLoRA's rank, CARTRIDGE's first tokens.

Their flags would tell too, unless the adapter was loaded for inference and is frozen as a whole.
"""
_FROZEN: Final = "zofo_is_frozen"
"""Attribute of a parameter that was frozen inside an adapter before a method set the flags."""
_PLAIN_STARTS: Final = (None, True, False, "gaussian", "orthogonal", "eva")
"""The initial values of LoRA for which peft leaves the weights of the base as they are."""
_MIXED_KINDS: Final = ("ADAPTION_PROMPT", "CPT")
"""Adapter kinds whose trained weights cannot be recognised by their names."""
_UNUSUAL_KINDS: Final = {
    "POLY": "the task_ids of the rows in every call",
    "XLORA": "adapters that were trained before",
    "MULTITASK_PROMPT_TUNING": "the task_ids of the rows in every call",
}
"""Adapter kinds that need more than a base and its batches."""


@dataclass(frozen=True)
class Blocks:
    """The parameters of a model by block, with names that do not depend on the adapter.

    Attributes:
        base: canonical name -> parameter. The canonical name is the one without an adapter. A
            quantised weight is in it twice: its codes, which never move, and its scales.
        adapter: name -> parameter.
        base_index: canonical name -> tensor index, which addresses the tensor's directions. It is
            the rank of the name among all sorted base names, so neither the order of modules, nor
            the adapter, nor the choice of trained base weights changes it.
    """

    base: dict[str, nn.Parameter]
    adapter: dict[str, nn.Parameter]
    base_index: dict[str, int]

    @property
    def movable(self) -> dict[str, nn.Parameter]:
        """The base without the codes of quantised weights."""
        return {name: p for name, p in self.base.items() if not is_quantized(p)}

    @property
    def adapter_index(self) -> dict[str, int]:
        """Name -> tensor index, from `ADAPTER_TENSORS_FROM` on."""
        return {name: ADAPTER_TENSORS_FROM + i for i, name in enumerate(sorted(self.adapter))}


def split_parameters(model: nn.Module) -> Blocks:
    """Split the parameters of a model into base and adapter.

    In a `PeftModel`, the adapter is what peft added for the active adapters and trains. If only
    some of it requires a gradient, then the rest is frozen and belongs to no block; if none does,
    the model was loaded for inference. Inactive adapters, such as the frozen reference of trl's
    DPO, belong to no block either. In any other model, the parameters that require a gradient are
    the adapter if only some do; otherwise all parameters are base. Tied parameters count once,
    under their first name in sorted order. Weights that FSDP2 shards are returned as shards.
    """
    reshard(model)
    names: dict[int, list[str]] = {}
    parameters: dict[int, nn.Parameter] = {}
    for name, parameter in named_places(model):
        name = name.replace(WRAPPED_NAME, "")
        names.setdefault(id(parameter), []).append(name)
        parameters[id(parameter)] = parameter

    markers = _adapter_markers(model)
    if markers is None:
        # Codes and scales never require a gradient, so their flags say nothing about their block.
        trainable = [
            p.requires_grad
            for p in parameters.values()
            if not is_quantized(p) and not isinstance(p, Scales)
        ]
        by_grad = any(trainable) and not all(trainable)
        is_adapter = {i: by_grad and parameters[i].requires_grad for i in parameters}
    else:
        is_adapter = {
            i: any(marker in f".{name}" for name in names[i] for marker in markers)
            for i in parameters
        }

    wrapper, inactive = wrapper_prefix(model), _inactive_adapters(model)
    base, adapter, numbered = {}, {}, []
    for i, parameter in parameters.items():
        if markers is not None and any(
            mark in f".{n}" for n in names[i] for mark in _NEVER_TRAINED
        ):
            continue
        if is_adapter[i]:
            if not all(inactive & set(name.split(".")) for name in names[i]):
                adapter[min(names[i])] = parameter
            continue
        # Prompt learning registers the embedding again, outside the wrapped model.
        own = [name for name in names[i] if name.startswith(wrapper)] or names[i]
        canonical = min(canonical_name(name, wrapper) for name in own)
        numbered.append(canonical)
        # peft stores the module that a trained copy replaced. The forward pass ignores it.
        if not all("original_module." in name for name in names[i]):
            base[canonical] = parameter
    if markers is not None:
        adapter = _trained_part(adapter)
    give_units([p for p in base.values() if isinstance(p, Scales)])
    return Blocks(base, adapter, {name: rank for rank, name in enumerate(sorted(numbered))})


def named_places(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """Every place of every parameter, and the scales of quantised layers, by name."""
    for prefix, module in model.named_modules(remove_duplicate=False):
        for name, parameter in places_of(module):
            yield f"{prefix}.{name}" if prefix else name, parameter


def _trained_part(adapter: dict[str, nn.Parameter]) -> dict[str, nn.Parameter]:
    """The parameters of an adapter that peft trains."""
    told = any(parameter.requires_grad for parameter in adapter.values())
    return {
        name: parameter
        for name, parameter in adapter.items()
        if not hasattr(parameter, _FROZEN) and (parameter.requires_grad or not told)
    }


def remember_frozen(model: nn.Module, blocks: Blocks) -> None:
    """Note what is frozen inside the adapter, before a method changes `requires_grad`."""
    markers = _adapter_markers(model)
    trained = {id(parameter) for parameter in blocks.adapter.values()}
    inactive = _inactive_adapters(model)
    for name, parameter in model.named_parameters() if markers else ():
        name = name.replace(WRAPPED_NAME, "")
        is_marked = any(marker in f".{name}" for marker in markers or ())
        if is_marked and id(parameter) not in trained and not inactive & set(name.split(".")):
            setattr(parameter, _FROZEN, True)


def canonical_name(name: str, wrapper: str = "") -> str:
    """Return the name of a base parameter in the model without an adapter.

    Args:
        name: its name in the wrapped model.
        wrapper: the prefix that peft's wrapper adds.
    """
    name = name.removeprefix(wrapper)
    for inserted in (".token_adapter.", ".base_layer.", ".original_module."):
        name = name.replace(inserted, ".")
    return name


def wrapper_prefix(model: nn.Module) -> str:
    """The prefix of base names: tuners (LoRA, IA3) wrap the model twice, prompt learning once."""
    if not is_peft(model):
        return ""
    return "base_model.model." if hasattr(model.base_model, "prefix") else "base_model."


def is_peft(model: nn.Module) -> bool:
    """Whether the model is a `PeftModel`; a model without one does not import peft."""
    kind = getattr(sys.modules.get("peft"), "PeftModel", None)
    return kind is not None and isinstance(_without_compile(model), kind)


def _without_compile(model: nn.Module) -> nn.Module:
    """The model inside the wrapper that `torch.compile(model)` returns, or the model itself."""
    return model._modules.get(WRAPPED_NAME.rstrip(".")) or model


def check_adapter_kinds(model: nn.Module, *, moves_base: bool = True) -> None:
    """Refuse adapters that cannot be saved, that change the base, or that look like it.

    Args:
        model: the model.
        moves_base: whether the method updates the base.
    """
    _check_wrapper(model)
    for name, config in model.peft_config.items() if is_peft(model) else ():  # type: ignore[operator, union-attr]
        check_adapter_config(config, name, moves_base=moves_base)


def check_adapter_config(config: Any, name: str = "default", *, moves_base: bool = True) -> None:
    """Refuse the configuration of an adapter that cannot be trained beside its base.

    Args:
        config: a `peft.PeftConfig`.
        name: the name of the adapter.
        moves_base: whether the method updates the base.
    """
    if getattr(config, "bias", "none") not in ("none", None):
        raise UserError(
            f"adapter {name!r} has bias={config.bias!r}, which trains biases of the base "
            "with the adapter, although the base has an order of its own; use bias='none'"
        )
    kind = str(getattr(config.peft_type, "value", config.peft_type))
    remedy = "choose LoRA, prefix tuning, prompt tuning or another kind"
    if kind in _MIXED_KINDS:
        raise UserError(
            f"adapter {name!r} is of kind {kind}, whose weights zofo cannot distinguish from "
            f"the base; {remedy}"
        )
    if kind in _UNUSUAL_KINDS:
        raise UserError(
            f"adapter {name!r} is of kind {kind}, which needs {_UNUSUAL_KINDS[kind]}; {remedy}"
        )
    start = getattr(config, "init_lora_weights", None)
    if moves_base and start not in _PLAIN_STARTS:
        raise UserError(
            f"adapter {name!r} has init_lora_weights={start!r}, and only true, false, "
            f"{', '.join(s for s in _PLAIN_STARTS if isinstance(s, str))} leave the weights of the "
            "base as they are, to which checkpoints return; use one of these"
        )


def _check_wrapper(model: nn.Module) -> None:
    """Refuse adapters that are not exactly one `PeftModel` around the base."""
    peft = sys.modules.get("peft")
    if peft is None:
        return
    model = _without_compile(model)
    if is_peft(model) and any(is_peft(module) for module in model.modules() if module is not model):
        raise UserError(
            "the model is a PeftModel inside a PeftModel, and peft saves only the outer adapter; "
            "merge the inner one first (merge_and_unload), or add the second adapter to the same "
            "PeftModel with add_adapter(name, config)"
        )
    layer = peft.tuners.tuners_utils.BaseTunerLayer
    if any(map(is_peft, model.modules())):
        return
    if any(isinstance(module, layer) for module in model.modules()):
        raise UserError(
            f"the model is a {type(model).__name__} with layers of an adapter and no PeftModel, as "
            "after transformers' add_adapter, peft.inject_adapter_in_model or mixed=True; make it "
            "with peft.get_peft_model(model, config), which checkpoints need"
        )


def check_can_move(model: nn.Module, method: str, *, by_gradient: bool) -> None:
    """Refuse a method that would have to update quantised weights themselves.

    An update by zeroth order moves the scales of bitsandbytes layers, which are unnested for it.

    Args:
        model: the model.
        method: the method's name, for the message.
        by_gradient: whether the method updates the base by its gradient.
    """
    if not by_gradient and (added := unnest_scales(model)):
        warnings.warn(
            "the scales of the quantised base were quantised themselves (double quantisation), so "
            f"they could not move; they are float32 now, {added:,} bytes more",
            stacklevel=4,
        )
    if any(is_quantized(p) and is_sharded(p) for p in model.parameters()):
        raise UserError(
            f"method {method!r} updates the base, which is quantised and sharded; leave "
            "fully_shard out, because the codes take a quarter of the memory or less"
        )
    moves_scales = [m for m in model.modules() if not by_gradient and has_moving_scales(m)]
    served = {id(p) for module in moves_scales for p in module._parameters.values()}
    quantized = [
        name for name, p in model.named_parameters() if is_quantized(p) and id(p) not in served
    ]
    quantized += [name for name, _ in model.named_buffers() if name.endswith(".qweight")]  # GPTQ
    if quantized:
        raise UserError(
            f"method {method!r} updates the base, but {len(quantized)} of its weights are "
            f"quantized, such as {quantized[0]!r}. An update is smaller than the gap between two "
            "quantized values. Load the base in bfloat16; or in 4 bits or int8 by bitsandbytes, "
            "whose scales hybrid and zo-ft move; or choose fo-peft or zo-peft"
        )


def units_of(groups: Iterable[Mapping[str, Any]]) -> dict[int, float]:
    """The units other than 1 of the weights in parameter groups, by tensor index."""
    pairs = (zip(group["tensors"], group["params"], strict=True) for group in groups)
    return {tensor: unit_of(p) for group in pairs for tensor, p in group if unit_of(p) != 1}


def set_units(groups: Iterable[Mapping[str, Any]], units: Mapping[int, float]) -> None:
    """Give the scales in parameter groups the units of a trajectory."""
    for group in groups:
        for tensor, parameter in zip(group["tensors"], group["params"], strict=True):
            if isinstance(parameter, Scales):
                parameter.unit = units.get(tensor, 1.0)


def keep_unpacked(model: nn.Module) -> None:
    """Stop bitsandbytes from repacking 4-bit weights for evaluation on the CPU.

    Version 0.50 was measured: it does not unpack them for training, so gradients are then wrong.
    """
    for name, module in model.named_modules():
        if not hasattr(module, "support_avx512bf16_for_cpu"):
            continue
        state = getattr(getattr(module, "weight", None), "quant_state", None)
        if getattr(state, "packing_format_for_cpu", False):
            raise UserError(
                f"the 4-bit weights of {name!r} were packed when the model was evaluated on the "
                "CPU, and bitsandbytes computes wrong gradients with packed weights; load the base "
                "anew and pass it to zofo before you evaluate it"
            )
        module.support_avx512bf16_for_cpu = False


def _adapter_markers(model: nn.Module) -> list[str] | None:
    """Substrings that mark the adapter's parameter names; None for a model without peft."""
    if not is_peft(model):
        return None
    tuner_prefix = getattr(getattr(model, "base_model", None), "prefix", "")
    markers = [".prompt_encoder.", ".modules_to_save.", ".trainable_tokens_"]
    return [*markers, f".{tuner_prefix}"] if tuner_prefix else markers


def _inactive_adapters(model: nn.Module) -> set[str]:
    if not is_peft(model):
        return set()
    return set(model.peft_config) - set(model.active_adapters)  # type: ignore[arg-type]
