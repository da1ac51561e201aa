"""Builds the model of a benchmark and its batch.

Time and memory do not depend on the values of the weights, so `random:SIZE` builds an untrained
Llama directly on the device, without a download.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from zofo.bench.settings import RANDOM, Settings
from zofo.errors import UserError


@dataclass(frozen=True)
class ModelFacts:
    """Sizes of a model."""

    num_parameters: int
    num_adapter_parameters: int
    base_bytes: int
    largest_layer_bytes: int  # largest sum of a module's own weights, without its submodules


def model_facts(settings: Settings) -> ModelFacts:
    """The sizes of the model, without loading its weights.

    Raises:
        UserError: if it cannot be found, is no decoder, or takes fewer tokens per row.
    """
    from zofo.models.adapters import create_adapter
    from zofo.models.loading import empty_model
    from zofo.models.quantized import num_weights, quantized_bytes
    from zofo.optim.blocks import split_parameters

    if settings.model.startswith("random:"):
        model = _random_model(settings.model, settings.dtype, "meta")
    else:
        model = empty_model(
            settings.model, dtype=settings.dtype, quantization=settings.quantization
        )
    longest = getattr(model.config, "max_position_embeddings", None)
    if longest is not None and settings.length > longest:
        raise UserError(
            f"length is {settings.length}; {settings.model} takes at most {longest} tokens"
        )
    layers = [
        sum(p.numel() * p.element_size() for p in module.parameters(recurse=False))
        for module in model.modules()
    ]
    base = list(model.parameters())
    num_bytes = sum(p.nbytes for p in base) + quantized_bytes(model).scales
    with torch.device("meta"):
        adapter = split_parameters(create_adapter(model, settings.adapter)).adapter
    return ModelFacts(
        num_weights(model, base),
        sum(p.numel() for p in adapter.values()),
        num_bytes,
        max(layers),
    )


class Workbench:
    """A model with and without adapter, over the same base weights, and one batch."""

    def __init__(self, settings: Settings) -> None:
        from zofo.models.loading import load_model

        self.settings = settings
        self.device = torch.device(settings.device)
        if settings.model.startswith("random:"):
            model = _random_model(settings.model, settings.dtype, settings.device)
        else:
            model, _ = load_model(
                settings.model,
                dtype=settings.dtype,
                quantization=settings.quantization,
                device=settings.device,
            )
        self.plain: Any = model.to(self.device).train()
        generator = torch.Generator().manual_seed(0)
        shape = (settings.batch, settings.length)  # [rows, tokens]
        ids = torch.randint(self.plain.config.vocab_size, shape, generator=generator)
        ids = ids.to(self.device)
        self.batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}

    @cached_property
    def adapted(self) -> Any:
        """A second tree of modules, with an adapter, over the parameters of `plain`."""
        from zofo.models.adapters import create_adapter

        # The memo of deepcopy maps each tensor to itself, so that only the modules are copied.
        shared: list[Any] = [*self.plain.parameters(), *self.plain.buffers()]
        for module in self.plain.modules():  # bitsandbytes keeps scales beside the weights.
            held = (getattr(module, name, None) for name in ("quant_state", "state"))
            shared += [state for state in held if state is not None]
        tree = copy.deepcopy(self.plain, {id(tensor): tensor for tensor in shared})
        return create_adapter(tree, self.settings.adapter).to(self.device).train()

    @property
    def base(self) -> list[nn.Parameter]:
        """The weights of the base, each tied weight once; of quantised ones codes and scales."""
        from zofo.optim.blocks import split_parameters

        return list(split_parameters(self.plain).base.values())

    @property
    def adapter(self) -> list[nn.Parameter]:
        """The weights of the adapter."""
        from zofo.optim.blocks import split_parameters

        return list(split_parameters(self.adapted).adapter.values())

    def loss(self, model: nn.Module) -> Tensor:
        """The loss of the batch: shape []."""
        return model(**self.batch).loss

    def row_shares(self, model: nn.Module) -> Tensor:
        """Each row's share of the loss of the batch: shape [rows]."""
        from zofo.trainer.row_losses import row_shares

        # Without labels, the model does not compute its own loss, too.
        inputs = {key: value for key, value in self.batch.items() if key != "labels"}
        return row_shares(model, model(**inputs), self.batch["labels"])


def _random_model(name: str, dtype: str, device: str) -> Any:
    import transformers as hf

    from zofo.models.loading import DTYPES

    config = hf.LlamaConfig(
        **RANDOM[name.removeprefix("random:")],  # type: ignore[arg-type]
        tie_word_embeddings=True,
        use_cache=False,
        pad_token_id=0,
    )
    with torch.random.fork_rng(), torch.device(device):
        torch.manual_seed(0)
        return hf.AutoModelForCausalLM.from_config(config, dtype=DTYPES[dtype])
