"""Initial values of prompts and prefixes: embeddings and activations of real tokens.

This is the setup of the paper (arXiv 2604.09940). At first, a decoder then computes the same as if
the text stood before the input. The prefix of an encoder holds the keys and values that the text
has alone. The prefix of an encoder-decoder keeps random values, because peft shares it between the
decoder layers i and i + L / 2 of L layers.
"""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor, nn

from zofo.errors import UserError


@torch.no_grad()
def set_initial_values(
    model: Any, type: str, num: int, *, tokenizer: Any = None, init_text: str | None = None
) -> None:
    """Initialize a prompt or a prefix in place; weights on the meta device stay as they are.

    Args:
        model: the `PeftModel`.
        type: "prefix" or "prompt".
        num: its length in tokens.
        tokenizer: the tokenizer of the model, which `init_text` needs.
        init_text: initial text, repeated or cut to the length; None for random tokens.

    Raises:
        UserError: if the text holds no token, or there is no tokenizer for it.
    """
    import peft

    base = model.get_base_model()
    embeddings = base.get_input_embeddings()
    ids = _tokens(embeddings.weight.shape[0], num, tokenizer, init_text)
    if embeddings.weight.device.type == "meta":
        return
    ids = ids.to(embeddings.weight.device)
    if type == "prompt":
        # The module is called, because some embeddings scale the rows of their weight (Gemma 3).
        model.prompt_encoder[model.active_adapter].embedding.weight.copy_(embeddings(ids))
        return
    was_training = model.training
    model.eval()
    try:
        cache = _keys_and_values(base, ids[None])
    finally:
        model.train(was_training)
    if cache is not None:
        peft.initialize_kv_prefix_from_past_key_values(model, past_key_values=cache)


def _tokens(num_known: int, num: int, tokenizer: Any, init_text: str | None) -> Tensor:
    """The initial tokens on the CPU, whatever torch's default device is: int64 [num]."""
    if init_text is None:
        return torch.randint(num_known, (num,), device="cpu")
    if tokenizer is None:
        raise UserError("init_text needs a tokenizer")
    found = tokenizer(init_text, add_special_tokens=False)["input_ids"]
    if not found:
        raise UserError("init_text holds no token; give some words")
    return torch.tensor((found * (num // len(found) + 1))[:num], device="cpu")


def _keys_and_values(base: nn.Module, ids: Tensor) -> Any:
    """The keys and values of the tokens in every layer; None for encoder-decoders."""
    from transformers import DynamicCache

    config: Any = base.config
    if getattr(config, "is_encoder_decoder", False):
        return None
    if takes(base, "past_key_values"):
        return base(input_ids=ids, use_cache=True).past_key_values
    # An encoder creates no cache itself, but it fills a cache that it is given.
    cache = DynamicCache()
    base.base_model(input_ids=ids, past_key_values=cache)  # type: ignore[operator]
    return cache if len(cache) else None


def takes(module: Any, name: str) -> bool:
    """Whether a module's forward has an argument of that name."""
    return name in inspect.signature(module.forward).parameters
