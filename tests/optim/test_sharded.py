"""A base that FSDP2 shards: the bits of the whole one, and shards as they were after any exit."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import (
    CPUOffloadPolicy,
    FullyShardedDataParallel,
    MixedPrecisionPolicy,
    fully_shard,
)
from torch.distributed.tensor import Shard, distribute_tensor
from torch.distributed.tensor.debug import CommDebugMode
from torch.nn import functional

from tests.support.groups import in_group
from tests.support.models import assert_same_bits, batch_for, build
from zofo.disk.files import fingerprint, read_tensors
from zofo.errors import UserError
from zofo.optim.blocks import split_parameters
from zofo.optim.methods import param_groups
from zofo.optim.optimizer import HybridOptimizer
from zofo.optim.trajectory import TRAJECTORY_FILE, Trajectory
from zofo.perturb.shards import Whole, is_sharded, local_part
from zofo.perturb.view import Perturbation
from zofo.saved.artifact import BaseSpec, save_artifact
from zofo.saved.checkpoint import load_checkpoint, save_checkpoint

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
        (3, None, torch.bfloat16, DENSE),
        pytest.param(3, "lora", torch.bfloat16, BY_ROWS, marks=pytest.mark.slow),
        pytest.param(2, None, torch.float32, GAUSSIAN, marks=pytest.mark.slow),
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


class Reader(nn.Module):
    """A model with each way to read: lookup, side path, norm, a child's weight, tiles, a tie."""

    def __init__(self, rows=13):
        super().__init__()
        self.embed = nn.Embedding(rows, 8)
        self.norm = nn.LayerNorm(8)
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.read = nn.Linear(8, 5)
        self.small = nn.Linear(5, 2)  # on three processes, the last shard is empty
        self.back = nn.Linear(2, 8)
        self.head = nn.Linear(8, rows, bias=False)
        self.head.weight = self.embed.weight
        self.tiled = nn.Linear(8, 4100, bias=False)
        self.large = nn.Linear(8, 4100)

    def forward(self, ids):
        x = self.norm(self.embed(ids))
        x = x + self.attention(x, x, x)[0]
        x = functional.linear(x, self.read.weight, self.read.bias)  # without a call of the module
        x = self.back(self.small(x))
        return self.head(x).logsumexp(-1).mean() + (self.tiled(x) * self.large(x)).mean()


def leaves(model, mesh):
    """Each leaf is a unit of its own; the tied pair is one unit of two modules."""
    for module in (model.norm, model.attention, model.small, model.back, model.tiled):
        fully_shard(module, mesh=mesh)
    fully_shard([model.embed, model.head], mesh=mesh)
    fully_shard(model, mesh=mesh)


def root_only(model, mesh):
    fully_shard(model, mesh=mesh, reshard_after_forward=True)


def offloaded(model, mesh):
    fully_shard(model.tiled, mesh=mesh, offload_policy=CPUOffloadPolicy(pin_memory=False))
    fully_shard(model, mesh=mesh, offload_policy=CPUOffloadPolicy(pin_memory=False))


def replicated(model, mesh):
    wide = init_device_mesh("cpu", (mesh.size(), 1), mesh_dim_names=("copies", "rows"))
    fully_shard(model, mesh=wide)


def lowered(model, mesh):
    fully_shard(model, mesh=mesh, mp_policy=MixedPrecisionPolicy(param_dtype=torch.bfloat16))


CASES = [
    *(("rademacher", units) for units in (leaves, root_only, offloaded, replicated, lowered)),
    *(("rank-one", units) for units in (leaves, lowered)),
    ("gaussian", leaves),
]


def reader(shard_units=None):
    """A model, and its input."""
    torch.manual_seed(0)
    model = Reader()
    # The sharded weights stay in float32, and their forward is that of a bfloat16 model.
    return model.bfloat16() if shard_units is lowered else model, torch.arange(12).view(3, 4)


def perturbed(model, ids, distribution):
    """The losses along two directions, one of them twice, and the kinds of directions."""
    blocks = split_parameters(model)
    view = Perturbation(
        model,
        list(blocks.base.values()),
        [blocks.base_index[name] for name in blocks.base],
        seed=1,
        distribution=distribution,
    )
    with torch.no_grad():
        losses = [
            float(view.value_at(lambda: model(ids), 0.1, step=3, direction=k)) for k in (0, 1, 0)
        ]
    return losses, sorted(view.rank_one)


def perturbed_there():
    """For each case: losses, kinds, and whether the shards kept their bits."""
    found = []
    for distribution, shard_units in CASES:
        model, ids = reader()
        shard_units(model, init_device_mesh("cpu", (dist.get_world_size(),)))
        before = shards(model)
        losses = perturbed(model, ids, distribution)
        found.append((*losses, same(before, shards(model))))
    return found


def shards(model):
    """Name -> a copy of this process's shard, which must be what the module holds."""
    assert all(map(is_sharded, model.parameters()))
    return {name: local_part(p)[0].clone() for name, p in model.named_parameters()}


def same(before, after):
    return all(torch.equal(before[name], after[name]) for name in before)


def test_a_perturbed_forward_has_the_bits_of_the_whole_model():
    expected = [(*perturbed(*reader(units), kind), True) for kind, units in CASES]
    for found in in_group(3, perturbed_there):
        assert found == expected


def interrupted(options):
    """Fail in the middle of a perturbed and of an unperturbed forward, then go on."""
    model = build("llama", "lora")
    shard(model)
    layer = next(m for m in model.modules() if type(m).__name__ == "LlamaMLP")
    optimizer, shares = run_of(model, rank=dist.get_rank(), size=dist.get_world_size(), **options)
    optimizer.step(shares)
    before = shards(model)

    def fail(with_gradient):
        def raise_there(*_):
            if torch.is_grad_enabled() == with_gradient:
                raise KeyboardInterrupt

        handle = layer.register_forward_hook(raise_there)
        with pytest.raises(KeyboardInterrupt):
            optimizer.accumulate(shares)
        handle.remove()

    fail(with_gradient=False)
    kept = [same(before, shards(model))]
    optimizer.discard_measurements()
    fail(with_gradient=True)
    optimizer.discard_measurements()
    kept.append(same(before, shards(model)))
    optimizer.zero_grad()
    for _ in range(2):
        optimizer.step(shares)
    return kept, optimizer.trajectory, whole_bits(dict(model.named_parameters()))


def uninterrupted(options):
    model = build("llama", "lora")
    shard(model)
    optimizer, shares = run_of(model, rank=dist.get_rank(), size=dist.get_world_size(), **options)
    for _ in range(3):
        optimizer.step(shares)
    return [True, True], optimizer.trajectory, whole_bits(dict(model.named_parameters()))


def both(options):
    return interrupted(options), uninterrupted(options)


def test_a_failure_in_a_forward_leaves_every_shard():
    for with_failures, without in in_group(2, both, DENSE):
        assert with_failures == without


def sent():
    """The collective operations of an update."""
    model = build("llama", "lora")
    shard(model)
    optimizer, shares = run_of(model, rank=dist.get_rank(), size=dist.get_world_size(), **DENSE)
    optimizer.step(shares)
    optimizer.accumulate(shares)
    with CommDebugMode() as mode:
        optimizer.step()
    return {str(kind): count for kind, count in mode.get_comm_counts().items()}


def test_an_update_gathers_scalars_and_adds_norms_and_sends_no_weight():
    # The norms are those of the gradient, for clipping, and of the adapter's update.
    assert in_group(2, sent) == [{"c10d.allgather_": 1, "c10d.allreduce_": 2}] * 2


def step_once(model, optimizer, shares):
    """The bits before and after a step, and its scalars."""
    before = whole_bits(dict(model.named_parameters()))
    optimizer.step(shares)
    after = whole_bits(dict(model.named_parameters()))
    return before, after, list(optimizer.last_step.projected_grad)


def saved(folder):
    """Train and save; what the next step gives here, and after a resumption."""
    model = build("llama", "lora")
    shard(model)
    optimizer, shares = run_of(model, rank=dist.get_rank(), size=dist.get_world_size(), **BY_ROWS)
    for _ in range(2):
        optimizer.step(shares)
    save_checkpoint(folder, model, optimizer)
    save_artifact(
        folder / "artifact",
        model,
        base=BaseSpec("a-base"),
        method="hybrid",
        trajectory=optimizer.trajectory,
        base_fingerprint=optimizer.original_fingerprint(),
    )
    state = optimizer.state_dict()
    if dist.get_rank() == 0:
        torch.save(state, folder / "optimizer.pt")
    dist.barrier()
    return step_once(model, optimizer, shares), resumed(folder)


def resumed(folder):
    """Load the checkpoint, into shards if there is a group, and take the next step."""
    rank, size = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    base = shard(build("llama", "lora", seed=0)) if size > 1 else build("llama", None)
    model = load_checkpoint(base, folder)
    model.train()
    optimizer, shares = run_of(model, rank=rank, size=size, **BY_ROWS)
    optimizer.load_state_dict(torch.load(folder / "optimizer.pt", weights_only=True))
    optimizer.trajectory = Trajectory.load(folder / TRAJECTORY_FILE)[0]
    return step_once(model, optimizer, shares)


def test_a_checkpoint_of_a_sharded_model_fits_any_number_of_processes(tmp_path):
    (first, again), second = in_group(2, saved, tmp_path)
    assert again == first
    assert second == (first, first)
    of_artifact, of_checkpoint = (
        read_tensors(folder / "adapter_model.safetensors")[0]
        for folder in (tmp_path / "artifact" / "adapter", tmp_path)
    )
    assert_same_bits(of_artifact, of_checkpoint)
    for here, _, scalars in [*in_group(3, resumed, tmp_path), resumed(tmp_path)]:
        assert here == first[0]
        torch.testing.assert_close(
            torch.tensor(scalars), torch.tensor(first[2]), rtol=2e-2, atol=2e-2
        )


def refused():
    """What each kind of sharding that zofo cannot serve says."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    own = [dist.new_group([rank]) for rank in range(mesh.size())][dist.get_rank()]

    def step(model, group=dist.group.WORLD):
        groups = param_groups(model, "zo-ft")
        HybridOptimizer(groups, model, process_group=group)

    def sharded():
        model, _ = reader()
        return fully_shard(model, mesh=mesh)

    def columns():
        model, _ = reader()
        model.back.weight = nn.Parameter(distribute_tensor(model.back.weight, mesh, [Shard(1)]))
        return model

    def compiled():
        model, _ = reader()
        model.compile(backend="eager")
        return fully_shard(model, mesh=mesh)

    def inside():
        model, ids = reader()
        fully_shard(model.attention.out_proj, mesh=mesh)
        perturbed(fully_shard(model, mesh=mesh), ids, "rademacher")

    first = FullyShardedDataParallel(nn.Linear(2, 2), device_id=torch.device("cpu"))
    cases = (
        lambda: step(sharded(), None),
        lambda: step(sharded(), own),
        lambda: step(columns()),
        lambda: step(compiled()),
        lambda: step(first),
        inside,
    )
    said = []
    for case in cases:
        with pytest.raises(UserError) as error:
            case()
        said.append(str(error.value))
    return said


def test_what_cannot_be_served_is_refused_with_a_remedy():
    expected = (
        ("process_group is None", "pass the group"),
        ("a mesh of 2 processes", "pass the group"),
        ("tensor parallelism", "fully_shard"),
        ("compiled", "leave torch.compile out"),
        ("FSDP1", "fully_shard"),
        ("attention.out_proj.weight is still sharded", "apply fully_shard to that module"),
    )
    for said in in_group(2, refused):
        for message, parts in zip(said, expected, strict=True):
            assert all(part in message for part in parts), message
