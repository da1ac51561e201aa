"""A base that FSDP2 shards: the bits of the whole one, and shards as they were after any exit."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn import functional

from tests.support.groups import in_group
from tests.support.models import batch_for, build
from zofo.disk.files import fingerprint
from zofo.optim.blocks import split_parameters
from zofo.optim.methods import param_groups
from zofo.optim.optimizer import HybridOptimizer
from zofo.perturb.shards import Whole

ROWS = 6
DENSE = {"distribution": "rademacher"}
GAUSSIAN = {"distribution": "gaussian", "num_directions": 2, "estimator": "central"}
BY_ROWS = {"distribution": "rank-one", "directions_per_step": "rows"}


def shard(model, **kinds):
    """Shard each layer and the rest over all processes, as users do."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    for module in model.modules():
        if type(module).__name__ == "LlamaDecoderLayer":
            fully_shard(module, mesh=mesh, **kinds)
    return fully_shard(model, mesh=mesh, **kinds)


def whole_bits(weights):
    """Name -> digest of a weight, which is gathered from its shards."""
    return {name: fingerprint({"": weight}) for name, weight in Whole(weights).items()}


def run_of(model, *, rank=0, size=1, **options):
    """An optimizer, and a closure that returns the losses of this process's rows."""
    whole = batch_for("llama", rows=ROWS)
    part = ROWS // size
    batch = {key: value[rank * part : (rank + 1) * part] for key, value in whole.items()}
    method = "hybrid" if hasattr(model, "peft_config") else "zo-ft"
    optimizer = HybridOptimizer(
        param_groups(model, method, base_lr=1e-3, adapter_lr=1e-2, base_weight_decay=0.1),
        model,
        optimizer="AdamW",
        process_group=dist.group.WORLD if size > 1 else None,
        max_grad_norm=0.5,
        **options,
    )

    def shares():
        logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
        losses = functional.cross_entropy(
            logits[:, :-1].flatten(0, 1).float(),
            batch["labels"][:, 1:].flatten(),
            reduction="none",
        )
        return losses.view(part, -1).mean(1) / part

    return optimizer, shares


def train(adapter, dtype, options, num_steps=3, **kinds):
    """Train, sharded if there is a group; return the trajectory, the bits and the reports."""
    model = build("llama", adapter, dtype=dtype)
    rank, size = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    if size > 1:
        shard(model, **kinds)
    optimizer, shares = run_of(model, rank=rank, size=size, **options)
    reports = []
    for _ in range(num_steps):
        optimizer.step(shares)
        report = optimizer.last_step
        reports.append([report.loss, *report.projected_grad])
        reports[-1] += [report.grad_norm or 0.0, *report.update_norms.values()]
    original = optimizer.original_fingerprint() if adapter else ""
    return optimizer.trajectory, whole_bits(split_parameters(model).base), reports, original


@pytest.mark.parametrize(
    ("size", "adapter", "dtype", "options"),
    [
        (2, "lora", torch.float32, BY_ROWS),
        (3, None, torch.bfloat16, BY_ROWS),
        (3, "lora", torch.bfloat16, DENSE),
        (2, None, torch.float32, GAUSSIAN),
    ],
)
def test_the_sharded_base_has_the_bits_of_the_whole_one(size, adapter, dtype, options):
    trajectory, _, reports, original = train(adapter, dtype, options)
    found = in_group(size, train, adapter, dtype, options)
    assert all(process == found[0] for process in found)
    recorded, bits_there, reports_there, original_there = found[0]
    base = split_parameters(build("llama", adapter, dtype=dtype)).base
    recorded.replay(base)
    assert whole_bits(base) == bits_there
    assert recorded.rank_one == trajectory.rank_one
    assert original_there == original
    tolerance = 2e-2 if dtype == torch.float32 else 0.3
    torch.testing.assert_close(
        torch.tensor(reports_there), torch.tensor(reports), rtol=tolerance, atol=tolerance
    )
