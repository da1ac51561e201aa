"""Tiny decoders in 4 bits and int8, made by bitsandbytes as users load them."""

from __future__ import annotations

import logging

import pytest
import torch
import transformers as hf

from tests.support.models import VOCABULARY

KINDS = {
    "nf4": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"},
    "nested": {
        "load_in_4bit": True,
        "bnb_4bit_quant_type": "nf4",
        "bnb_4bit_use_double_quant": True,
    },
    "fp4": {"load_in_4bit": True, "bnb_4bit_quant_type": "fp4"},
    "stored as floats": {"load_in_4bit": True, "bnb_4bit_quant_storage": torch.float32},
    "int8": {"load_in_8bit": True},
}


def plain_decoder(folder, *, width=64, tied=True):
    """Write a Llama, whose blocks of 64 scales cross the rows if `width` is no multiple of 64."""
    size = {"hidden_size": width, "intermediate_size": 2 * width, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 2, "tie_word_embeddings": tied}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        config = hf.LlamaConfig(vocab_size=VOCABULARY, pad_token_id=0, **size, **heads)
        model = hf.LlamaForCausalLM(config)
    for name, parameter in model.named_parameters():  # Layers differ, as those of real models do.
        factor = 4 if "layers.1" in name else 0.5 if "down_proj" in name else 1
        parameter.data.mul_(1 if "norm" in name else factor)
    model.save_pretrained(folder)
    return folder


def load_quantized(folder, kind):
    """Load a folder quantised."""
    pytest.importorskip("bitsandbytes")
    logging.getLogger("bitsandbytes.autograd._functions").setLevel(logging.ERROR)
    given = dict(KINDS[kind])
    if "load_in_4bit" in given:
        given["bnb_4bit_compute_dtype"] = torch.float32
    model = hf.AutoModelForCausalLM.from_pretrained(
        folder,
        quantization_config=hf.BitsAndBytesConfig(**given),
        dtype=torch.float32,
        device_map={"": "cpu"},
    )
    model.config.use_cache = False
    return model
