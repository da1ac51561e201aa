"""The blocks that are measured: base, adapter, and parts of the base by layer or type of module.

[ H_xx  H_xy ]      the block of a part has the rows and columns of the part in H_xx
[ H_yx  H_yy ]
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Final, Literal, get_args

from torch import nn

from zofo.config.schema import RunConfig
from zofo.errors import UserError
from zofo.models.loading import read_model_config, resolve
from zofo.models.quantized import stored_quantization
from zofo.optim.blocks import is_quantized, split_parameters

Split = Literal["none", "layer", "type"]
SPLITS: Final[tuple[str, ...]] = get_args(Split)
# The names that transformers gives to the list of layers, such as `model.layers.3.` or `h.3.`.
_LAYER: Final = re.compile(r"(?:^|\.)(layers?|h|blocks?|block)\.(\d+)\.")

_NO_DERIVATIVES: Final = (
    "the base is quantised ({}), and a loss has no derivatives in codes; leave model.quantization "
    "out, or name a model that is not quantised"
)


@dataclass(frozen=True)
class Block:
    """A set of parameters.

    Attributes:
        name: "base", "adapter", or the name of a part of the base.
        parameters: canonical name -> parameter.
        tensors: direction indices of the parameters, in the same order.
        is_part: whether the block is a part of the base.
    """

    name: str
    parameters: dict[str, nn.Parameter]
    tensors: tuple[int, ...]
    is_part: bool = False

    @property
    def num_parameters(self) -> int:
        """Number of weights in the block."""
        return sum(p.numel() for p in self.parameters.values())


def blocks_of(model: nn.Module, split: Split = "none") -> dict[str, Block]:
    """Name -> block: the base, the adapter if there is one, then the parts of the base.

    Args:
        model: the model with its adapter attached.
        split: "none": no parts. "layer": the embeddings with the output matrix, each layer, and the
            rest. "type": modules with the same place in all layers form one part.

    Raises:
        UserError: if `split` is unknown, or the base is quantised.
    """
    if split not in SPLITS:
        raise UserError(f"split is {split!r}; choose one of {', '.join(SPLITS)}")
    found = split_parameters(model)
    for name, parameter in found.base.items():
        if is_quantized(parameter):
            raise UserError(_NO_DERIVATIVES.format(name))
    names = sorted(found.base)
    parts: dict[str, list[str]] = {}
    for name in names if split != "none" else ():
        parts.setdefault(layer_of(name) if split == "layer" else type_of(name), []).append(name)
    members = {"base": names} | ({"adapter": sorted(found.adapter)} if found.adapter else {})
    members |= {part: parts[part] for part in sorted(parts, key=_in_reading_order)}
    parameters = {**found.base, **found.adapter}
    index = {**found.base_index, **found.adapter_index}
    return {
        block: Block(
            block,
            {n: parameters[n] for n in inside},
            tuple(index[n] for n in inside),
            is_part=block in parts,
        )
        for block, inside in members.items()
    }


def require_derivatives(config: RunConfig) -> None:
    """Refuse a configuration of a quantised base before anything is loaded.

    Raises:
        UserError: if the configuration, or the folder that it names, quantises the base.
    """
    model = config.model
    stored = model.quantization or stored_quantization(
        read_model_config(
            resolve(model.name),
            model.name,
            revision=model.revision,
            trust_remote_code=model.trust_remote_code,
            attn_implementation="eager",  # No model is built here, so none is looked for.
        )
    )
    if stored is not None:
        raise UserError(_NO_DERIVATIVES.format(stored))


def layer_of(name: str) -> str:
    """The layer of a base parameter: "layer 3", "decoder layer 3", "embeddings", "rest"."""
    found = _LAYER.search(name)
    if found is None:
        return "embeddings" if _is_embedding(name) else "rest"
    # T5 has two stacks whose layers have the same numbers.
    stack = next((s for s in ("encoder", "decoder") if f"{s}.block." in f".{name}"), "")
    return f"{stack} layer {found.group(2)}".strip()


def type_of(name: str) -> str:
    """The place of a base parameter within its layer: "self_attn.q_proj", "norms", ..."""
    found = _LAYER.search(name)
    module = (name[found.end() :] if found else name).rpartition(".")[0]
    if "norm" in module.lower() or re.search(r"(^|\.)ln_\w+$", module):
        return "norms"
    if found is None:
        return "embeddings" if _is_embedding(name) else "rest"
    return module or "rest"


def _is_embedding(name: str) -> bool:
    # An embedding that is tied to the output matrix has the name of the output matrix.
    return bool(re.search(r"embed|(^|\.)(wte|wpe|shared|lm_head)\.", name))


def _in_reading_order(part: str) -> tuple[int, str, int]:
    number = re.search(r"\d+$", part)  # layer 2 comes before layer 10
    place = {"embeddings": 0, "rest": 2}.get(part, 1)
    return (place, part.rstrip("0123456789"), int(number.group()) if number else 0)
