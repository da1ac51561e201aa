"""A run whose loss is not finite stops with the last good step, or skips the step."""

import json

import pytest
import torch
from rich.console import Console

from zofo.config.load import load_config
from zofo.errors import TrainingStoppedError
from zofo.run.train import newest_checkpoint, train

QUIET = Console(quiet=True)


@pytest.fixture
def poisoned(monkeypatch):
    """Make the loss of the fourth training step NaN."""
    import zofo.run.task_trainer

    real = zofo.run.task_trainer.TaskTrainer.compute_loss

    def compute_loss(self, *args, **kwargs):
        loss = real(self, *args, **kwargs)
        return loss * torch.nan if self.state.global_step == 3 else loss

    monkeypatch.setattr(zofo.run.task_trainer.TaskTrainer, "compute_loss", compute_loss)


def config(tmp_path, decoder_folder, *more):
    rows = [f"film {i} is {('great', 'dull')[i % 2]},{i % 2}" for i in range(60)]
    (tmp_path / "a.csv").write_text("\n".join(["text,label", *rows]) + "\n")
    return load_config(
        overrides=[
            f"model={decoder_folder}",
            "task=classification",
            f"task.train={tmp_path / 'a.csv'}",
            "steps=6",
            "eval_every=6",
            "log_every=1",
            "batch_size=4",
            f"output_dir={tmp_path / 'run'}",
            *more,
        ]
    )


@pytest.mark.filterwarnings("ignore:step 3 was not applied")
def test_a_run_stops_at_a_loss_that_is_not_finite(tmp_path, decoder_folder, poisoned):
    with pytest.raises(TrainingStoppedError, match="stopped at step 4"):
        train(config(tmp_path, decoder_folder), console=QUIET)
    checkpoint = newest_checkpoint(tmp_path / "run")
    assert checkpoint is not None
    from zofo.optim.trajectory import Trajectory

    trajectory, _ = Trajectory.load(checkpoint / "base_trajectory.safetensors")
    assert [row[0].step for row in trajectory.updates] == [0, 1, 2]


@pytest.mark.filterwarnings("ignore:step 3 was not applied")
def test_a_run_that_skips_goes_on(tmp_path, decoder_folder, poisoned):
    result = train(config(tmp_path, decoder_folder, "on_non_finite=skip"), console=QUIET)
    assert result.cost["steps"] == 6


def test_a_runs_metrics_say_what_moved(tmp_path, decoder_folder):
    train(config(tmp_path, decoder_folder), console=QUIET)
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    steps = [line for line in map(json.loads, lines) if "loss" in line]
    assert len(steps) == 6
    from zofo.run.prepare import prepare

    prepared = prepare(config(tmp_path, decoder_folder, f"output_dir={tmp_path / 'b'}"))
    from zofo.optim.blocks import split_parameters

    d = sum(p.numel() for p in split_parameters(prepared.model).base.values())
    for line in steps:
        expected = line["base_lr"] * abs(line["projected_grad"]) * d**0.5
        assert line["base_update_norm"] == pytest.approx(expected, rel=1e-6)
        assert line["adapter_update_norm"] > 0
        assert line["signal_to_rounding"] > 0
        assert line["forward_equivalents"] == 3 * line["step"]
        assert line["peak_memory_bytes"] > 0
