"""The two blocks of a model: which parameters belong to the base, and which to the adapter."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from torch import nn

from zofo.errors import UserError
from zofo.perturb.compiled import WRAPPED_NAME

ADAPTER_TENSORS_FROM: Final = 1 << 19
"""First tensor index of the adapter. Base indices lie below it, so no direction is shared."""
_ADALORA_RANK: Final = "ranknum"
"""AdaLoRA stores its current rank in a parameter of this name, which is never trained."""
_MIXED_KINDS: Final = ("ADAPTION_PROMPT", "CPT")
"""Adapter kinds whose trained weights cannot be recognised by their names."""


@dataclass(frozen=True)
class Blocks:
    """The parameters of a model by block, with names that do not depend on the adapter.

    Attributes:
        base: canonical name -> parameter. The canonical name is the one without an adapter.
        adapter: name -> parameter.
        base_index: canonical name -> tensor index, which addresses the tensor's directions. It is
            the rank of the name among all sorted base names, so neither the order of modules, nor
            the adapter, nor the choice of trained base weights changes it.
    """

    base: dict[str, nn.Parameter]
    adapter: dict[str, nn.Parameter]
    base_index: dict[str, int]

    @property
    def adapter_index(self) -> dict[str, int]:
        """Name -> tensor index, from `ADAPTER_TENSORS_FROM` on."""
        return {name: ADAPTER_TENSORS_FROM + i for i, name in enumerate(sorted(self.adapter))}


def split_parameters(model: nn.Module) -> Blocks:
    """Split the parameters of a model into base and adapter.

    In a `PeftModel`, the adapter is what peft added for the active adapters, whether or not it
    requires a gradient now. Inactive adapters, such as the frozen reference of trl's DPO, belong to
    no block. In any other model, the parameters that require a gradient are the adapter if only
    some do; otherwise all parameters are base. Tied parameters count once, under their first name
    in sorted order.
    """
    names: dict[int, list[str]] = {}
    parameters: dict[int, nn.Parameter] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        name = name.replace(WRAPPED_NAME, "")
        names.setdefault(id(parameter), []).append(name)
        parameters[id(parameter)] = parameter

    markers = _adapter_markers(model)
    if markers is None:
        # A quantized weight cannot require a gradient, so its flag says nothing about its block.
        trainable = [p.requires_grad for p in parameters.values() if not is_quantized(p)]
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
        if markers is not None and any(f".{_ADALORA_RANK}." in name for name in names[i]):
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
    return Blocks(base, adapter, {name: rank for rank, name in enumerate(sorted(numbered))})


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
    if not hasattr(model, "peft_config"):
        return ""
    return "base_model.model." if hasattr(model.base_model, "prefix") else "base_model."


def check_adapter_kinds(model: nn.Module) -> None:
    """Refuse adapters that train base weights, or whose weights look like base weights."""
    for name, config in getattr(model, "peft_config", {}).items():
        if getattr(config, "bias", "none") != "none":
            raise UserError(
                f"adapter {name!r} has bias={config.bias!r}, which trains biases of the base "
                "with the adapter, although the base has an order of its own; use bias='none'"
            )
        kind = str(getattr(config.peft_type, "value", config.peft_type))
        if kind in _MIXED_KINDS:
            raise UserError(
                f"adapter {name!r} is of kind {kind}, whose weights zofo cannot distinguish from "
                "the base; choose LoRA, prefix tuning, prompt tuning or another kind"
            )


def check_not_quantized(model: nn.Module, base: dict[str, nn.Parameter], method: str) -> None:
    """Refuse to update quantized base weights."""
    quantized = [name for name, parameter in base.items() if is_quantized(parameter)]
    quantized += [name for name, _ in model.named_buffers() if name.endswith(".qweight")]  # GPTQ
    if quantized:
        raise UserError(
            f"method {method!r} updates the base, but {len(quantized)} of its weights are "
            f"quantized, such as {quantized[0]!r}. An update is smaller than the gap between two "
            "quantized values. Load the base in bfloat16, or choose fo-peft or zo-peft"
        )


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


def is_quantized(parameter: nn.Parameter) -> bool:
    """Whether a parameter holds quantized weights."""
    # A floating dtype proves nothing: bitsandbytes may store 4 bits in one, torchao reports one.
    return (
        not parameter.is_floating_point()
        or hasattr(parameter, "quant_state")
        or type(parameter.data).__module__.startswith("torchao.")
    )


def _adapter_markers(model: nn.Module) -> list[str] | None:
    """Substrings that mark the adapter's parameter names; None for a model without peft."""
    if not hasattr(model, "peft_config"):
        return None
    tuner_prefix = getattr(getattr(model, "base_model", None), "prefix", "")
    markers = [".prompt_encoder.", ".modules_to_save.", ".trainable_tokens_"]
    return [*markers, f".{tuner_prefix}"] if tuner_prefix else markers


def _inactive_adapters(model: nn.Module) -> set[str]:
    if not hasattr(model, "peft_config"):
        return set()
    return set(model.peft_config) - set(model.active_adapters)  # type: ignore[arg-type]
