"""A method is an assignment of an order to each block of the model.

    block     what it holds                                       order
    base      every weight of the pretrained model                first, zeroth or frozen
    adapter   the PEFT module's weights, and a fresh head's       first, zeroth or frozen

`first`: moved by the exact gradient; `zeroth`: by differences of losses along random directions;
`frozen`: not at all. The five methods that the paper compares are five rows of one table.
"""

from __future__ import annotations

import difflib
import fnmatch
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Final, Literal

from torch import nn

from zofo.errors import UserError
from zofo.perturb.compiled import WRAPPED_NAME

Order = Literal["first", "zeroth", "frozen"]

ADAPTER_TENSORS_FROM: Final = 1 << 19
"""Adapter tensors are numbered from here on, so that they share no direction with the base."""

_ADALORA_RANK: Final = "ranknum"
"""AdaLoRA keeps its present rank as a parameter that nothing trains."""

_MIXED_KINDS: Final = ("ADAPTION_PROMPT", "CPT")
"""Kinds of adapter whose trained weights cannot be told by name."""


@dataclass(frozen=True)
class Method:
    """The orders of the two blocks."""

    base: Order
    adapter: Order
    description: str

    @property
    def forwards_per_gradient(self) -> int:
        """What a first-order pass costs in forwards; 0 where there is none.

        A backward costs about one forward for an adapter's gradient, two for every weight's.
        """
        return 3 if self.base == "first" else 2 if self.adapter == "first" else 0

    @property
    def needs_adapter(self) -> bool:
        """Whether the method moves an adapter."""
        return self.adapter != "frozen"


METHODS: Final[Mapping[str, Method]] = {
    "hybrid": Method("zeroth", "first", "base by loss differences, adapter by its gradient"),
    "fo-peft": Method("frozen", "first", "the usual PEFT: adapter by its gradient, base frozen"),
    "zo-peft": Method("frozen", "zeroth", "adapter by loss differences, base frozen"),
    "fo-ft": Method("first", "frozen", "full fine-tuning by the gradient, no adapter"),
    "zo-ft": Method("zeroth", "frozen", "full fine-tuning by loss differences (MeZO), no adapter"),
}


def get_method(name: str) -> Method:
    """The method of that name.

    Raises:
        UserError: if there is none; names the nearest.
    """
    if name not in METHODS:
        near = difflib.get_close_matches(name.lower(), METHODS, n=1)
        hint = f"did you mean {near[0]!r}? " if near else ""
        raise UserError(f"method {name!r} does not exist; {hint}choose one of {', '.join(METHODS)}")
    return METHODS[name]


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


def _check_adapter_kinds(model: nn.Module) -> None:
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


def _check_not_quantized(model: nn.Module, base: dict[str, nn.Parameter], method: str) -> None:
    quantized = [name for name, parameter in base.items() if _is_quantized(parameter)]
    quantized += [name for name, _ in model.named_buffers() if name.endswith(".qweight")]  # GPTQ
    if quantized:
        raise UserError(
            f"method {method!r} moves the base, {len(quantized)} of whose weights are quantized, "
            f"such as {quantized[0]!r}: a step is smaller than what lies between two of their "
            "values. Load the base in bfloat16, or choose fo-peft or zo-peft"
        )


def _keep_unpacked(model: nn.Module) -> None:
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


def apply_method(model: nn.Module, method: str) -> Blocks:
    """Set `requires_grad` as the method's orders ask, and return the blocks.

    Raises:
        UserError: if the method moves an adapter and the model has none, or the other way round,
            if the adapter's weights cannot be told from the base's, if it would move quantized
            weights, or if these are packed so that gradients through them are wrong.
    """
    chosen = get_method(method)
    blocks = split_parameters(model)
    if chosen.needs_adapter and not blocks.adapter:
        raise UserError(
            f"method {method!r} moves an adapter and the model has none; wrap it with "
            "peft.get_peft_model, or choose fo-ft or zo-ft"
        )
    if not chosen.needs_adapter and blocks.adapter:
        raise UserError(
            f"method {method!r} moves no adapter and the model has one; pass the model without "
            "adapter, or choose hybrid, fo-peft or zo-peft"
        )
    _check_adapter_kinds(model)
    if chosen.base != "frozen":
        _check_not_quantized(model, blocks.base, method)
    _keep_unpacked(model)
    for parameter in blocks.base.values():
        parameter.requires_grad_(chosen.base == "first")
    for parameter in blocks.adapter.values():
        parameter.requires_grad_(chosen.adapter == "first")
    return blocks


def param_groups(
    model: nn.Module,
    method: str = "hybrid",
    *,
    base_lr: float | Mapping[str, float] = 1e-5,
    adapter_lr: float = 1e-3,
    base_weight_decay: float = 0.0,
    adapter_weight_decay: float = 0.0,
    no_decay: Iterable[str] = (),
) -> list[dict[str, Any]]:
    """Parameter groups for `HybridOptimizer`; the adapter's come first.

    Args:
        model: the model, adapter attached; its `requires_grad` flags are set by the method.
        method: a name in `METHODS`.
        base_lr: learning rate of the base, or a map from a shell-style pattern of base parameter
            names to a rate: the first that matches counts, what none matches stays frozen.
        adapter_lr: learning rate of the adapter.
        base_weight_decay: decoupled weight decay of the base.
        adapter_weight_decay: handed to the adapter's optimizer.
        no_decay: names of adapter (or first-order base) parameters to spare from weight decay.

    Returns:
        Dicts with `params`, `names`, `tensors` (direction indices), `order`, `block`, `lr`,
        `weight_decay`.

    Raises:
        UserError: for a pattern that matches no parameter, or a negative rate.
    """
    blocks, chosen = apply_method(model, method), get_method(method)
    no_decay = [name.replace(WRAPPED_NAME, "") for name in no_decay]
    rates = dict(base_lr) if isinstance(base_lr, Mapping) else {"*": base_lr}
    _check_rates({**{f"base_lr[{k!r}]": v for k, v in rates.items()}, "adapter_lr": adapter_lr})
    groups: list[dict[str, Any]] = []

    def add(names: list[str], block: str, order: Order, lr: float, weight_decay: float) -> None:
        source, index = (
            (blocks.base, blocks.base_index)
            if block == "base"
            else (blocks.adapter, blocks.adapter_index)
        )
        spared = set(no_decay) if order == "first" else set()
        for part, decay in (
            ([n for n in names if n not in spared], weight_decay),
            ([n for n in names if n in spared], 0.0),
        ):
            if part:
                groups.append(
                    {
                        "params": [source[n] for n in part],
                        "names": part,
                        "tensors": [index[n] for n in part],
                        "order": order,
                        "block": block,
                        "lr": lr,
                        "weight_decay": decay,
                    }
                )

    if chosen.adapter != "frozen":
        add(list(blocks.adapter), "adapter", chosen.adapter, adapter_lr, adapter_weight_decay)
    if chosen.base != "frozen":
        for pattern, names in _match(rates, list(blocks.base)).items():
            add(names, "base", chosen.base, rates[pattern], base_weight_decay)
        moved = {name for group in groups if group["block"] == "base" for name in group["names"]}
        for name in blocks.base.keys() - moved:
            blocks.base[name].requires_grad_(False)
    return groups


def _match(rates: Mapping[str, float], names: list[str]) -> dict[str, list[str]]:
    matched: dict[str, list[str]] = {pattern: [] for pattern in rates}
    for name in names:
        for pattern in rates:
            if fnmatch.fnmatchcase(name, pattern):
                matched[pattern].append(name)
                break
    unused = [pattern for pattern, found in matched.items() if not found]
    if unused:
        raise UserError(
            f"base_lr pattern {', '.join(map(repr, unused))} matches no base parameter that an "
            f"earlier pattern left; patterns are shell-style, names look like {names[0]!r} and "
            f"{names[len(names) // 2]!r}"
        )
    return matched


def _check_rates(rates: Mapping[str, float]) -> None:
    wrong = [f"{name} is {lr}" for name, lr in rates.items() if not 0 <= lr < float("inf")]
    if wrong:
        raise UserError("; ".join(wrong) + "; a learning rate is a finite number of at least 0")
