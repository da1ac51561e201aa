"""Each row's share of Trainer's loss: their sum is the loss, however the loss is made."""

from __future__ import annotations

import pytest
import torch
from datasets import Dataset

from tests.support.models import batch_for, build
from zofo.errors import UserError
from zofo.trainer.mixin import HybridArguments, HybridTrainer

ROWS = 24


def rows_for(architecture):
    batch = batch_for(architecture, rows=ROWS)
    labels = batch["labels"].clone()
    if labels.ndim == 2:
        labels[::3, :4] = -100  # rows have different numbers of labels
    columns = {**batch, "labels": labels}
    return Dataset.from_dict({name: column.tolist() for name, column in columns.items()})


def trainer_for(folder, architecture, adapter="lora", kind=HybridTrainer, **options):
    given = {
        "output_dir": str(folder),
        "max_steps": 2,
        "per_device_train_batch_size": 4,
        "report_to": [],
        "save_strategy": "no",
        "use_cpu": True,
        "disable_tqdm": True,
        "distribution": "rank-one",
        "directions_per_step": "rows",
    }
    arguments = HybridArguments(**(given | options))
    model = build(architecture, adapter)
    return kind(model=model, args=arguments, train_dataset=rows_for(architecture))


@pytest.mark.parametrize(
    ("architecture", "adapter", "options"),
    [
        ("llama", "lora", {}),
        ("llama", "prompt", {"gradient_accumulation_steps": 2}),
        ("llama", "lora", {"label_smoothing_factor": 0.1}),
        ("gpt2", "lora", {"base_batch_fraction": 0.5}),
        ("llama", "lora", {"bf16": True, "gradient_checkpointing": True}),
        ("bert", "prompt", {"gradient_accumulation_steps": 3}),
    ],
)
def test_the_shares_add_up_to_the_loss(tmp_path, architecture, adapter, options):
    trainer = trainer_for(tmp_path, architecture, adapter, **options)
    seen = []
    measure = None

    def watched(closure, loss, generators, instead, examples):
        seen.append((loss, closure()))
        return measure(closure, loss, generators, instead, examples)

    trainer.create_optimizer()
    measure = trainer.hybrid_optimizer.measure
    trainer.hybrid_optimizer.measure = watched
    trainer.train()  # the first step compares the sum with the loss
    rows = 2 if "base_batch_fraction" in options else 4
    micro = options.get("gradient_accumulation_steps", 1)
    for update in trainer.trajectory.updates:
        assert len(update[0].projected_grad) == rows * micro
    for loss, again in seen:
        assert loss.shape == again.shape == (4,)


def test_a_loss_of_another_kind_is_refused_before_anything_moves(tmp_path):
    class Squared(HybridTrainer):
        def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
            loss, outputs = super().compute_loss(model, inputs, True, num_items_in_batch)
            return (loss.square(), outputs) if return_outputs else loss.square()

    trainer = trainer_for(tmp_path, "llama", kind=Squared)
    before = {n: p.detach().clone() for n, p in trainer.model.named_parameters()}
    with pytest.raises(UserError, match="override row_losses"):
        trainer.train()
    assert all(torch.equal(p, before[n]) for n, p in trainer.model.named_parameters())


def test_an_overridden_method_gives_the_shares(tmp_path):
    class Doubled(HybridTrainer):
        def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
            loss, outputs = super().compute_loss(model, inputs, True, num_items_in_batch)
            return (2 * loss, outputs) if return_outputs else 2 * loss

        def row_losses(self, model, outputs, labels, loss, num_items_in_batch):
            return 2 * super().row_losses(model, outputs, labels, loss / 2, num_items_in_batch)

    trainer = trainer_for(tmp_path, "llama", kind=Doubled)
    trainer.train()
    assert len(trainer.trajectory.updates[0][0].projected_grad) == 4
