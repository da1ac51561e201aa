"""Artefacts and checkpoints of short runs, which the tests damage."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from rich.console import Console
from safetensors.torch import load_file, save_file

from tests.support.hub_folders import save_decoder
from tests.support.models import build
from tests.support.trainers import trainer_for
from zofo.config.load import load_config
from zofo.run.train import train


@pytest.fixture(scope="session")
def made(tmp_path_factory):
    """Return a folder of bases, runs, and checkpoints of Trainer.

    Runs "a" and "b" differ only in their seed. Run "c" has another base, and "whole" trains a whole
    model.
    """
    root = tmp_path_factory.mktemp("made")
    save_decoder(root / "base")
    shutil.copytree(root / "base", root / "other-base")
    weights = load_file(root / "other-base" / "model.safetensors")
    weights["model.norm.weight"][0] += 1
    save_file(weights, root / "other-base" / "model.safetensors", {"format": "pt"})
    rows = [f"film {i} is {('great', 'dull')[i % 2]},{('good', 'bad')[i % 2]}" for i in range(40)]
    (root / "reviews.csv").write_text("\n".join(["text,label", *rows]) + "\n")
    runs = {"a": ("base", 0, "hybrid"), "b": ("base", 1, "hybrid")}
    runs |= {"c": ("other-base", 0, "hybrid"), "whole": ("base", 0, "fo-ft")}
    for name, (base, seed, method) in runs.items():
        options = {
            "model": root / base,
            "method": method,
            "task": "classification",
            "task.train": root / "reviews.csv",
            "task.num_dev": 8,
            "task.num_test": 8,
            "steps": 3,
            "batch_size": 4,
            "seed": seed,
            "output_dir": root / name,
        }
        config = load_config(overrides=[f"{key}={value}" for key, value in options.items()])
        train(config, console=Console(quiet=True))
    for seed in (0, 1):
        trainer = trainer_for(root / f"trainer-{seed}", build("llama", "lora"), seed=seed)
        trainer.train()
        trainer.save_model(str(root / f"checkpoint-of-{seed}"))
    return root


@pytest.fixture
def artefact(made, tmp_path):
    return Path(shutil.copytree(made / "a" / "artifact", tmp_path / "artefact"))


@pytest.fixture
def checkpoint(made, tmp_path):
    return Path(shutil.copytree(made / "checkpoint-of-0", tmp_path / "checkpoint"))
