"""The scales of quantised layers (bitsandbytes), which move where the codes cannot.

    4 bits    W[i] = code[q[i]] · absmax[i // blocksize]      elements of W counted row by row
    int8      W[i, j] = q[i, j] · SCB[i] / 127

The codes q stay as they are. The scales are float32, one for a block or a row, and a step moves
them as any other weight. Layers differ in the size of their weights. So the scales of each have a
unit, in which directions are measured: W = (s + eps · unit · v) ⊙ q. It is proportional to the mean
of the scales before training. One eps and one learning rate therefore mean the same relative change
in every layer. The unit of a layer of average size is 1, so that both have the magnitude that they
have for a base in floating point. Units are powers of two, so products with them are exact.
"""

from __future__ import annotations

import copy
import math
import sys
from collections.abc import Collection, Iterator
from typing import Any, Final

import torch
from torch import Tensor, nn

from zofo.errors import UserError

_KEPT: Final = "zofo_scales"
"""Attribute of bitsandbytes' state of a layer, which keeps the `Scales` of the layer."""


class Scales(nn.Parameter):
    """The scales of one quantised weight: float32, in the memory that the layer reads.

    Shape [out, in / blocksize] in 4 bits, or [blocks] if a block crosses the end of a row, and
    [out, 1] in int8.
    """

    unit: float | None = None  # a power of two; None before `give_units`

    def __deepcopy__(self, memo: dict[int, Any]) -> Scales:
        copied = Scales(self.detach().clone(), requires_grad=False)
        copied.unit = self.unit
        return memo.setdefault(id(self), copied)


def give_units(scales: Collection[Scales]) -> None:
    """Give units to the scales of a model that have none yet."""
    if all(one.unit is not None for one in scales):
        return
    exponents = [_exponent(one) for one in scales]
    average = round(sum(exponents) / len(exponents))
    for one, exponent in zip(scales, exponents, strict=True):
        if one.unit is None:
            one.unit = 2.0 ** (exponent - average)


def unit_of(weight: Tensor) -> float:
    """The unit in which directions of a weight are measured: 1 unless it holds scales."""
    return weight.unit or 1.0 if isinstance(weight, Scales) else 1.0


def is_quantized(parameter: nn.Parameter) -> bool:
    """Whether a parameter holds quantised weights."""
    # A floating dtype proves nothing: bitsandbytes may store 4 bits in one, torchao reports one.
    return (
        not parameter.is_floating_point()
        or hasattr(parameter, "quant_state")
        or type(parameter.data).__module__.startswith("torchao.")
    )


def has_codes(model: nn.Module) -> bool:
    """Whether a model has quantised weights."""
    return any(map(is_quantized, model.parameters()))


def has_moving_scales(module: nn.Module) -> bool:
    """Whether a module is a linear layer of bitsandbytes in 4 bits or int8."""
    found: Any = sys.modules.get("bitsandbytes")
    if found is None:
        return False
    if isinstance(module, found.nn.Linear8bitLt):
        return not module.state.has_fp16_weights and module.weight.dtype == torch.int8
    is_4_bit = isinstance(module, found.nn.Linear4bit)
    return is_4_bit and getattr(module.weight, "quant_state", None) is not None


def places_of(module: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """The parameters that a module holds itself, and the scales of its quantised weight.

    The scales have the names that a bitsandbytes folder gives them: `weight.absmax` and `SCB`.
    """
    for name, parameter in module._parameters.items():
        if parameter is not None:
            yield name, parameter
    if not has_moving_scales(module):
        return
    state, key = _state_of(module)
    present = getattr(state, key)
    name = key if key == "SCB" else f"weight.{key}"
    if getattr(state, "nested", False):
        for part, tensor in ((name, present), ("weight.nested_absmax", state.state2.absmax)):
            yield part, nn.Parameter(tensor, requires_grad=False)
        return
    kept = vars(state).get(_KEPT)
    if kept is None or kept.data_ptr() != present.data_ptr():
        # The layer was copied or moved to a device. A moved base keeps the unit of its beginning.
        unit = None if kept is None else kept.unit
        kept = Scales(_as_matrix(present.detach(), module), requires_grad=False)
        kept.unit = unit
        setattr(state, _KEPT, kept)
    yield name, kept


def scales_in(module: nn.Module) -> Tensor:
    """The scales that the layer reads now, as a flat tensor."""
    state, key = _state_of(module)
    present: Tensor = getattr(state, key)
    return present


def put_scales(module: nn.Module, scales: Tensor) -> None:
    """Let the layer read other scales, such as perturbed ones."""
    state, key = _state_of(module)
    setattr(state, key, scales.detach().view(-1))


def unnest_scales(model: nn.Module) -> int:
    """Store the scales of double quantisation in float32, where they can move.

    The layers compute the same bits as before.

    Returns:
        The additional bytes of the scales; 0 if no scales were nested.
    """
    import importlib

    added = 0
    layers: list[Any] = [m for m in model.modules() if has_moving_scales(m)]
    for module in layers:
        state = _state_of(module)[0]
        if not getattr(state, "nested", False):
            continue
        dequantize = importlib.import_module("bitsandbytes.functional").dequantize_blockwise
        before = state.absmax.nbytes + state.state2.absmax.nbytes
        state.absmax = (dequantize(state.absmax, state.state2) + state.offset).float()
        state.offset = state.state2 = None
        state.nested = module.weight.compress_statistics = False
        added += state.absmax.nbytes - before
    config: Any = getattr(getattr(model, "config", None), "quantization_config", None)
    if added and getattr(config, "bnb_4bit_use_double_quant", False):
        config.bnb_4bit_use_double_quant = False
    return added


def num_codes(module: Any) -> int:
    """The number of codes whose product `product_of_codes` computes: 0 in int8."""
    return 0 if hasattr(module, "state") else math.prod(module.weight.quant_state.shape)


def product_of_codes(module: Any, x: Tensor, y: Tensor, b: Tensor) -> Tensor:
    """The product of the codes with an input whose groups change their signs: q (b' ⊙ x).

    Args:
        module: a quantised layer.
        x: its input, [rows, places, in].
        y: its output for this input, [rows, places, out], which int8 divides by the scales.
        b: the signs of the groups, float32 [rows, groups].

    Returns:
        [rows, places, out].
    """
    if hasattr(module, "state"):  # int8
        bias = 0 if module.bias is None else module.bias
        return (y - bias) / module.state.SCB * b[:, None].to(y.dtype)
    import bitsandbytes

    state = copy.copy(module.weight.quant_state)
    state.absmax = torch.ones_like(state.absmax)
    signs = b.repeat_interleave(state.blocksize, dim=1)[:, None]  # [rows, 1, in]
    flipped = (x * signs.to(x.dtype)).to(module.compute_dtype or x.dtype)
    product: Tensor = bitsandbytes.matmul_4bit(flipped, module.weight, quant_state=state)
    return product


def check_in_place(module: nn.Module, scales: Tensor, path: str) -> None:
    """Check that a layer still reads the scales that the optimizer moves.

    Raises:
        UserError: if the model was moved to another device, or loaded anew, in the meantime.
    """
    if scales_in(module).data_ptr() != scales.data_ptr():
        raise UserError(
            f"the layer reads other scales than the optimizer moves as {path}, as after "
            "model.to(device) or load_state_dict; make the optimizer afterwards"
        )


def _state_of(module: Any) -> tuple[Any, str]:
    """The object that holds the scales of a layer, and the attribute that does."""
    if hasattr(module, "state"):  # int8
        if module.weight.CB is not None:
            module.init_8bit_state()  # as the layer's first forward does
        return module.state, "SCB"
    return module.weight.quant_state, "absmax"


def _as_matrix(scales: Tensor, module: Any) -> Tensor:
    if hasattr(module, "state"):
        return scales.view(-1, 1)
    rows = module.weight.quant_state.shape[0]
    is_matrix = module.weight.quant_state.shape[1] % module.weight.quant_state.blocksize == 0
    return scales.view(rows, -1) if is_matrix else scales.view(-1)


def _exponent(scales: Tensor) -> int:
    mean = 1.0 if scales.is_meta else float(scales.double().abs().mean())
    return round(math.log2(mean)) if 0 < mean < math.inf else 0
