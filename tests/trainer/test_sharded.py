"""HybridTrainer on a model that FSDP2 shards: the run of whole models, and its checkpoints."""

import functools

import pytest
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from tests.support.groups import in_group
from tests.support.models import build
from tests.support.trainers import Rows, history, trainer_for
from zofo.disk.files import fingerprint
from zofo.errors import UserError
from zofo.optim.blocks import split_parameters
from zofo.perturb.shards import Whole
from zofo.trainer.checks import check_setup
from zofo.trainer.mixin import HybridTrainer


def shard(model):
    """Shard each layer and the rest over all processes, as users do."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    for module in model.modules():
        if type(module).__name__ == "LlamaDecoderLayer":
            fully_shard(module, mesh=mesh)
    return fully_shard(model, mesh=mesh)


def original():
    """Name -> weight of the base before training."""
    return split_parameters(build("llama", "lora")).base


def trainer_on(folder, is_sharded):
    """A trainer whose processes share batches of six rows, and which returns to its best step."""
    model = build("llama", "lora")
    return trainer_for(
        folder,
        shard(model) if is_sharded else model,
        cls=functools.partial(HybridTrainer, original_base=original),
        rows=Rows(12),
        method="hybrid",
        optim="adamw_torch",
        per_device_train_batch_size=6 // dist.get_world_size(),
        save_strategy="steps",
        save_steps=2,
        eval_strategy="steps",
        eval_steps=2,
        load_best_model_at_end=True,
    )


def outcome(trainer):
    """The bits of the weights, the scalars and the logs."""
    blocks = split_parameters(trainer.model)
    weights = Whole({**blocks.base, **blocks.adapter})
    found = {name: fingerprint({"": weight}) for name, weight in weights.items()}
    scalars = [update.projected_grad for row in trainer.trajectory.updates for update in row]
    logs = {key: history(trainer, key) for key in ("loss", "eval_loss", "grad_norm")}
    return found, scalars, logs


def trained(folder):
    """Train on whole models and on shards, and resume the latter in its middle."""
    found = []
    for name, is_sharded in (("whole", False), ("shards", True)):
        trainer = trainer_on(folder / name, is_sharded)
        trainer.train()
        found.append(outcome(trainer))
    trainer = trainer_on(folder / "shards", True)
    trainer.train(resume_from_checkpoint=str(folder / "shards" / "checkpoint-2"))
    return *found, outcome(trainer)


def test_shards_train_as_whole_models_do_and_resume(tmp_path):
    found = in_group(2, trained, tmp_path)
    for whole, shards, resumed in found:
        assert shards[0] == found[0][1][0]
        for a, b in zip(whole[1], shards[1], strict=True):
            assert a == pytest.approx(b, rel=3e-2, abs=3e-2)
        for key, values in whole[2].items():
            assert shards[2][key] == pytest.approx(values, rel=1e-3)
        assert resumed == shards
    assert found[0][1][1] == found[1][1][1]


def refused(folder):
    """What a trainer says of a sharded model that it cannot train."""
    said = []
    for adapter, changes in (
        (None, {"method": "zo-ft"}),
        ("lora", {"snapshot_every": 2}),
        ("lora", {"load_best_model_at_end": True, "eval_strategy": "no", "save_strategy": "no"}),
    ):
        with pytest.raises(UserError) as error:
            trainer_for(folder, shard(build("llama", adapter)), **changes)
        said.append(str(error.value))
    return said


def test_what_a_trainer_cannot_shard_is_refused_with_a_remedy(tmp_path):
    expected = (
        ("has no adapter", "loop of your own"),
        ("snapshot_every", "leave it out"),
        ("load_best_model_at_end", "pass original_base"),
    )
    for said in in_group(2, refused, tmp_path):
        for message, parts in zip(said, expected, strict=True):
            assert all(part in message for part in parts), message


def test_the_sharding_of_accelerate_is_refused_with_a_remedy(tmp_path):
    trainer = trainer_for(tmp_path)
    trainer.is_fsdp_enabled = True  # accelerate sets it where there are GPUs
    with pytest.raises(UserError, match="fully_shard before you make the trainer"):
        check_setup(trainer, trainer.hybrid_options)
