"""Buffers that move in training come back with checkpoints and artefacts, to the same bits."""

from __future__ import annotations

import peft
import pytest
import torch
from torch import nn
from torch.utils.data import Dataset
from transformers import TrainerCallback

from tests.support.damage import refused
from tests.support.models import assert_same_bits
from tests.support.trainers import trainer_for
from zofo.optim.methods import param_groups
from zofo.optim.optimizer import HybridOptimizer
from zofo.saved.checkpoint import load_checkpoint, save_checkpoint
from zofo.saved.layout import BUFFERS_FILE


class Normed(nn.Module):
    """A classifier with batch normalisation."""

    def __init__(self, seed=0):
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            self.first, self.norm = nn.Linear(4, 8), nn.BatchNorm1d(8)
            self.last = nn.Linear(8, 2)

    def forward(self, x, labels):
        logits = self.last(torch.tanh(self.norm(self.first(x))))
        return {"loss": nn.functional.cross_entropy(logits, labels), "logits": logits}


class Points(Dataset):
    """Points in four dimensions, of two classes."""

    def __len__(self):
        return 16

    def __getitem__(self, i):
        generator = torch.Generator().manual_seed(i)
        return {"x": torch.randn(4, generator=generator) + i % 2, "labels": torch.tensor(i % 2)}


def new_model(adapter=True):
    model = Normed()
    config = peft.LoraConfig(r=2, target_modules=["first"], init_lora_weights=False)
    with torch.random.fork_rng():
        torch.manual_seed(1)
        return peft.get_peft_model(model, config) if adapter else model


def trainer_of(folder, model, **changes):
    options = {"save_strategy": "steps", "save_steps": 2, "per_device_train_batch_size": 4}
    return trainer_for(folder, model, rows=Points(), **{**options, **changes})


def state_of(model):
    return {name: value.clone() for name, value in model.state_dict().items()}


class Kill(TrainerCallback):
    """Stops after step 3, as a kill would."""

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == 3:
            raise KeyboardInterrupt


@pytest.fixture(scope="module", params=["hybrid", "fo-peft", "zo-peft", "zo-ft"])
def run(request, tmp_path_factory):
    """A method, its trained model, and its run folder."""
    folder, method = tmp_path_factory.mktemp("run"), request.param
    model = new_model(method != "zo-ft")
    trainer_of(folder, model, method=method).train()
    assert all(value.any() for name, value in state_of(model).items() if "running_mean" in name)
    return method, model, folder


def test_resuming_gives_the_same_bits(tmp_path, run):
    method, model, _ = run
    rest = new_model(method != "zo-ft")
    with pytest.raises(KeyboardInterrupt):
        trainer_of(
            tmp_path, new_model(method != "zo-ft"), method=method, callbacks=[Kill()]
        ).train()
    trainer_of(tmp_path, rest, method=method).train(resume_from_checkpoint=True)
    assert_same_bits(state_of(rest), state_of(model))


def test_loading_gives_the_same_bits(run):
    method, model, folder = run
    if method == "hybrid":
        loaded = load_checkpoint(Normed(), folder / "checkpoint-4")
        assert_same_bits(state_of(loaded), state_of(model))
    assert (folder / "checkpoint-4" / BUFFERS_FILE).exists() == (method != "zo-ft")


def test_a_loop_saves_them_too_and_damage_is_refused(tmp_path):
    model = new_model()
    optimizer = HybridOptimizer(param_groups(model, base_lr=1e-3), model)
    rows = [Points()[i] for i in range(8)]
    batch = {key: torch.stack([row[key] for row in rows]) for key in rows[0]}
    for _ in range(2):
        optimizer.step(lambda: model(**batch)["loss"])
    save_checkpoint(tmp_path, model, optimizer)
    assert_same_bits(state_of(load_checkpoint(Normed(), tmp_path)), state_of(model))

    content = (tmp_path / BUFFERS_FILE).read_bytes()
    (tmp_path / BUFFERS_FILE).write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    refused(lambda: load_checkpoint(Normed(), tmp_path), BUFFERS_FILE)
    (tmp_path / BUFFERS_FILE).unlink()
    refused(lambda: load_checkpoint(Normed(), tmp_path), BUFFERS_FILE)
