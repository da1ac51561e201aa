"""Tiny untrained models of many architectures: two layers, width 16, no dropout."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import cache
from typing import Any, Final

import torch
import transformers as hf
from torch import nn

VOCABULARY: Final = 61
SHARED: Final[dict[str, Any]] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "max_position_embeddings": 64,
    "attention_dropout": 0.0,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
GROUPED: Final = {**SHARED, "num_key_value_heads": 1}
GEMMA: Final = {**GROUPED, "head_dim": 8, "sliding_window": 32, "query_pre_attn_scalar": 8}
ENCODER: Final[dict[str, Any]] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "max_position_embeddings": 64,
    "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0,
    "pad_token_id": 0,
}
T5: Final[dict[str, Any]] = {
    "vocab_size": VOCABULARY,
    "d_model": 16,
    "d_kv": 8,
    "d_ff": 24,
    "num_layers": 2,
    "num_heads": 2,
    "dropout_rate": 0.0,
    "pad_token_id": 0,
    "eos_token_id": 2,
    "decoder_start_token_id": 0,
}

DECODERS: Final[dict[str, Callable[[], Any]]] = {
    "llama": lambda: hf.LlamaConfig(**GROUPED, tie_word_embeddings=True),
    "mistral": lambda: hf.MistralConfig(**GROUPED),
    "qwen2": lambda: hf.Qwen2Config(**GROUPED),
    "qwen3": lambda: hf.Qwen3Config(**GROUPED, head_dim=8, tie_word_embeddings=True),
    "gemma": lambda: hf.GemmaConfig(**GROUPED, head_dim=8),
    "gemma2": lambda: hf.Gemma2Config(**GEMMA),
    "gemma3": lambda: hf.Gemma3TextConfig(**GEMMA),
    "phi": lambda: hf.PhiConfig(**SHARED, resid_pdrop=0.0, embd_pdrop=0.0),
    "opt": lambda: hf.OPTConfig(
        vocab_size=VOCABULARY,
        hidden_size=16,
        ffn_dim=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=64,
        word_embed_proj_dim=16,
        dropout=0.0,
        pad_token_id=0,
    ),
    # As in OPT-350m, the embeddings are narrower than the layers.
    "opt-350m": lambda: hf.OPTConfig(
        vocab_size=VOCABULARY,
        hidden_size=16,
        ffn_dim=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=64,
        word_embed_proj_dim=8,
        do_layer_norm_before=False,
        dropout=0.0,
        pad_token_id=0,
    ),
    "gpt2": lambda: hf.GPT2Config(
        vocab_size=VOCABULARY,
        n_embd=16,
        n_layer=2,
        n_head=2,
        n_positions=64,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    ),
    "gpt-neox": lambda: hf.GPTNeoXConfig(**SHARED, hidden_dropout=0.0),
}
ENCODERS: Final[dict[str, Callable[[], Any]]] = {
    "bert": lambda: hf.BertConfig(**ENCODER),
    "roberta": lambda: hf.RobertaConfig(**ENCODER),
    "deberta-v2": lambda: hf.DebertaV2Config(
        **ENCODER, pooler_dropout=0.0, pooler_hidden_size=16, cls_dropout=0.0
    ),
    # These are the settings of DeBERTa-v3.
    "deberta-v3": lambda: hf.DebertaV2Config(
        **ENCODER,
        pooler_dropout=0.0,
        pooler_hidden_size=16,
        cls_dropout=0.0,
        relative_attention=True,
        position_buckets=8,
        norm_rel_ebd="layer_norm",
        share_att_key=True,
        pos_att_type=["p2c", "c2p"],
        position_biased_input=False,
        max_relative_positions=-1,
    ),
}
SEQ2SEQ: Final[dict[str, Callable[[], Any]]] = {
    "t5": lambda: hf.T5Config(**T5),
    # As in T5 1.1 and Flan-T5, the layers are gated, the embeddings are untied, and the heads do
    # not add up to the width.
    "flan-t5": lambda: hf.T5Config(
        **{**T5, "num_heads": 3, "num_decoder_layers": 1},
        feed_forward_proj="gated-gelu",
        tie_word_embeddings=False,
    ),
    "bart": lambda: hf.BartConfig(
        vocab_size=VOCABULARY,
        d_model=16,
        encoder_ffn_dim=24,
        decoder_ffn_dim=24,
        encoder_layers=2,
        decoder_layers=2,
        encoder_attention_heads=2,
        decoder_attention_heads=2,
        max_position_embeddings=64,
        dropout=0.0,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        decoder_start_token_id=2,
        forced_eos_token_id=None,
    ),
}
STATE_SPACE: Final[dict[str, Any]] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "state_size": 4,
    "expand": 2,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
OTHERS: Final[dict[str, Callable[[], Any]]] = {
    "mamba": lambda: hf.MambaConfig(**STATE_SPACE),
    "mamba2": lambda: hf.Mamba2Config(
        **STATE_SPACE, num_heads=4, head_dim=8, n_groups=2, chunk_size=4
    ),
    "falcon-mamba": lambda: hf.FalconMambaConfig(**STATE_SPACE),
}
"""Decoders for which peft knows no adapters."""
ARCHITECTURES: Final = {**DECODERS, **ENCODERS, **SEQ2SEQ}


def head_of(architecture: str) -> Any:
    """Return the head that zofo gives to the architecture."""
    if architecture in ENCODERS:
        return "classification"
    return "seq2seq" if architecture in SEQ2SEQ else "causal-lm"


def bare(architecture: str, *, seed: int = 0, dtype: torch.dtype = torch.float32) -> nn.Module:
    """Return a model without adapter.

    Its weights are larger than usual, so that all of them matter.
    """
    return copy.deepcopy(_bare(architecture, seed, dtype))


@cache
def _bare(architecture: str, seed: int, dtype: torch.dtype) -> nn.Module:
    kinds: dict[str, Any] = {
        "causal-lm": hf.AutoModelForCausalLM,
        "classification": hf.AutoModelForSequenceClassification,
        "seq2seq": hf.AutoModelForSeq2SeqLM,
    }
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = kinds[head_of(architecture)].from_config(
            {**ARCHITECTURES, **OTHERS}[architecture]()
        )
        with torch.no_grad():
            for p in model.parameters():
                if p.ndim > 1:
                    p.mul_(4 / max(1.0, 5 * p.std().item()))
    model.config.use_cache = False
    return model.to(dtype)


def batch_for(architecture: str, *, seed: int = 1, rows: int = 3) -> dict[str, torch.Tensor]:
    """Return random rows of seven tokens. The last row is padded."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, VOCABULARY, (rows, 7), generator=generator)
    mask = torch.ones_like(ids)
    ids[-1, -2:] = mask[-1, -2:] = 0
    labels = ids.masked_fill(mask == 0, -100)
    if architecture in ENCODERS:
        labels = torch.randint(0, 2, (rows,), generator=generator)
    if architecture in SEQ2SEQ:
        labels = torch.randint(3, VOCABULARY, (rows, 4), generator=generator)
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}
