"""What a model can read: the number of token ids that it knows, and of positions."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any, Final

import torch
from torch import nn

_POSITIONS: Final = re.compile(r"^(wpe|.*pos(ition)?s?_?emb.*|.*emb.*_pos(ition)?s?)$")


@dataclass(frozen=True)
class Limits:
    """Limits of a model; None if it has none, or if it does not tell.

    Attributes:
        num_tokens: rows of the embedding; every token id is smaller.
        positions: most positions of a sequence, with the adapter's virtual tokens.
        is_hard: the positions are rows of a table; else the model may only have seen no more.
        virtual: virtual tokens of the adapter.
    """

    num_tokens: int | None
    positions: int | None
    is_hard: bool
    virtual: int


def limits_of(model: Any) -> Limits:
    """The limits of a model, with or without an adapter."""
    text = model.config.get_text_config() if hasattr(model.config, "get_text_config") else None
    names = ("max_position_embeddings", "max_encoder_position_embeddings", "max_seq_len")
    found = [getattr(c, name, None) for c in (model.config, text) for name in names]
    declared = next((n for n in found if isinstance(n, int) and n > 0), None)
    tables = [] if declared is None else _tables(model, declared)
    positions = None if declared is None else min([*tables, declared])
    adapter = getattr(model, "active_peft_config", None) if hasattr(model, "peft_config") else None
    virtual = getattr(adapter, "num_virtual_tokens", None) or 0
    return Limits(_num_tokens(model), positions, bool(tables), int(virtual))


@torch.no_grad()
def can_read(model: Any, num_tokens: int, num_outputs: int = 0) -> bool | None:
    """Whether the model runs on one row of a length; None if that cannot be tried.

    Some models keep their positions outside modules (CTRL, MPT), and some take further ones from
    the last (ProphetNet), so only a run shows it. On a GPU, a failure would end the process.

    Args:
        model: the model with or without an adapter.
        num_tokens: tokens of the input, without the adapter's virtual ones.
        num_outputs: tokens that the decoder of an encoder-decoder writes.
    """
    # bitsandbytes packs 4-bit weights irreversibly when they are evaluated without gradients.
    is_quantized = getattr(model, "is_quantized", False)
    if is_quantized or any(p.device.type != "cpu" for p in model.parameters()):
        return None
    # Padding would take no position.
    padding = {model.config.pad_token_id, getattr(_embedding(model), "padding_idx", None)}
    token = min({0, 1, 2} - padding)
    ids = torch.full((1, num_tokens), token)  # [rows, tokens]
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    if model.config.is_encoder_decoder:
        inputs["decoder_input_ids"] = torch.full((1, max(num_outputs, 1)), token)
    was_training = model.training
    model.eval()
    try:
        model(**inputs)
    except torch.OutOfMemoryError:
        return None
    except (IndexError, RuntimeError, ValueError):
        return False
    finally:
        model.train(was_training)
    return True


def _tables(model: nn.Module, declared: int) -> list[int]:
    """Positions of each table of positions, whether it is trained or fixed.

    A table with fewer rows than the model declares belongs to another part of it, such as its view
    of pictures. A table that counts from behind the padding token has as many rows more.
    """
    sizes = []
    for name, module in model.named_modules():
        table: Any = getattr(module, "weight", None)
        is_table = hasattr(module, "padding_idx") and isinstance(table, torch.Tensor)
        if is_table and _POSITIONS.match(name.rpartition(".")[2]):
            skipped = 0 if module.padding_idx is None else module.padding_idx + 1
            sizes.append((len(table), skipped))
        for buffer, values in module.named_buffers(recurse=False):
            if _POSITIONS.match(buffer) and values.dim() > 1:
                sizes.append((len(values), 0))
    return [rows - skipped for rows, skipped in sizes if rows >= declared]


def _embedding(model: Any) -> Any:
    """The module of the input embeddings; None if they are no module."""
    try:
        return model.get_input_embeddings()
    except (AttributeError, NotImplementedError):
        return None


def _num_tokens(model: Any) -> int | None:
    embedding = _embedding(model)
    weight = getattr(embedding, "weight", None)
    num = getattr(embedding, "num_embeddings", None if weight is None else len(weight))
    return None if num is None else int(num)
