"""Tests of whole runs of a tiny model: their files, their measurements, and loading them again."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from rich.console import Console

from tests.support.models import assert_same_bits
from tests.support.trainers import untimed_metrics
from zofo.config.load import load_config
from zofo.errors import UserError
from zofo.optim.blocks import split_parameters
from zofo.optim.methods import METHODS
from zofo.run.cost import forward_equivalents
from zofo.run.plan import make_plan
from zofo.run.train import resumed_config, train
from zofo.saved.artifact import load
from zofo.scoring.score import evaluate_artifact

QUIET = Console(quiet=True)


@pytest.fixture(scope="module")
def reviews(tmp_path_factory):
    """Write rows that the tiny model can learn, because the label stands in the text."""
    path = tmp_path_factory.mktemp("data") / "reviews.csv"
    lines = ["text,label"]
    for i in range(120):
        word, label = (("great warm", "good"), ("dull mess", "bad"))[i % 2]
        lines.append(f"the film number {i} is a {word} story,{label}")
    path.write_text("\n".join(lines) + "\n")
    return str(path)


def config_for(folder, reviews, model, *more):
    return load_config(
        overrides=[
            f"model={model}",
            "task=classification",
            f"task.train={reviews}",
            "task.num_train=60",
            "task.num_dev=20",
            "task.num_test=30",
            "steps=6",
            "eval_every=3",
            "log_every=1",
            "batch_size=4",
            f"output_dir={folder}",
            *more,
        ]
    )


@pytest.mark.parametrize("method", METHODS)
def test_what_a_run_leaves_is_the_model_it_measured(tmp_path, reviews, decoder_folder, method):
    config = config_for(tmp_path / "run", reviews, decoder_folder, f"method={method}")
    result = train(config, console=QUIET)
    artifact = load(tmp_path / "run")
    assert evaluate_artifact(artifact, config.task, seed=config.seed) == result.after
    assert artifact.method == method
    saved = json.loads((tmp_path / "run" / "result.json").read_text())
    assert saved["test"]["after"] == result.after.as_dict()
    assert resumed_config(tmp_path / "run") == config
    lines = [json.loads(x) for x in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    assert [x["step"] for x in lines if "loss" in x] == [1, 2, 3, 4, 5, 6]
    assert [x["step"] for x in lines if "eval_loss" in x] == [3, 6]


@pytest.mark.parametrize("adapter", ["lora", "prefix", "prompt"])
def test_every_adapter_on_decoders_and_encoders(
    tmp_path, reviews, decoder_folder, encoder_folder, adapter
):
    for name, model in (("decoder", decoder_folder), ("encoder", encoder_folder)):
        config = config_for(tmp_path / name, reviews, model, f"adapter={adapter}")
        result = train(config, console=QUIET)
        assert evaluate_artifact(load(tmp_path / name), config.task) == result.after


def test_a_run_learns(tmp_path, reviews, decoder_folder):
    config = config_for(
        tmp_path / "run", reviews, decoder_folder, "steps=60", "adapter_lr=0.02", "eval_every=20"
    )
    result = train(config, console=QUIET)
    assert result.before.auc < 0.8 < 0.95 < result.after.auc


def test_two_runs_of_one_configuration_are_equal(tmp_path, reviews, decoder_folder):
    results = []
    for seed, name in enumerate(("a", "b")):
        torch.manual_seed(seed)
        results.append(
            train(config_for(tmp_path / name, reviews, decoder_folder), console=QUIET).after
        )
    assert results[0] == results[1]
    models = [dict(load(tmp_path / n).model.named_parameters()) for n in ("a", "b")]
    assert_same_bits(*models)


def test_a_resumed_run_ends_like_the_uninterrupted_one(tmp_path, reviews, decoder_folder):
    config = config_for(tmp_path / "run", reviews, decoder_folder, "select_best=false")
    whole = train(config, console=QUIET)
    uninterrupted = dict(load(tmp_path / "run").model.named_parameters())
    metrics = untimed_metrics(tmp_path / "run" / "metrics.jsonl")
    shutil.rmtree(tmp_path / "run" / "checkpoint-6")
    shutil.rmtree(tmp_path / "run" / "artifact")
    again = train(resumed_config(tmp_path / "run"), resume=tmp_path / "run", console=QUIET)
    assert again.after == whole.after
    assert_same_bits(uninterrupted, dict(load(tmp_path / "run").model.named_parameters()))
    assert untimed_metrics(tmp_path / "run" / "metrics.jsonl") == metrics


def test_the_artefact_is_small_and_bound_to_its_base(tmp_path, reviews, decoder_folder):
    base = tmp_path / "base"
    shutil.copytree(decoder_folder, base)
    train(config_for(tmp_path / "run", reviews, base), console=QUIET)
    folder = tmp_path / "run" / "artifact"
    size = sum(f.stat().st_size for f in folder.rglob("*") if f.is_file())
    assert size < sum(f.stat().st_size for f in base.glob("*.safetensors"))

    from transformers import AutoModelForCausalLM

    other = AutoModelForCausalLM.from_pretrained(base)
    with torch.no_grad():
        other.model.norm.weight[0] += 1
    other.save_pretrained(base)
    with pytest.raises(UserError, match="load the base that the run began with"):
        load(folder)


def test_plain_peft_does_not_load_the_artefact(tmp_path, reviews, decoder_folder):
    import peft
    from transformers import AutoModelForCausalLM

    train(config_for(tmp_path / "run", reviews, decoder_folder), console=QUIET)
    plain = AutoModelForCausalLM.from_pretrained(decoder_folder)
    with pytest.raises((ValueError, OSError)):
        peft.PeftModel.from_pretrained(plain, str(tmp_path / "run" / "artifact"))


def test_a_folder_in_use_is_refused(tmp_path, reviews, decoder_folder):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "notes.txt").write_text("mine")
    with pytest.raises(UserError, match="not empty"):
        train(config_for(tmp_path / "run", reviews, decoder_folder), console=QUIET)
    assert [f.name for f in (tmp_path / "run").iterdir()] == ["notes.txt"]


def test_nothing_is_written_when_the_data_are_wrong(tmp_path, decoder_folder):
    (tmp_path / "bad.csv").write_text("text,label\nfine,good\n,bad\n")
    with pytest.raises(UserError, match="row 2"):
        train(config_for(tmp_path / "run", tmp_path / "bad.csv", decoder_folder), console=QUIET)
    assert not (tmp_path / "run").exists()


def test_an_encoder_is_no_writer(tmp_path, encoder_folder):
    path = tmp_path / "a.jsonl"
    path.write_text(
        "".join(json.dumps({"prompt": f"p{i}", "completion": "c"}) + "\n" for i in range(9))
    )
    config = load_config(
        overrides=[f"model={encoder_folder}", "task=completion", f"task.train={path}"]
    )
    with pytest.raises(UserError, match="choose a decoder"):
        make_plan(config)


def test_a_plan_counts_what_a_run_has(tmp_path, reviews, decoder_folder):
    config = config_for(tmp_path / "run", reviews, decoder_folder, "base_lr={'*q_proj*': 1e-4}")
    plan = make_plan(config)
    from zofo.run.prepare import prepare

    blocks = split_parameters(prepare(config).model)
    total = sum(p.numel() for p in blocks.base.values())
    moved = sum(p.numel() for name, p in blocks.base.items() if "q_proj" in name)
    assert plan.num_parameters["base"] == ("zeroth", moved, total)
    adapter = sum(p.numel() for p in blocks.adapter.values())
    assert plan.num_parameters["adapter"] == ("first", adapter, adapter)
    assert plan.num_rows == {"train": 60, "dev": 20, "test": 30}
    assert plan.memory_bytes["optimizer states"] == 2 * 4 * adapter
    assert not Path(config.output_dir).exists()


@pytest.mark.parametrize(
    ("options", "cost"),
    [
        (["method=fo-peft"], 20),
        (["method=hybrid"], 30),
        (["method=hybrid", "estimator=central", "num_directions=2"], 60),
        (["method=zo-ft"], 20),
        (["method=fo-ft"], 30),
        (["method=hybrid", "accumulation=2"], 60),
    ],
)
def test_forward_equivalents(options, cost):
    assert forward_equivalents(load_config(overrides=options), 10) == cost
