"""Tiny untrained models of real architectures, with adapters and batches."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import cache

import peft
import torch
import transformers as hf
from torch import nn

VOCABULARY = 61
DECODERS: dict[str, Callable[[], nn.Module]] = {
    "llama": lambda: hf.LlamaForCausalLM(
        hf.LlamaConfig(
            vocab_size=VOCABULARY,
            hidden_size=16,
            intermediate_size=24,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=1,
            tie_word_embeddings=True,
            pad_token_id=0,
        )
    ),
    "opt": lambda: hf.OPTForCausalLM(
        hf.OPTConfig(
            vocab_size=VOCABULARY,
            hidden_size=16,
            ffn_dim=24,
            num_hidden_layers=2,
            num_attention_heads=2,
            max_position_embeddings=64,
            word_embed_proj_dim=16,
            dropout=0.1,
            pad_token_id=0,
        )
    ),
    "gpt2": lambda: hf.GPT2LMHeadModel(
        hf.GPT2Config(
            vocab_size=VOCABULARY,
            n_embd=16,
            n_layer=2,
            n_head=2,
            n_positions=64,
            bos_token_id=0,
            eos_token_id=0,
            pad_token_id=0,
        )
    ),
}
ENCODERS: dict[str, Callable[[], nn.Module]] = {
    "bert": lambda: hf.BertForSequenceClassification(
        hf.BertConfig(
            vocab_size=VOCABULARY,
            hidden_size=16,
            intermediate_size=24,
            num_hidden_layers=2,
            num_attention_heads=2,
            max_position_embeddings=64,
            num_labels=2,
        )
    ),
}
ARCHITECTURES = {**DECODERS, **ENCODERS}
LORA_TARGETS = {
    "llama": ["q_proj", "v_proj"],
    "opt": ["q_proj", "v_proj"],
    "gpt2": ["c_attn"],
    "bert": ["query", "value"],
}
ADAPTERS = ("lora", "prefix", "prompt")
CASES = [(a, b) for a in ARCHITECTURES for b in ADAPTERS]


def build(
    architecture: str,
    adapter: str | None = "lora",
    *,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    lora_dropout: float = 0.0,
) -> nn.Module:
    """Return a tiny model. The B of its LoRA is random, so that the adapter contributes."""
    # A copy takes half the time of a new model.
    return copy.deepcopy(_build(architecture, adapter, seed, dtype, lora_dropout))


@cache
def _build(
    architecture: str, adapter: str | None, seed: int, dtype: torch.dtype, lora_dropout: float
) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = ARCHITECTURES[architecture]()
        model.config.use_cache = False
        model = model.to(dtype)
        if adapter is None:
            return model
        task = "SEQ_CLS" if architecture in ENCODERS else "CAUSAL_LM"
        if adapter == "lora":
            config = peft.LoraConfig(
                task_type=task,
                r=2,
                lora_alpha=4,
                lora_dropout=lora_dropout,
                target_modules=LORA_TARGETS[architecture],
                fan_in_fan_out=architecture == "gpt2",
                init_lora_weights=False,
            )
        elif adapter == "prefix":
            config = peft.PrefixTuningConfig(task_type=task, num_virtual_tokens=3)
        else:
            config = peft.PromptTuningConfig(task_type=task, num_virtual_tokens=3)
        return peft.get_peft_model(model, config)


def batch_for(architecture: str, *, seed: int = 1, rows: int = 3) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(1, VOCABULARY, (rows, 7), generator=generator)
    mask = torch.ones_like(ids)
    if architecture in ENCODERS:
        labels = torch.randint(0, 2, (rows,), generator=generator)
        return {"input_ids": ids, "attention_mask": mask, "labels": labels}
    return {"input_ids": ids, "attention_mask": mask, "labels": ids.clone()}


def loss_of(model: nn.Module, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    return model(**batch).loss


def bits(model: nn.Module) -> dict[str, torch.Tensor]:
    """Return a copy of every parameter."""
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def assert_same_bits(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> None:
    assert a.keys() == b.keys()
    for name in a:
        assert torch.equal(a[name], b[name]), name


def enliven(model: nn.Module) -> None:
    """Add noise to all weights: new models of transformers say nearly the same to every prompt."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator))
