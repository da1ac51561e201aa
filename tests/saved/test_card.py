"""The model card states what the run did, and the hub can read it."""

from __future__ import annotations

import json
import os

import pytest
from huggingface_hub import ModelCard
from rich.console import Console

from zofo.config.load import load_config
from zofo.optim.methods import METHODS
from zofo.run.train import train
from zofo.saved.artifact import load
from zofo.saved.card import write_card
from zofo.saved.manifest import BaseSpec


@pytest.fixture(scope="module")
def run(tmp_path_factory, decoder_folder):
    folder = tmp_path_factory.mktemp("card")
    rows = [f"film {i} is {('great', 'dull')[i % 2]},{('good', 'bad')[i % 2]}" for i in range(40)]
    (folder / "reviews.csv").write_text("\n".join(["text,label", *rows]) + "\n")
    options = {
        "model": decoder_folder,
        "task": "classification",
        "task.train": folder / "reviews.csv",
        "task.num_dev": 8,
        "task.num_test": 10,
        "steps": 2,
        "base_lr": 0,
        "output_dir": folder / "run",
    }
    config = load_config(overrides=[f"{key}={value}" for key, value in options.items()])
    train(config, console=Console(quiet=True))
    return folder / "run"


def test_a_run_writes_a_card_that_the_hub_reads(run, decoder_folder):
    path = run / "artifact" / "README.md"
    card = ModelCard(path.read_text())
    assert card.data.library_name == "zofo"
    assert card.data.tags == ["zofo", "hybrid", "lora", "zeroth-order"]
    assert card.data.pipeline_tag == "text-generation"
    result = json.loads((run / "result.json").read_text())
    for when in ("before", "after"):
        scores = result["test"][when]
        interval = f"[{scores['accuracy_low']:.4f}, {scores['accuracy_high']:.4f}]"
        assert f"{scores['accuracy']:.4f} {interval}" in card.text
    for words in (
        "22 train, 8 dev, 10 test",
        "zofo.load(",
        "Do not use plain `peft`",
        "| steps | 2 |",
        "| forward-equivalents (forwards of one micro-batch) | 6 |",
        "peak memory",
        "torch 2",
    ):
        assert words in card.text, words
    # The card must not reveal where the user's files lie.
    assert decoder_folder not in path.read_text()
    assert str(run.parent) not in path.read_text()
    assert os.sep + "reviews" not in path.read_text()


def test_there_is_no_card_of_pefts_and_ours_may_be_edited(run):
    assert not (run / "artifact" / "adapter" / "README.md").exists()
    (run / "artifact" / "README.md").write_text("mine")
    load(run)


def summary_of(method, **changes):
    scores = {"num_rows": 9, "loss": 1.0, "accuracy": 0.5, "perplexity": 2.7}
    cost = {
        "steps": 3,
        "train_s": 1.2,
        "forward_equivalents": 9,
        "peak_memory_bytes": 1 << 30,
        "artifact_bytes": 1 << 20,
    }
    adapter = "lora" if METHODS[method].needs_adapter else "none"
    test = {"before": scores, "after": {**scores, "accuracy": 0.75}}
    return {"method": method, "adapter": adapter, "seed": 0, "test": test, "cost": cost, **changes}


@pytest.mark.parametrize("method", METHODS)
def test_every_method(tmp_path, method):
    path = write_card(
        tmp_path,
        base=BaseSpec("smollm2-135m"),
        task={"name": "sst2", "train": None},
        num_rows={"train": 3, "dev": 2, "test": 9},
        summary=summary_of(method),
    )
    card = ModelCard(path.read_text())
    assert card.data.base_model == "HuggingFaceTB/SmolLM2-135M-Instruct"
    assert card.data.datasets == ["stanfordnlp/sst2"]
    assert "| accuracy | 0.5000 | 0.7500 |" in card.text
    assert ("Do not use plain" in card.text) == (METHODS[method].base == "zeroth")


@pytest.mark.parametrize(
    ("name", "train", "base", "datasets"),
    [
        ("rotten-tomatoes", None, "org/model", None),
        ("chat", "org/talks", "./folder", ["org/talks"]),
        ("chat", "data/talks.jsonl", "/a/folder", None),
        ("chat", "/home/me/talks.jsonl", "a | b\n# c", None),
    ],
)
def test_names_of_models_and_data(tmp_path, monkeypatch, name, train, base, datasets):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "talks.jsonl").touch()
    path = write_card(
        tmp_path,
        base=BaseSpec(base),
        task={"name": name, "train": train},
        num_rows={"train": 3, "dev": 2, "test": 9},
        summary=summary_of("hybrid"),
    )
    card = ModelCard(path.read_text())
    assert card.data.base_model == ("org/model" if base == "org/model" else None)
    assert card.data.datasets == datasets
    assert "/home" not in path.read_text()
    assert "\n# c" not in path.read_text()


def test_rewards_are_on_the_card(tmp_path):
    rewards = {"before": {"reward": 0.25}, "after": {"reward": None}}
    path = write_card(
        tmp_path,
        base=BaseSpec("smollm2-135m"),
        task={"name": "sst2", "train": None},
        num_rows={"train": 3, "dev": 2, "test": 9},
        summary=summary_of("hybrid", test=None, rewards=rewards),
    )
    text = ModelCard(path.read_text()).text
    assert "| mean reward | 0.25 | none |" in text
    assert "test rows" not in text
