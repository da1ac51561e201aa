"""HybridTrainer on several processes: equal bits, exact epochs, checkpoints for any number."""

from __future__ import annotations

import hashlib
import signal

import pytest
import torch
import torch.distributed as dist
from transformers import TrainerCallback

from tests.support.groups import in_group
from tests.support.models import assert_same_bits, bits, build
from tests.support.trainers import Recorder, Rows, trainer_for
from zofo.errors import UserError
from zofo.optim.blocks import split_parameters
from zofo.saved.layout import ORIGINAL_BASE_FILE
from zofo.trainer.checks import check_setup
from zofo.trainer.interrupt import StopOnSignal, TrainingInterrupt
from zofo.trainer.mixin import HybridTrainer

BY_ROWS = {"distribution": "rank-one", "directions_per_step": "rows"}


def train(folder, adapter, changes, num_rows=12, resume=None):
    """Train in this process, which may be one of several; what came out."""
    size = dist.get_world_size() if dist.is_initialized() else 1
    rows = Rows(num_rows)
    trainer = trainer_for(
        folder,
        build("llama", adapter),
        rows=rows,
        method="hybrid" if adapter else "zo-ft",
        per_device_train_batch_size=6 // size,
        **changes,
    )
    scalars = []
    step = trainer.create_optimizer().step

    def noting(*args, **kwargs):
        result = step(*args, **kwargs)
        scalars.append(list(trainer.hybrid_optimizer.last_step.projected_grad))
        return result

    trainer.optimizer.step = noting
    trainer.train(resume_from_checkpoint=resume)
    digests = {
        n: hashlib.sha256(p.numpy().tobytes()).hexdigest() for n, p in bits(trainer.model).items()
    }
    logs = [entry for entry in trainer.state.log_history if "loss" in entry]
    losses, sent = [e["loss"] for e in logs], [e.get("base_bytes_sent") for e in logs]
    found = {"bits": digests, "scalars": scalars, "losses": losses, "sent": sent}
    found["gradients"] = [e.get("gradient_bytes_sent") for e in logs]
    return {**found, "seen": rows.seen}


@pytest.mark.parametrize("adapter", ["lora", None], ids=["lora", "none"])
@pytest.mark.parametrize("options", [{}, BY_ROWS], ids=["dense", "rows"])
def test_processes_train_as_one_does_on_the_same_batches(tmp_path, adapter, options):
    alone = train(tmp_path / "one", adapter, options)
    found = in_group(2, train, tmp_path / "two", adapter, options)
    assert found[0]["bits"] == found[1]["bits"]
    assert found[0]["scalars"] == found[1]["scalars"]
    torch.testing.assert_close(
        torch.tensor(found[0]["scalars"]), torch.tensor(alone["scalars"]), rtol=3e-2, atol=3e-2
    )
    assert found[0]["losses"] == pytest.approx(alone["losses"], rel=1e-3)


def test_every_row_comes_once_an_epoch_and_uneven_ends_weigh_right(tmp_path):
    options = {"max_steps": -1, "num_train_epochs": 2}
    alone = train(tmp_path / "one", "lora", options, num_rows=9)
    found = in_group(2, train, tmp_path / "two", "lora", options, 9)
    # Trainer begins an epoch with one pass more through the sampler, so only the set is compared.
    for part in found:
        assert len(part["seen"]) < 18
    seen = sorted(found[0]["seen"] + found[1]["seen"])
    assert seen == sorted(list(range(9)) * 2)
    assert found[0]["bits"] == found[1]["bits"]
    torch.testing.assert_close(
        torch.tensor(found[0]["scalars"]), torch.tensor(alone["scalars"]), rtol=3e-2, atol=3e-2
    )


def test_a_step_sends_sixteen_bytes_and_the_number_of_rows_only_at_the_end_of_an_epoch(tmp_path):
    options = {"max_steps": -1, "num_train_epochs": 1, "gradient_accumulation_steps": 2}
    for part in in_group(2, train, tmp_path, "lora", options, 33):  # 6, 6, 6, 6, 6, 3 rows
        assert part["sent"] == [16, 16 + 16, 16 + 16 + 16 + 2 * 4]
        adapter = split_parameters(build("llama", "lora")).adapter
        num_bytes = 4 * sum(p.numel() for p in adapter.values())
        assert part["gradients"] == [num_bytes, 2 * num_bytes, 3 * num_bytes]


def test_a_checkpoint_of_two_processes_continues_on_one_and_on_three(tmp_path):
    # The checkpoint lies within the second epoch of three steps.
    options = {"save_strategy": "steps", "save_steps": 4, "max_steps": 6, **BY_ROWS}
    whole = in_group(2, train, tmp_path / "two", "lora", options, 18)[0]
    checkpoint = str(tmp_path / "two" / "checkpoint-4")
    again = in_group(2, train, tmp_path / "again", "lora", options, 18, checkpoint)
    assert again[0]["bits"] == again[1]["bits"] == whole["bits"]
    assert [part["sent"] for part in again] == [whole["sent"]] * 2
    assert [part["gradients"] for part in again] == [whole["gradients"]] * 2
    three = in_group(3, train, tmp_path / "three", "lora", options, 18, checkpoint)
    one = train(tmp_path / "one", "lora", options, 18, checkpoint)
    for found in (one, three[0]):
        torch.testing.assert_close(
            torch.tensor(found["scalars"]), torch.tensor(whole["scalars"][4:]), rtol=3e-2, atol=3e-2
        )


def stopped(folder):
    """Where this process stops, if only rank 1 receives a signal, in its second step."""
    stop = StopOnSignal()

    class Signal(TrainerCallback):
        def on_step_begin(self, args, state, control, **kwargs):
            if dist.get_rank() == 1 and state.global_step == 1:
                stop.request(signal.SIGTERM)

    trainer = trainer_for(folder, callbacks=[Signal(), stop])
    try:
        trainer.train()
    except TrainingInterrupt as interrupt:
        return [trainer.state.global_step, interrupt.exit_code, interrupt.checkpoint.name]
    return "not stopped"


def test_a_signal_to_one_process_stops_all_at_the_same_step(tmp_path):
    assert in_group(2, stopped, tmp_path / "run") == [[2, 143, "checkpoint-2"]] * 2


class SecondIsBest(HybridTrainer):
    def evaluate(self, *args, **kwargs):
        return {**super().evaluate(*args, **kwargs), "eval_loss": abs(self.state.global_step - 2)}


def best(folder):
    """Check that training ends with the bits of its best step; the step."""
    recorder = Recorder()
    trainer = trainer_for(
        folder,
        cls=SecondIsBest,
        callbacks=[recorder],
        eval_strategy="steps",
        eval_steps=1,
        save_strategy="steps",
        save_steps=1,
        load_best_model_at_end=True,
    )
    trainer.train()
    step = trainer.state.best_global_step
    assert_same_bits(bits(trainer.model), recorder.weights[step])
    return step


def test_all_processes_end_with_the_best_step(tmp_path):
    assert in_group(2, best, tmp_path) == [2, 2]
    assert not (tmp_path / ORIGINAL_BASE_FILE).exists()


def test_processes_that_trainer_does_not_connect_are_refused(tmp_path, monkeypatch):
    trainer = trainer_for(tmp_path)
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UserError, match=r"started 2 processes.*use_cpu=True"):
        check_setup(trainer, trainer.hybrid_options)
