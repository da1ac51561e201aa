"""What a model can read: the number of token ids that it knows, and of positions."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from typing import Any, Final

from torch import nn

_POSITIONS: Final = re.compile(r"^(wpe|.*pos(ition)?s?_?emb.*|.*emb.*_pos(ition)?s?)$")


@dataclass(frozen=True)
class Limits:
    """Limits of a model; None if it has none, or if it does not tell.

    Attributes:
        num_tokens: rows of the embedding; every token id is smaller.
        positions: most positions of a sequence, with the adapter's virtual tokens.
        is_hard: the positions are rows of a table; without a table the model only saw no more.
        virtual: virtual tokens of the adapter.
    """

    num_tokens: int | None
    positions: int | None
    is_hard: bool
    virtual: int


def limits_of(model: Any) -> Limits:
    """The limits of a model, with or without an adapter."""
    declared = getattr(model.config, "max_position_embeddings", None)
    if declared is None and hasattr(model.config, "get_text_config"):
        declared = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    # A smaller table belongs to another part of the model, such as its view of pictures. A table
    # that counts from behind the padding token has as many rows more.
    tables = [
        module.num_embeddings - (0 if module.padding_idx is None else module.padding_idx + 1)
        for name, module in model.named_modules()
        if isinstance(module, nn.Embedding)
        and _POSITIONS.match(name.rpartition(".")[2])
        and module.num_embeddings >= (declared or math.inf)
    ]
    positions = None if declared is None else min([*tables, declared])
    adapter = getattr(model, "active_peft_config", None) if hasattr(model, "peft_config") else None
    virtual = getattr(adapter, "num_virtual_tokens", None) or 0
    return Limits(_num_tokens(model), positions, bool(tables), int(virtual))


def _num_tokens(model: Any) -> int | None:
    try:
        embedding = model.get_input_embeddings()
    except (AttributeError, NotImplementedError):  # models whose embedding is no module
        return None
    weight = getattr(embedding, "weight", None)
    num = getattr(embedding, "num_embeddings", None if weight is None else len(weight))
    return None if num is None else int(num)
