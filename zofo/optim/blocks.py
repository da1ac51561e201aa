"""The two blocks of a model: which parameters belong to the base, and which to the adapter."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from torch import nn

from zofo.errors import UserError
from zofo.perturb.compiled import WRAPPED_NAME

ADAPTER_TENSORS_FROM: Final = 1 << 19
"""Adapter tensors are numbered from here on, so that they share no direction with the base."""


_ADALORA_RANK: Final = "ranknum"
"""AdaLoRA keeps its present rank as a parameter that nothing trains."""


_MIXED_KINDS: Final = ("ADAPTION_PROMPT", "CPT")
"""Kinds of adapter whose trained weights cannot be told by name."""


@dataclass(frozen=True)
class Blocks:
    """The parameters of a model by block, under names that do not depend on the adapter.

    Attributes:
        base: canonical name -> parameter; the name is the one in the model without adapter.
        adapter: name -> parameter.
        base_index: canonical name -> tensor index of its directions: the rank among the sorted
            names of all base tensors, so it does not depend on the order of modules, on the
            adapter, or on which part of the base is trained.
    """

    base: dict[str, nn.Parameter]
    adapter: dict[str, nn.Parameter]
    base_index: dict[str, int]

    @property
    def adapter_index(self) -> dict[str, int]:
        """Name -> tensor index, from `ADAPTER_TENSORS_FROM` on."""
        return {name: ADAPTER_TENSORS_FROM + i for i, name in enumerate(sorted(self.adapter))}


def split_parameters(model: nn.Module) -> Blocks:
    """Sort a model's parameters into base and adapter.

    In a `PeftModel` the adapter is what peft added for the active adapters, whatever requires a
    gradient at the moment; inactive ones (the frozen reference of trl's DPO) are in no block. In
    another model whose parameters partly require a gradient those are the adapter; otherwise all
    are base. Tied parameters count once, under the first of their sorted names.
    """
    names: dict[int, list[str]] = {}
    parameters: dict[int, nn.Parameter] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        name = name.replace(WRAPPED_NAME, "")
        names.setdefault(id(parameter), []).append(name)
        parameters[id(parameter)] = parameter

    markers = _adapter_markers(model)
    if markers is None:
        # Quantized weights cannot require a gradient, whoever they belong to.
        trainable = [p.requires_grad for p in parameters.values() if not _is_quantized(p)]
        by_grad = any(trainable) and not all(trainable)
        is_adapter = {i: by_grad and parameters[i].requires_grad for i in parameters}
    else:
        is_adapter = {
            i: any(marker in f".{name}" for name in names[i] for marker in markers)
            for i in parameters
        }

    wrapper, inactive = _wrapper_prefix(model), _inactive_adapters(model)
    base, adapter, numbered = {}, {}, []
    for i, parameter in parameters.items():
        if markers is not None and any(f".{_ADALORA_RANK}." in name for name in names[i]):
            continue
        if is_adapter[i]:
            if not all(inactive & set(name.split(".")) for name in names[i]):
                adapter[min(names[i])] = parameter
            continue
        # Prompt learning registers the embedding a second time, outside the wrapped model.
        own = [name for name in names[i] if name.startswith(wrapper)] or names[i]
        canonical = min(canonical_name(name, wrapper) for name in own)
        numbered.append(canonical)
        # peft keeps the module that a trained copy replaced; the forward does not use it.
        if not all("original_module." in name for name in names[i]):
            base[canonical] = parameter
    return Blocks(base, adapter, {name: rank for rank, name in enumerate(sorted(numbered))})


def canonical_name(name: str, wrapper: str = "") -> str:
    """The name that a base parameter has in the model without an adapter.

    Args:
        name: its name in the wrapped model.
        wrapper: the prefix that peft's wrapping adds.
    """
    name = name.removeprefix(wrapper)
    for inserted in (".token_adapter.", ".base_layer.", ".original_module."):
        name = name.replace(inserted, ".")
    return name


def _wrapper_prefix(model: nn.Module) -> str:
    """Tuners (LoRA, IA3, ...) wrap the model twice, prompt learning once."""
    if not hasattr(model, "peft_config"):
        return ""
    return "base_model.model." if hasattr(model.base_model, "prefix") else "base_model."


def check_adapter_kinds(model: nn.Module) -> None:
    """Refuse what would put one weight into both blocks, or a frozen one into the adapter."""
    for name, config in getattr(model, "peft_config", {}).items():
        if getattr(config, "bias", "none") != "none":
            raise UserError(
                f"adapter {name!r} has bias={config.bias!r}, which trains biases of the base as "
                "part of the adapter; the base moves by the method's own order: use bias='none'"
            )
        kind = str(getattr(config.peft_type, "value", config.peft_type))
        if kind in _MIXED_KINDS:
            raise UserError(
                f"adapter {name!r} is of kind {kind}, which zofo cannot tell from the base; choose "
                "LoRA, prefix tuning, prompt tuning or another kind"
            )


def check_not_quantized(model: nn.Module, base: dict[str, nn.Parameter], method: str) -> None:
    """Refuse a method that moves a quantized base."""
    quantized = [name for name, parameter in base.items() if _is_quantized(parameter)]
    quantized += [name for name, _ in model.named_buffers() if name.endswith(".qweight")]  # GPTQ
    if quantized:
        raise UserError(
            f"method {method!r} moves the base, {len(quantized)} of whose weights are quantized, "
            f"such as {quantized[0]!r}: a step is smaller than what lies between two of their "
            "values. Load the base in bfloat16, or choose fo-peft or zo-peft"
        )


def keep_unpacked(model: nn.Module) -> None:
    """Keep bitsandbytes from repacking 4-bit weights on the CPU when it evaluates.

    Measured with 0.50: it does not unpack them for training, and their gradients are then wrong.
    """
    for name, module in model.named_modules():
        if not hasattr(module, "support_avx512bf16_for_cpu"):
            continue
        state = getattr(getattr(module, "weight", None), "quant_state", None)
        if getattr(state, "packing_format_for_cpu", False):
            raise UserError(
                f"the 4-bit weights of {name!r} were packed when the model was evaluated on the "
                "CPU, and bitsandbytes computes wrong gradients with them; load the base anew and "
                "evaluate it after it was given to zofo"
            )
        module.support_avx512bf16_for_cpu = False


def _is_quantized(parameter: nn.Parameter) -> bool:
    """Bitsandbytes may store 4 bits in a floating type; torchao's tensors say they are floating."""
    return (
        not parameter.is_floating_point()
        or hasattr(parameter, "quant_state")
        or type(parameter.data).__module__.startswith("torchao.")
    )


def _adapter_markers(model: nn.Module) -> list[str] | None:
    """Parts of parameter names that tell an adapter's from the base's; None without peft."""
    if not hasattr(model, "peft_config"):
        return None
    tuner_prefix = getattr(getattr(model, "base_model", None), "prefix", "")
    markers = [".prompt_encoder.", ".modules_to_save.", ".trainable_tokens_"]
    return [*markers, f".{tuner_prefix}"] if tuner_prefix else markers


def _inactive_adapters(model: nn.Module) -> set[str]:
    if not hasattr(model, "peft_config"):
        return set()
    return set(model.peft_config) - set(model.active_adapters)  # type: ignore[arg-type]
