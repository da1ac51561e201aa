"""The blocks contain every weight of the base once, under names that a reader knows."""

import pytest

from tests.support.models import ARCHITECTURES, build
from zofo.errors import UserError
from zofo.smoothness.blocks import blocks_of, layer_of, type_of


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("split", ["layer", "type"])
def test_the_parts_are_the_base(architecture, split):
    blocks = blocks_of(build(architecture, "lora"), split)
    parts = [block for block in blocks.values() if block.is_part]
    assert sum(block.num_parameters for block in parts) == blocks["base"].num_parameters
    tensors = dict(zip(blocks["base"].parameters, blocks["base"].tensors, strict=True))
    for block in parts:
        assert {n: tensors[n] for n in block.parameters} == dict(
            zip(block.parameters, block.tensors, strict=True)
        )
    assert len(parts) > 2
    if split == "layer":
        assert list(blocks)[2:5] == ["embeddings", "layer 0", "layer 1"]


def test_names():
    assert layer_of("model.layers.12.mlp.up_proj.weight") == "layer 12"
    assert layer_of("transformer.h.3.attn.c_attn.weight") == "layer 3"
    assert layer_of("encoder.block.0.layer.0.SelfAttention.q.weight") == "encoder layer 0"
    assert layer_of("model.norm.weight") == "rest"
    assert type_of("model.layers.12.mlp.up_proj.weight") == "mlp.up_proj"
    assert type_of("bert.encoder.layer.3.attention.output.dense.bias") == "attention.output.dense"
    assert type_of("bert.encoder.layer.3.output.LayerNorm.bias") == "norms"
    assert type_of("transformer.h.3.ln_1.weight") == "norms"
    assert type_of("model.embed_tokens.weight") == "embeddings"


def test_without_adapter_there_is_none():
    assert list(blocks_of(build("llama", None))) == ["base"]
    with pytest.raises(UserError, match="layer"):
        blocks_of(build("llama"), "head")  # type: ignore[arg-type]
