"""Tests of the loss difference on a part of the batch in Trainer.

It is unbiased and counted, and it is refused where it has no meaning.
"""

from __future__ import annotations

import pytest
import torch
from trl import DPOConfig, DPOTrainer

from tests.support.models import assert_same_bits, bits, build
from tests.support.trainers import Rows, history, plain_options, trainer_for
from tests.trainer.test_trl import preferences, sft, tokenizer
from zofo.errors import UserError
from zofo.optim.blocks import split_parameters
from zofo.trainer.mixin import HybridMixin, HybridOptions, HybridTrainer


class Turned(HybridTrainer):
    """Evaluates the loss of `batch_part` for every rotation of the batch's rows."""

    gaps = ()

    def batch_part(self, model, inputs, num_items_in_batch, num_first):
        if not self.gaps:
            num_rows = len(inputs["input_ids"])
            with torch.no_grad():
                whole = self._loss_of(model, inputs, num_items_in_batch)
                parts = []
                for turn in range(num_rows):
                    turned = {key: value.roll(turn, 0) for key, value in inputs.items()}
                    part, _ = super().batch_part(model, turned, num_items_in_batch, num_first)
                    parts.append(float(part.closure()))
            self.gaps = (
                sum(parts) / num_rows - float(whole),
                max(parts) - min(parts),
                float(whole),
            )
        return super().batch_part(model, inputs, num_items_in_batch, num_first)


@pytest.mark.parametrize("accumulation", [1, 2])
def test_the_part_of_a_loss_over_counted_tokens_is_unbiased(tmp_path, accumulation):
    """The part's loss is unbiased if the loss is a mean over tokens.

    The rows of `Rows` have different numbers of targets, and so do the micro-batches.
    """
    trainer = trainer_for(
        tmp_path,
        cls=Turned,
        base_batch_fraction=0.5,
        gradient_accumulation_steps=accumulation,
        per_device_train_batch_size=4,
        max_steps=1,
    )
    trainer.train()
    gap, spread, whole = trainer.gaps
    assert whole > 0.5
    assert spread > 1e-2
    assert abs(gap) < 1e-5 * whole


def without_loss_arguments(trainer):
    trainer.model_accepts_loss_kwargs = False
    return trainer


@pytest.mark.parametrize("accumulation", [1, 2])
@pytest.mark.parametrize("change", [lambda t: t, without_loss_arguments])
@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_a_trainer_takes_the_difference_on_a_part(tmp_path, accumulation, change, dropout):
    """The loss difference on a part has both losses on one scale and with the same masks.

    Any other scale or mask would give an |s| of hundreds and more.
    """
    changes = {
        "base_batch_fraction": 0.5,
        "gradient_accumulation_steps": accumulation,
        "per_device_train_batch_size": 4,
    }
    model = build("llama", "lora", lora_dropout=dropout)
    trainer = change(trainer_for(tmp_path, model, max_steps=3, rows=Rows(24), **changes))
    trainer.train()
    assert all(0 < abs(scalar) < 10 for scalar in history(trainer, "projected_grad"))
    # Each step runs two losses on half of the batch.
    spent = [accumulation * step for step in (1.0, 2.0, 3.0)]
    assert history(trainer, "zo_forwards") == spent
    assert history(trainer, "forward_equivalents") == [3 * n for n in spent]


def test_a_batch_of_one_row_is_taken_whole(tmp_path):
    models = [build("llama", "lora") for _ in range(2)]
    for model, fraction in zip(models, (1.0, 0.5), strict=True):
        changes = {"base_batch_fraction": fraction, "per_device_train_batch_size": 1}
        trainer_for(tmp_path, model, **changes).train()
    assert_same_bits(bits(models[0]), bits(models[1]))


def test_base_lr_zero_is_fo_peft_with_a_part_too(tmp_path):
    models = [build("llama", "lora", lora_dropout=0.3) for _ in range(2)]
    for model, changes in zip(
        models, ({"base_lr": 0.0, "base_batch_fraction": 0.5}, {"method": "fo-peft"}), strict=True
    ):
        trainer = trainer_for(tmp_path, model, max_steps=3, **changes)
        torch.manual_seed(5)
        trainer.train()
    adapters = [dict(split_parameters(model).adapter) for model in models]
    assert_same_bits(*adapters)


def test_sft_takes_a_part(tmp_path):
    trainer = sft(
        tmp_path,
        build("llama", "lora"),
        hybrid=HybridOptions(base_lr=1e-3, base_batch_fraction=0.5),
    )
    trainer.train()
    assert all(0 < abs(scalar) < 10 for scalar in history(trainer, "projected_grad"))
    assert history(trainer, "zo_forwards") == [1.0, 2.0, 3.0, 4.0]


# Tests of what is refused.


class Contrastive(HybridTrainer):
    """Each row's loss depends on the other rows of its batch."""

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        hidden = model(**inputs, output_hidden_states=True).hidden_states[-1]
        first, last = hidden[:, 0], hidden[:, -1]
        scores = torch.nn.functional.normalize(first) @ torch.nn.functional.normalize(last).T
        return torch.nn.functional.cross_entropy(scores, torch.arange(len(first)))


def test_a_loss_that_is_no_mean_over_rows_is_refused(tmp_path):
    changes = {"base_batch_fraction": 0.5, "per_device_train_batch_size": 4}
    with pytest.raises(UserError, match="no mean over rows"):
        trainer_for(tmp_path, cls=Contrastive, **changes).train()


def test_a_batch_that_cannot_be_cut_is_refused(tmp_path):
    class Crossed(HybridTrainer):
        def get_batch_samples(self, *args, **kwargs):
            batches, count = super().get_batch_samples(*args, **kwargs)
            for batch in batches:
                batch["odd"] = torch.zeros(7)
            return batches, count

        def compute_loss(self, model, inputs, *args, **kwargs):
            inputs.pop("odd", None)
            return super().compute_loss(model, inputs, *args, **kwargs)

    with pytest.raises(UserError, match="'odd'"):
        trainer_for(tmp_path, cls=Crossed, base_batch_fraction=0.5).train()


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"base_batch_fraction": 0.0}, r"base_batch_fraction is 0\.0"),
        ({"base_batch_fraction": 1.5}, r"base_batch_fraction is 1\.5"),
        ({"base_batch_fraction": float("nan")}, "base_batch_fraction is nan"),
        ({"base_batch_fraction": 0.5, "method": "zo-peft"}, "lower the batch size"),
        ({"base_batch_fraction": 0.5, "sampling": "shuffle-once"}, "'reshuffle'"),
        ({"base_batch_fraction": 0.5, "train_sampling_strategy": "sequential"}, "'random'"),
    ],
)
def test_options_that_make_no_sense_are_refused(tmp_path, changes, words):
    with pytest.raises(UserError, match=words):
        trainer_for(tmp_path, **changes)


@pytest.mark.parametrize("changes", [{"packing": True}, {"padding_free": True, "max_length": None}])
def test_samples_that_share_a_row_are_refused(tmp_path, changes):
    options = HybridOptions(base_lr=1e-3, base_batch_fraction=0.5)
    with pytest.raises(UserError, match="packing or padding_free"):
        sft(tmp_path, build("llama", "lora"), hybrid=options, **changes)


def test_dpo_whose_rows_are_pairs_is_refused(tmp_path):
    class HybridDPOTrainer(HybridMixin, DPOTrainer):
        pass

    settings = {"bf16": False, "gradient_checkpointing": False, "precompute_ref_log_probs": True}
    with pytest.raises(UserError, match=r"DPOTrainer.*one sample a row"):
        HybridDPOTrainer(
            model=build("llama", "lora"),
            args=DPOConfig(**plain_options(tmp_path, **settings)),
            train_dataset=preferences(),
            processing_class=tokenizer(),
            hybrid=HybridOptions(base_lr=1e-3, base_batch_fraction=0.5),
        )
