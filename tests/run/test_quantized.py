"""Runs on quantised bases: training, artefacts, resuming, plans, refusals, studies."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
import transformers as hf
from rich.console import Console

from tests.support.models import assert_same_bits
from zofo.config.load import load_config
from zofo.errors import UserError
from zofo.models.loading import load_model
from zofo.models.quantized import num_weights, quantized_bytes
from zofo.optim.blocks import split_parameters
from zofo.run.plan import make_plan
from zofo.run.prepare import prepare
from zofo.run.train import resumed_config, train
from zofo.saved.artifact import load, read_header
from zofo.scoring.score import evaluate_artifact
from zofo.smoothness.blocks import blocks_of
from zofo.smoothness.measure import measure_run
from zofo.smoothness.options import SmoothnessOptions
from zofo.study.entries import label_of

pytest.importorskip("bitsandbytes")
QUIET = Console(quiet=True)


@pytest.fixture(scope="module")
def reviews(tmp_path_factory):
    path = tmp_path_factory.mktemp("data") / "reviews.csv"
    words = (("great warm", "good"), ("dull mess", "bad"))
    lines = [f"the film {i} is a {words[i % 2][0]} story,{words[i % 2][1]}" for i in range(60)]
    path.write_text("\n".join(["text,label", *lines]) + "\n")
    return str(path)


@pytest.fixture(scope="module")
def nested_folder(tmp_path_factory, decoder_folder):
    """A folder of bitsandbytes in nf4 with double quantisation."""
    folder = str(tmp_path_factory.mktemp("nested"))
    config = hf.BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True
    )
    model = hf.AutoModelForCausalLM.from_pretrained(
        decoder_folder, quantization_config=config, dtype=torch.float32, device_map={"": "cpu"}
    )
    model.save_pretrained(folder)
    hf.AutoTokenizer.from_pretrained(decoder_folder).save_pretrained(folder)
    return folder


def config_for(folder, reviews, model, *more):
    return load_config(
        overrides=[
            *(f"model={model}", "task=classification", f"task.train={reviews}", "device=cpu"),
            *("task.num_train=30", "task.num_dev=10", "task.num_test=12", "batch_size=4"),
            *("steps=4", "eval_every=2", f"output_dir={folder}", *more),
        ]
    )


def trained(run, reviews, model, *more):
    config = config_for(run, reviews, model, *more)
    return config, train(config, console=QUIET)


@pytest.mark.parametrize(
    ("method", "quantization"), [("fo-peft", "nf4"), ("fo-peft", "int8"), ("zo-peft", "fp4")]
)
def test_the_artefact_loads_the_base_quantised_again(
    tmp_path, reviews, decoder_folder, monkeypatch, method, quantization
):
    loads = []
    inner = hf.LlamaForCausalLM.from_pretrained.__func__
    counted = classmethod(lambda cls, *a, **kw: loads.append(kw) or inner(cls, *a, **kw))
    monkeypatch.setattr(hf.LlamaForCausalLM, "from_pretrained", counted)
    options = f"method={method}", f"model.quantization={quantization}"
    config, result = trained(tmp_path / "run", reviews, decoder_folder, *options)
    assert len(loads) == 1
    header = read_header(tmp_path / "run" / "artifact")
    assert header["base"]["quantization"] == quantization
    assert quantization in (tmp_path / "run" / "artifact" / "README.md").read_text()
    artifact = load(tmp_path / "run")
    assert evaluate_artifact(artifact, config.task, seed=config.seed) == result.after
    original, _ = load_model(decoder_folder, quantization=quantization)
    assert quantized_bytes(artifact.model) == quantized_bytes(original)


def test_a_resumed_run_ends_like_the_uninterrupted_one(tmp_path, reviews, nested_folder):
    run = tmp_path / "run"
    _, whole = trained(run, reviews, nested_folder, "method=fo-peft", "select_best=false")
    uninterrupted = split_parameters(load(run).model).adapter
    shutil.rmtree(run / "checkpoint-4")
    shutil.rmtree(run / "artifact")
    again = train(resumed_config(run), resume=run, console=QUIET)
    assert again.after == whole.after
    assert_same_bits(uninterrupted, split_parameters(load(run).model).adapter)


@pytest.mark.parametrize("quantization", ["nf4", "int8"])
def test_the_plan_counts_what_a_run_holds(tmp_path, reviews, decoder_folder, quantization):
    options = "method=fo-peft", f"model.quantization={quantization}"
    config = config_for(tmp_path / "run", reviews, decoder_folder, *options)
    plan, model = make_plan(config), prepare(config).model
    parts = quantized_bytes(model)
    assert plan.memory_bytes["codes of the quantised layers"] == parts.codes
    assert plan.memory_bytes["scales of the quantised layers"] == parts.scales
    rest = sum(p.nbytes for p in model.parameters()) - parts.codes
    assert plan.memory_bytes["other weights"] == rest
    plain = split_parameters(load_model(decoder_folder)[0]).base.values()
    counted = num_weights(model, split_parameters(model).base.values())
    assert plan.num_parameters["base"][2] == counted == sum(p.numel() for p in plain)


def test_the_plan_of_a_moved_base_counts_unnested_scales(tmp_path, reviews, nested_folder):
    scales = {}
    for method in ("fo-peft", "hybrid"):
        config = config_for(tmp_path / "run", reviews, nested_folder, f"method={method}")
        scales[method] = make_plan(config).memory_bytes["scales of the quantised layers"]
        assert scales[method] == quantized_bytes(prepare(config).model).scales
    assert scales["hybrid"] != scales["fo-peft"]


def test_only_methods_that_move_the_base_unnest_its_scales(tmp_path, reviews, nested_folder):
    found = {}
    for method in ("fo-peft", "hybrid"):
        config = config_for(tmp_path / "run", reviews, nested_folder, f"method={method}")
        prepared = prepare(config)
        states = [getattr(p, "quant_state", None) for p in prepared.model.parameters()]
        notes = [note for note in prepared.splits.notes if "double quantisation" in note]
        found[method] = (sum(state.nested for state in states if state is not None), len(notes))
    assert found == {"fo-peft": (14, 0), "hybrid": (0, 1)}


def test_full_first_order_training_is_refused_before_any_work(
    tmp_path, reviews, decoder_folder, nested_folder
):
    options = "method=fo-ft", "model.quantization=nf4"
    with pytest.raises(UserError, match=r"fo-ft moves .* model\.quantization is nf4.*fo-peft"):
        config_for(tmp_path / "run", reviews, decoder_folder, *options)
    with pytest.raises(UserError, match=r"'fo-ft' updates the base, but 14 of its weights"):
        train(config_for(tmp_path / "run", reviews, nested_folder, "method=fo-ft"), console=QUIET)
    assert not (tmp_path / "run").exists()


def test_derivatives_of_a_quantised_base_are_refused(
    tmp_path, reviews, decoder_folder, nested_folder
):
    options = SmoothnessOptions()
    for model, more in ((decoder_folder, ["model.quantization=nf4"]), (nested_folder, [])):
        config = config_for(tmp_path / "run", reviews, model, "method=fo-peft", *more)
        with pytest.raises(UserError, match=r"base is quantised \(nf4\), and a loss has no"):
            measure_run(config, options, console=QUIET)
    assert not (tmp_path / "run").exists()
    with pytest.raises(UserError, match=r"base is quantised .*q_proj.* no derivatives in codes"):
        blocks_of(load_model(decoder_folder, quantization="int8")[0])


def test_a_quantised_model_of_a_study_has_a_name_of_its_own(tmp_path, reviews, decoder_folder):
    from zofo.results.table import read_runs

    assert label_of({"name": "org/base", "quantization": "nf4"}, "name") == "base-nf4"
    assert label_of({"name": "org/base", "quantization": "nf4", "label": "b"}, "name") == "b"
    config = config_for(
        tmp_path / "run", reviews, decoder_folder, "model.quantization=fp4", "method=fo-peft"
    )
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "run.yaml").write_text(config.to_yaml())
    (tmp_path / "run" / "metrics.jsonl").write_text(json.dumps({"step": 1, "loss": 1.0}) + "\n")
    assert read_runs([tmp_path / "run"]).table["model"].item().endswith("-fp4")
