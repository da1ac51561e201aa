"""No process holds the whole base in memory: neither to resume on shards, nor to export."""

import peft
import pytest
import torch
import torch.distributed as dist
import transformers as hf
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from tests.support.groups import in_group
from tests.support.hub_folders import make_tokenizer
from tests.support.memory import growth, needs_proc
from zofo.console import quiet
from zofo.disk.files import fingerprint
from zofo.optim.blocks import split_parameters
from zofo.optim.methods import param_groups
from zofo.optim.optimizer import HybridOptimizer
from zofo.optim.trajectory import GroupSpec, Trajectory, Update
from zofo.perturb.shards import Whole
from zofo.saved.artifact import BaseSpec, load, save_artifact
from zofo.saved.checkpoint import load_checkpoint, save_checkpoint
from zofo.saved.export import export_model

ADAPTERS = {
    "lora": lambda: peft.LoraConfig(task_type="CAUSAL_LM", r=2, init_lora_weights=False),
    "prompt": lambda: peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3),
}


def save_trained(folder, dtype, width, adapter="lora", stored=None):
    """Save a base, and an artefact and a checkpoint whose base has moved; the bytes of the base.

    The base is a tied decoder whose rows do not divide by three. Its files have the dtype `stored`.
    """
    tokenizer = make_tokenizer()
    config = hf.LlamaConfig(
        vocab_size=len(tokenizer) + 2,
        hidden_size=width,
        intermediate_size=2 * width + 2,
        num_hidden_layers=10,
        num_attention_heads=4,
        num_key_value_heads=4,
        tie_word_embeddings=True,
        eos_token_id=tokenizer.eos_token_id,
    )
    torch.manual_seed(0)
    hf.LlamaForCausalLM(config).to(stored or dtype).save_pretrained(folder / "base")
    tokenizer.save_pretrained(folder / "base")
    base = BaseSpec(str(folder / "base"), dtype=str(dtype).removeprefix("torch."))
    with quiet():
        model = peft.get_peft_model(base.load()[0], ADAPTERS[adapter]())
    optimizer = HybridOptimizer(param_groups(model, "hybrid", base_lr=1, adapter_lr=1), model)
    original = optimizer.original_fingerprint()
    moved = split_parameters(model).base
    groups = (GroupSpec(tuple(moved), tuple(range(len(moved)))),)
    updates = [(Update(step, (2.0,), 1e-2, 0.0),) for step in range(3)]
    trajectory = Trajectory(3, "rademacher", 1e-3, "forward", groups, updates)
    optimizer.trajectory = trajectory
    save_checkpoint(folder / "checkpoint", model, optimizer)
    save_artifact(
        folder / "artifact",
        model,
        base=base,
        method="hybrid",
        trajectory=trajectory,
        base_fingerprint=original,
    )
    return sum(p.numel() * p.element_size() for p in moved.values())


def bits(model):
    """Name -> digest of each whole weight."""
    blocks = split_parameters(model)
    weights = {**blocks.base, **blocks.adapter}
    return {name: fingerprint({"": weight}) for name, weight in Whole(weights).items()}


def resumed(folder):
    """The checkpoint on shards, as a loop resumes it."""
    with quiet():
        base = hf.AutoModelForCausalLM.from_pretrained(folder / "base")
    model = peft.get_peft_model(base, ADAPTERS["lora"]())
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    for layer in base.model.layers:
        fully_shard(layer, mesh=mesh)
    return load_checkpoint(fully_shard(model, mesh=mesh), folder / "checkpoint")


def resumed_there(small, large):
    """The bits of the large model, and the memory that resuming it took."""
    resumed(small)  # libraries take memory at their first call
    model, taken = growth(resumed, large)
    return bits(model), taken


@needs_proc
@pytest.mark.parametrize(
    ("dtype", "width"),
    [(torch.float32, 320), pytest.param(torch.bfloat16, 480, marks=pytest.mark.slow)],
)
def test_resuming_on_shards_takes_the_memory_of_shards(tmp_path, dtype, width):
    small, large = tmp_path / "small", tmp_path / "large"
    save_trained(small, dtype, 16)
    num_bytes = save_trained(large, dtype, width)
    expected = bits(load(large / "artifact").model)
    for found, taken in in_group(3, resumed_there, small, large):
        assert found == expected
        assert taken < num_bytes * 2 / 3, (taken, num_bytes)  # a third, and a few weights


@needs_proc
@pytest.mark.parametrize(
    ("adapter", "dtype", "width", "stored"),
    [
        ("prompt", torch.float32, 320, None),
        ("lora", torch.float32, 320, torch.bfloat16),
        pytest.param("lora", torch.bfloat16, 480, None, marks=pytest.mark.slow),
        pytest.param("lora", torch.float32, 320, None, marks=pytest.mark.slow),
        pytest.param("prompt", torch.bfloat16, 480, None, marks=pytest.mark.slow),
    ],
)
def test_an_export_takes_the_memory_of_few_weights(tmp_path, adapter, dtype, width, stored):
    small, large = tmp_path / "small", tmp_path / "large"
    save_trained(small, dtype, 16, adapter, stored)
    num_bytes = save_trained(large, dtype, width, adapter, stored)
    export_model(small / "artifact", tmp_path / "first")
    exported, taken = growth(export_model, large / "artifact", tmp_path / "plain")
    with quiet():
        found = hf.AutoModelForCausalLM.from_pretrained(exported.path)
        model = load(large / "artifact").model
        model = model.float().merge_and_unload() if exported.is_merged else model.base_model
    assert fingerprint(found.state_dict()) == fingerprint(model.to(dtype).state_dict())
    assert taken < num_bytes / 2, (taken, num_bytes)
    assert {path.name for path in tmp_path.iterdir()} == {"small", "large", "first", "plain"}
