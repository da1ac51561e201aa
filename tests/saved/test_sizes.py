"""Tests of the size of hybrid fine-tuning on disk, for SmolLM2-135M."""

from __future__ import annotations

import math

import pytest
import torch

from zofo.models.adapters import create_adapter
from zofo.models.loading import empty_model
from zofo.optim.blocks import split_parameters
from zofo.optim.trajectory import GroupSpec, Trajectory, Update

pytestmark = pytest.mark.slow  # The first use of the alias converts the model.

NUM_STEPS = 2000
BYTES_OF_THE_REST = 256 * 1024
"""Bound for names in the files, scheduler, generators and Trainer's state.

They took 171 KiB after 80 steps.
"""


@pytest.fixture(scope="module")
def blocks():
    with torch.device("meta"):
        return split_parameters(create_adapter(empty_model("smollm2-135m"), "lora", r=8))


def saved_bytes(folder, blocks, schedule):
    """Return the size of a trajectory as a run writes it, with values that do not compress."""
    names = tuple(sorted(blocks.base))
    generator = torch.Generator().manual_seed(0)
    scalars = torch.randn(NUM_STEPS, generator=generator, dtype=torch.float64).tolist()
    updates = [
        (Update(step, (scalar,), 1e-5 * schedule(step / NUM_STEPS), 0.0),)
        for step, scalar in enumerate(scalars)
    ]
    groups = (GroupSpec(names, tuple(blocks.base_index[name] for name in names)),)
    trajectory = Trajectory(2**32 - 1, "rademacher", 1e-3, "forward", groups, updates)
    files = {f"adapter_{name}": "0" * 32 for name in ("config.json", "model.safetensors")}
    path = folder / "t.safetensors"
    trajectory.save(path, base_fingerprint="0" * 32, files=files)
    assert Trajectory.load(path)[0] == trajectory
    return path.stat().st_size


SCHEDULES = {
    "constant": lambda t: 1.0,
    # A changing rate needs 8 more bytes per step.
    "cosine": lambda t: (1 + math.cos(math.pi * t)) / 2,
}


@pytest.mark.parametrize("schedule", SCHEDULES.values(), ids=SCHEDULES)
def test_the_base_of_2000_steps_takes_at_most_64_kib(tmp_path, blocks, schedule):
    assert saved_bytes(tmp_path, blocks, schedule) <= 64 * 1024


def test_a_checkpoint_takes_at_most_a_fiftieth_of_the_base(tmp_path, blocks):
    base = 4 * sum(p.numel() for p in blocks.base.values())
    adapter = sum(p.numel() for p in blocks.adapter.values())
    assert (base, adapter) == (538_060_032, 460_800)
    weights_and_two_moments = 3 * 4 * adapter
    trajectory = saved_bytes(tmp_path, blocks, SCHEDULES["cosine"])
    assert 50 * (weights_and_two_moments + trajectory + BYTES_OF_THE_REST) <= base
