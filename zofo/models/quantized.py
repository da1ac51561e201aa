"""Bases that bitsandbytes holds in 4 or 8 bits: loading, sizes, nested scales.

Each block of codes q has a scale s, and the layer's weight is W = s ⊙ q. In 4 bits a block holds 64
codes; in 8 bits it is a row. transformers decides which layers are quantised: all linear ones but
the output head. With double quantisation (Dettmers et al., "QLoRA", 2023, section 3), the scales
are nested: 8-bit codes with scales of their own.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Final, Literal, get_args

import torch
from torch import Tensor, nn

from zofo.errors import UserError, shown

Quantization = Literal["nf4", "fp4", "int8"]
QUANTIZATIONS: Final[tuple[str, ...]] = get_args(Quantization)
HOW_TO_INSTALL: Final = "pip install 'zofo[quantized]'"


def require_bitsandbytes(what: str) -> None:
    """Check that bitsandbytes is installed.

    Args:
        what: what needs it, for the message.

    Raises:
        UserError: if it is not.
    """
    if importlib.util.find_spec("bitsandbytes") is None:
        raise UserError(
            f"{what} needs the package bitsandbytes, which is not installed; run {HOW_TO_INSTALL}"
        )


def stored_quantization(config: Any) -> str | None:
    """How the weights of a folder are quantised: nf4, fp4, int8, or the name of another method.

    Args:
        config: the model's configuration, as transformers reads it.

    Returns:
        None if they are not quantised.
    """
    stored = getattr(config, "quantization_config", None)
    if not stored:
        return None
    values: Mapping[str, Any] = stored if isinstance(stored, Mapping) else stored.to_dict()
    if values.get("load_in_8bit"):
        return "int8"
    if values.get("load_in_4bit"):
        return str(values.get("bnb_4bit_quant_type", "fp4"))
    return str(values.get("quant_method", "an unknown method"))


def check_quantization(quantization: str | None, config: Any, name: str) -> str | None:
    """Check that a model can be loaded with this quantisation.

    Args:
        quantization: "nf4", "fp4", "int8", or None for the weights as they are stored.
        config: the model's configuration.
        name: the model as the user named it.

    Returns:
        How the weights are stored, as `stored_quantization` says it.

    Raises:
        UserError: if the weights are stored with another one, or bitsandbytes is missing.
    """
    if quantization is not None and quantization not in QUANTIZATIONS:
        raise UserError(
            f"quantization is {shown(quantization)}; choose one of {', '.join(QUANTIZATIONS)}"
        )
    stored = stored_quantization(config)
    if quantization is not None and stored not in (None, quantization):
        raise UserError(
            f"model.quantization is {quantization}, and the weights of {name} are already "
            f"quantised ({shown(stored)}); leave model.quantization out, or name the original model"
        )
    if stored in QUANTIZATIONS:
        require_bitsandbytes(f"the model {name}, whose weights are quantised ({stored}),")
    elif quantization is not None:
        require_bitsandbytes(f"model.quantization={quantization}")
    return stored


@contextmanager
def explaining_method(stored: str | None, name: str) -> Iterator[None]:
    """Say what to do if a model that another method quantised cannot be loaded.

    Args:
        stored: how its weights are quantised, as from `stored_quantization`.
        name: the model as the user named it.

    Raises:
        UserError: in place of what the block raises, if the method is none of bitsandbytes.
    """
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        if stored in (None, *QUANTIZATIONS):
            raise
        first = (str(error).strip().splitlines() or [repr(error)])[0]
        raise UserError(
            f"the model {name!r} cannot be loaded ({first}); its weights are quantised by {stored}:"
            " install the package that this method needs, where it runs on this device, or load "
            "the original model with model.quantization=nf4"
        ) from error


def keep_savable(model: Any) -> None:
    """Let a model that came from a folder of bitsandbytes be saved again.

    The rules by which transformers (5.23) reads such a folder have no reverse, and saving asks for
    it. Saving does not need them, because the layers write their own scales.
    """
    home = "transformers.integrations.bitsandbytes"
    rules = getattr(model, "_weight_conversions", None) or []
    model._weight_conversions = [
        rule
        for rule in rules
        if not any(type(op).__module__ == home for op in getattr(rule, "operations", ()))
    ]


def check_dora(model: Any) -> None:
    """Refuse DoRA on an 8-bit base on the CPU.

    peft (0.21) reads the weight for the lengths of its rows, and the layer has then lost its
    scales: the second forward fails.

    Raises:
        UserError: if the base is such a one.
    """
    on_cpu = any(p.device.type == "cpu" for p in model.parameters())
    if on_cpu and getattr(model, "is_loaded_in_8bit", False):
        raise UserError(
            "peft cannot run DoRA on an 8-bit base on the CPU; choose adapter lora, or "
            "model.quantization=nf4"
        )


def bitsandbytes_config(
    quantization: str, dtype: torch.dtype, device: str, head: Sequence[str] = ()
) -> Any:
    """The configuration by which transformers quantises a model while it loads.

    Args:
        quantization: "nf4", "fp4" or "int8".
        dtype: dtype of the weights that are not quantised.
        device: device that computes. The CPU computes 4-bit layers in float32.
        head: modules of a classifier's head. transformers knows only heads that write tokens, and
            would quantise these.
    """
    import transformers as hf

    skipped = list(head) or None
    if quantization == "int8":
        return hf.BitsAndBytesConfig(load_in_8bit=True, llm_int8_skip_modules=skipped)
    return hf.BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=quantization,
        bnb_4bit_compute_dtype=torch.float32 if device == "cpu" else dtype,
        llm_int8_skip_modules=skipped,
    )


def check_new_weights(model: nn.Module, new: Collection[str], name: str) -> None:
    """Refuse a folder of bitsandbytes that asks for codes of a head that it lacks.

    Args:
        model: the model with or without weights.
        new: names of the weights that the folder lacks.
        name: the model as the user named it.

    Raises:
        UserError: if a new weight belongs to a quantised layer.
    """
    for key in sorted(new):
        parameter = model.get_parameter(key)
        if hasattr(parameter, "quant_state") or hasattr(parameter, "SCB"):
            raise UserError(
                f"the head of {name} is new ({key}), and its config.json asks for codes of it, "
                "which cannot be trained; load the original model with model.quantization"
            )


def device_map(device: str) -> dict[str, Any]:
    """The map of transformers that puts a whole model on one device."""
    # accelerate compares the device of a quantised model with its own, which has an index.
    return {"": torch.cuda.current_device() if device == "cuda" else device}


def quantize_empty(model: Any, config: Any) -> None:
    """Give a model on torch's meta device the layers and shapes that a quantised load would give.

    Args:
        model: the model without weights, changed in place.
        config: configuration of bitsandbytes, an object or the content of a config.json.
    """
    from bitsandbytes.functional import QuantState
    from bitsandbytes.nn import Int8Params, Linear4bit, Linear8bitLt, Params4bit
    from transformers.quantizers.auto import AutoHfQuantizer

    quantizer = AutoHfQuantizer.from_config(config, pre_quantized=False)
    quantizer.preprocess_model(model, device_map=device_map("cpu"))
    quantizer.postprocess_model(model)
    is_nested = bool(quantizer.quantization_config.bnb_4bit_use_double_quant)

    def empty(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    for module in model.modules():
        if isinstance(module, Linear8bitLt):
            codes = empty(*module.weight.shape, dtype=torch.int8)
            scales = empty(module.out_features)
            module.weight = Int8Params(codes, requires_grad=False, CB=codes, SCB=scales)
        elif isinstance(module, Linear4bit):
            own: Any = module.weight
            num, size = own.numel(), own.blocksize
            num_scales = -(-num // size)  # rounded up
            state = QuantState(empty(num_scales), own.shape, empty(16), size, own.quant_type)
            if is_nested:
                outer = QuantState(
                    empty(-(-num_scales // 256)),
                    code=empty(256),
                    blocksize=256,
                    dtype=torch.float32,
                )
                scales = empty(num_scales, dtype=torch.uint8)
                state = QuantState(
                    scales, own.shape, state.code, size, own.quant_type, None, empty(), outer
                )
            per_element = 2 * own.quant_storage.itemsize  # codes in an element of the storage
            codes = empty(-(-num // per_element), 1, dtype=own.quant_storage)
            module.weight = Params4bit(
                codes,
                quant_state=state,
                blocksize=size,
                compress_statistics=is_nested,
                quant_type=own.quant_type,
                quant_storage=own.quant_storage,
                bnb_quantized=True,
            )


def error_of_layer(quantization: str, device: str) -> float:
    """The relative error of a small random layer in 4 or 8 bits, against float32.

    Args:
        quantization: "nf4", "fp4" or "int8".
        device: device that computes.

    Returns:
        |y − y₃₂| / |y₃₂| over the outputs y of 16 random inputs.
    """
    from bitsandbytes.nn import Linear4bit, Linear8bitLt

    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(64, 64, generator=generator)
    inputs = torch.randn(16, 64, generator=generator)
    layer: nn.Module
    if quantization == "int8":
        layer = Linear8bitLt(64, 64, bias=False, has_fp16_weights=False)
    else:
        layer = Linear4bit(64, 64, bias=False, quant_type=quantization)
        layer.support_avx512bf16_for_cpu = False
    layer.load_state_dict({"weight": weight})
    with torch.no_grad():
        outputs = layer.to(device)(inputs.to(device)).cpu()
    exact = inputs @ weight.T
    return float((outputs - exact).norm() / exact.norm())


@dataclass(frozen=True)
class QuantizedBytes:
    """Bytes of the quantised layers of a model; zero if it has none."""

    codes: int
    scales: int  # with nested scales and code books


def quantized_bytes(model: nn.Module) -> QuantizedBytes:
    """The bytes of the codes and of the scales in the layers that bitsandbytes quantised."""
    codes = scales = 0
    for weight, parts in _layers(model):
        codes += weight.nbytes
        scales += sum(part.nbytes for part in parts)
    return QuantizedBytes(codes, scales)


def num_weights(model: nn.Module, parameters: Iterable[Tensor]) -> int:
    """The number of weights in parameters of a model.

    A parameter in 4 bits holds several weights in one element, and scales are no weights of their
    own.
    """
    own = set(map(id, model.parameters()))
    shapes = (getattr(p, "quant_state", p).shape for p in parameters if id(p) in own)
    return sum(torch.Size(shape).numel() for shape in shapes)


def notes_on_unnesting(num_bytes: int) -> list[str]:
    """A sentence on what `unnest_scales` has added, if it has added anything."""
    if not num_bytes:
        return []
    return [
        "the scales of the base were quantised themselves (double quantisation); they are float32 "
        f"now, so that they can move, which takes {num_bytes / 2**20:,.1f} MiB more"
    ]


def _layers(model: nn.Module) -> Iterator[tuple[Any, list[Tensor]]]:
    """Each quantised weight of bitsandbytes once, with the tensors of its scales."""
    seen: set[int] = set()
    for module in model.modules():
        # The layers of peft name the weight of the layer inside, too.
        weight: Any = module._parameters.get("weight")
        if weight is None or id(weight) in seen:
            continue
        state = getattr(weight, "quant_state", None)
        if state is not None:
            parts = [state.absmax, state.code]
            if state.nested:
                parts += [state.offset, state.state2.absmax, state.state2.code]
        elif hasattr(weight, "SCB"):
            # After the first forward, the layer holds the scales and no longer its weight.
            owner = weight if weight.SCB is not None else getattr(module, "state", weight)
            parts = [owner.SCB]
        else:
            continue
        seen.add(id(weight))
        yield weight, [part for part in parts if isinstance(part, Tensor)]
