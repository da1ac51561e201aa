"""An exported folder gives tools that do not know zofo the trained model."""

import dataclasses
import json
import shutil

import numpy as np
import peft
import pytest
import torch
import transformers as hf
from rich.console import Console

import zofo
from tests.support.hub_folders import make_tokenizer
from tests.support.models import ADAPTERS, ARCHITECTURES, ENCODERS, LORA_TARGETS, build
from zofo.config.load import load_config
from zofo.console import quiet
from zofo.disk.files import fingerprint
from zofo.errors import UserError
from zofo.models.loading import DTYPES
from zofo.optim.blocks import split_parameters
from zofo.optim.methods import METHODS
from zofo.optim.trajectory import GroupSpec, Trajectory, Update
from zofo.run.train import train
from zofo.saved import export_check
from zofo.saved.artifact import BaseSpec, load, save_artifact
from zofo.saved.export import export_model
from zofo.saved.export_card import EXPORT_FILE
from zofo.saved.source import open_source
from zofo.scoring.evaluate import predict_scores
from zofo.tasks.encode import Collator, Encoder
from zofo.tasks.load import load_splits
from zofo.tasks.spec import TaskSpec

QUIET = Console(quiet=True)
CASES = [
    (head, method, adapter)
    for head in ("decoder", "encoder")
    for method, orders in METHODS.items()
    for adapter in (("lora", "prefix", "prompt") if orders.needs_adapter else ("none",))
]
CASES += [("decoder", "hybrid", adapter) for adapter in ("dora", "rslora", "ia3", "p-tuning")]
TELLING = ("hybrid", "zo-ft", "fo-ft")
"""Methods that the default run exports with every adapter and head.

The others leave the base as it was. The default run exports them with one adapter that is merged
and one that is not.
"""


def some(cases):
    """Mark as slow the cases that add little to the others."""

    def is_telling(head, method, adapter):
        return method in TELLING or (head == "decoder" and adapter in ("lora", "prefix"))

    return [
        pytest.param(*case, marks=[] if is_telling(*case) else [pytest.mark.slow]) for case in cases
    ]


@pytest.fixture(scope="module")
def trained(tmp_path_factory, decoder_folder, encoder_folder):
    """Return a function that trains each kind of run once and gives its folder."""
    root = tmp_path_factory.mktemp("runs")
    lines = ["text,label"]
    for i in range(80):
        word, label = (("great warm", "good"), ("dull mess", "bad"))[i % 2]
        lines.append(f"the film number {i} is a {word} story,{label}")
    (root / "reviews.csv").write_text("\n".join(lines) + "\n")
    folders = {"decoder": decoder_folder, "encoder": encoder_folder}

    def get(head="decoder", method="hybrid", adapter="lora", dtype="float32"):
        folder = root / f"{head}-{method}-{adapter}-{dtype}"
        if not folder.exists():
            values = [
                f"model={folders[head]}",
                f"model.dtype={dtype}",
                f"method={method}",
                f"adapter={adapter}",
                "task=classification",
                f"task.train={root / 'reviews.csv'}",
                "task.num_train=40",
                "task.num_dev=8",
                "task.num_test=30",
                "steps=6",
                "eval_every=3",
                "batch_size=4",
                "base_lr=1e-4",
                "adapter_lr=0.05",
                "select_best=false",
                f"output_dir={folder}",
            ]
            train(load_config(overrides=values), console=QUIET)
        return folder

    return get


def plainly(exported, head="decoder"):
    """Return the model and the tokenizer as a user without zofo loads them."""
    kind = hf.AutoModelForCausalLM if head == "decoder" else hf.AutoModelForSequenceClassification
    with quiet():
        model = kind.from_pretrained(exported.path)
        if not exported.is_merged:
            model = peft.PeftModel.from_pretrained(model, str(exported.path / "adapter"))
    return model.eval(), hf.AutoTokenizer.from_pretrained(exported.path)


def scores_of(model, tokenizer, artifact):
    spec = TaskSpec(**artifact.task)
    rows = load_splits(spec, seed=artifact.base.seed).test
    encoder = Encoder(tokenizer, head=artifact.base.head, max_length=spec.max_length)
    encoded = [encoder(row) for row in rows]
    return np.array(predict_scores(model, encoded, Collator(tokenizer.pad_token_id)))


@pytest.mark.parametrize(("head", "method", "adapter"), some(CASES))
def test_plain_libraries_predict_as_the_trained_model(tmp_path, trained, head, method, adapter):
    run = trained(head, method, adapter)
    exported = zofo.export_model(run, tmp_path / "plain")
    assert exported.is_merged == (adapter not in ("prefix", "prompt", "p-tuning"))
    assert exported.max_logit_difference <= exported.tolerance
    assert "8 test rows of classification" in exported.inputs
    artifact = load(run)
    expected = scores_of(artifact.model, artifact.tokenizer, artifact)
    found = scores_of(*plainly(exported, head), artifact)
    assert np.array_equal(found.argmax(1), expected.argmax(1))
    assert found == pytest.approx(expected, abs=1e-4)
    # The trained model differs from the original, so the agreement above means something.
    base, tokenizer = artifact.base.load()
    samples = export_check.sample_inputs(open_source(run), base, tokenizer)
    logits = [export_check.logits_of(m.eval(), samples) for m in (base, artifact.model)]
    assert not export_check.deviation(*logits).within(1e-3)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("adapter", [*ADAPTERS, "tied", "dora", "ia3", "p-tuning"])
def test_other_architectures_and_adapters(tmp_path, architecture, adapter):
    head = "classification" if architecture in ENCODERS else "causal-lm"
    task = "SEQ_CLS" if architecture in ENCODERS else "CAUSAL_LM"
    build(architecture, None).save_pretrained(tmp_path / "base")
    make_tokenizer().save_pretrained(tmp_path / "base")
    base = BaseSpec(str(tmp_path / "base"), head=head)
    shared = {"task_type": task, "init_lora_weights": False}
    shared["fan_in_fan_out"] = architecture == "gpt2"
    targets = LORA_TARGETS[architecture]
    embedding = {"opt": "embed_tokens", "gpt2": "wte", "bert": "word_embeddings"}
    configs = {
        "lora": peft.LoraConfig(**shared, target_modules=targets),
        "dora": peft.LoraConfig(**shared, target_modules=targets, use_dora=True),
        # If the output layer shares this weight, merging would change the output layer too.
        "tied": peft.LoraConfig(
            **{**shared, "fan_in_fan_out": False},
            target_modules=[embedding.get(architecture, "embed_tokens")],
        ),
        "ia3": peft.IA3Config(
            task_type=task,
            target_modules=targets,
            feedforward_modules=[],
            init_ia3_weights=False,
            fan_in_fan_out=architecture == "gpt2",
        ),
        "prefix": peft.PrefixTuningConfig(task_type=task, num_virtual_tokens=3),
        "prompt": peft.PromptTuningConfig(task_type=task, num_virtual_tokens=3),
        "p-tuning": peft.PromptEncoderConfig(
            task_type=task, num_virtual_tokens=3, encoder_hidden_size=8
        ),
    }
    with quiet():
        model = peft.get_peft_model(base.load()[0], configs[adapter])
    moved = split_parameters(model).base
    before = fingerprint(moved)
    groups = (GroupSpec(tuple(moved), tuple(range(len(moved)))),)
    updates = [(Update(step, (2.0,), 1e-2, 0.0),) for step in range(3)]
    trajectory = Trajectory(3, "rademacher", 1e-3, "forward", groups, updates)
    trajectory.replay(moved)
    save_artifact(
        tmp_path / "artifact",
        model,
        base=base,
        method="hybrid",
        trajectory=trajectory,
        base_fingerprint=before,
    )
    exported = export_model(tmp_path / "artifact", tmp_path / "plain")
    is_tied = adapter == "tied" and architecture not in ENCODERS
    assert exported.is_merged == (adapter in ("lora", "dora", "ia3", "tied") and not is_tied)
    assert "random" in exported.inputs


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("adapter", ["lora", "prompt"])
def test_weights_have_the_dtype_asked_for(tmp_path, trained, dtype, adapter):
    exported = export_model(trained(adapter=adapter), tmp_path / "plain", dtype=dtype)
    model = hf.AutoModelForCausalLM.from_pretrained(exported.path)
    assert {p.dtype for p in model.parameters()} == {DTYPES[dtype]}
    assert json.loads((exported.path / "config.json").read_text())["dtype"] == dtype


@pytest.mark.parametrize("dtype", [None, "float32"])
@pytest.mark.parametrize("adapter", ["lora", "prefix"])
def test_a_low_precision_base(tmp_path, trained, adapter, dtype):
    exported = export_model(
        trained(adapter=adapter, dtype="bfloat16"), tmp_path / "plain", dtype=dtype
    )
    assert exported.dtype == (dtype or "bfloat16")
    assert exported.max_logit_difference <= exported.tolerance


def test_a_merged_weight_is_rounded_once(tmp_path, trained):
    run = trained()
    wide = export_model(run, tmp_path / "wide")
    narrow = export_model(run, tmp_path / "narrow", dtype="bfloat16")
    wide, narrow = (plainly(x)[0].state_dict() for x in (wide, narrow))
    assert all(torch.equal(wide[k].bfloat16(), narrow[k]) for k in wide)


@pytest.mark.parametrize("method", ["hybrid", "fo-peft", "zo-ft", "fo-ft"])
def test_a_checkpoint(tmp_path, trained, method):
    run = trained(method=method, adapter="lora" if METHODS[method].needs_adapter else "none")
    last = plainly(export_model(run / "checkpoint-6", tmp_path / "last"))[0].state_dict()
    whole = plainly(export_model(run, tmp_path / "whole"))[0].state_dict()
    assert all(torch.equal(last[k], whole[k]) for k in whole)
    earlier = plainly(export_model(run / "checkpoint-3", tmp_path / "earlier"))[0].state_dict()
    assert any(not torch.equal(earlier[k], whole[k]) for k in whole)


def test_a_checkpoint_of_an_unfinished_run(tmp_path, trained):
    run = tmp_path / "run"
    shutil.copytree(trained(), run)
    shutil.rmtree(run / "artifact")
    export_model(run / "checkpoint-6", tmp_path / "plain")
    with pytest.raises(UserError, match="neither a finished run nor an artefact"):
        export_model(run, tmp_path / "other")
    weights = run / "checkpoint-6" / "adapter_model.safetensors"
    sound = weights.read_bytes()
    weights.write_bytes(sound[:-1] + bytes([sound[-1] ^ 1]))
    with pytest.raises(UserError, match="digest"):
        export_model(run / "checkpoint-6", tmp_path / "other")
    weights.write_bytes(sound)
    shutil.copytree(run / "checkpoint-6", tmp_path / "checkpoint-6")
    with pytest.raises(UserError, match="outside a run folder"):
        export_model(tmp_path / "checkpoint-6", tmp_path / "other")


def test_the_folder_is_complete_and_plain(tmp_path, trained, decoder_folder):
    exported = export_model(trained(), tmp_path / "plain")
    names = {f.name for f in exported.path.iterdir()}
    assert names >= {"config.json", "model.safetensors", "tokenizer.json", "README.md", EXPORT_FILE}
    assert not any(f.suffix in (".bin", ".pt", ".pkl") for f in exported.path.rglob("*"))
    config = json.loads((exported.path / "config.json").read_text())
    assert config["use_cache"] is True
    card = (exported.path / "README.md").read_text()
    for text in (card, (exported.path / EXPORT_FILE).read_text()):
        assert str(tmp_path) not in text
        assert decoder_folder not in text
    assert exported.size_bytes == sum(f.stat().st_size for f in exported.path.iterdir())
    found: dict = {}
    exec(exported.usage, found)
    assert isinstance(found["model"], hf.LlamaForCausalLM)


def test_an_adapter_apart_points_to_the_exported_base(tmp_path, trained):
    exported = export_model(trained(adapter="prefix"), tmp_path / "plain")
    config = json.loads((exported.path / "adapter" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == str(exported.path)
    assert not [key for key in config if "zofo" in key]
    found: dict = {}
    exec(exported.usage, found)
    assert isinstance(found["model"], peft.PeftModel)
    with quiet():
        peft.AutoPeftModelForCausalLM.from_pretrained(str(exported.path / "adapter"))


def test_labels_have_their_names(tmp_path, trained):
    exported = export_model(trained("encoder"), tmp_path / "plain")
    pipe = hf.pipeline("text-classification", model=str(exported.path), device="cpu")
    assert pipe("a great warm story")[0]["label"] in ("good", "bad")


def test_large_models_are_sharded(tmp_path, trained):
    exported = export_model(trained(), tmp_path / "plain", max_shard_size="60KB")
    assert len(list(exported.path.glob("model-*.safetensors"))) > 1
    assert (exported.path / "model.safetensors.index.json").exists()


def test_without_the_data_random_tokens_are_compared(tmp_path, trained):
    source = open_source(trained())
    model, tokenizer = source.load()
    gone = dataclasses.replace(source, task={**source.task, "train": "nowhere.csv"})
    samples = export_check.sample_inputs(gone, model, tokenizer)
    assert "random" in samples.origin
    no_task = dataclasses.replace(source, task=None)
    assert samples == export_check.sample_inputs(no_task, model, tokenizer)


@pytest.mark.parametrize("where", ["merge", "disk", "logits", "tokenizer"])
def test_a_folder_that_is_not_the_model_is_refused(tmp_path, trained, monkeypatch, where):
    run, save = trained(), hf.LlamaForCausalLM.save_pretrained
    if where == "merge":  # This model is exported without merging.
        monkeypatch.setattr(peft.tuners.lora.Linear, "get_delta_weight", lambda *_: torch.ones(()))
        assert not export_model(run, tmp_path / "plain").is_merged
        return
    if where == "disk":

        def damaged(self, *args, **kwargs):
            self.model.norm.weight.data[0] += 1
            save(self, *args, **kwargs)
            self.model.norm.weight.data[0] -= 1

        monkeypatch.setattr(hf.LlamaForCausalLM, "save_pretrained", damaged)
    elif where == "logits":
        monkeypatch.setattr("zofo.saved.export.tolerance_of", lambda *_: 1e-12)
        run = trained(adapter="prefix", dtype="bfloat16")
    else:
        other = hf.AutoTokenizer.from_pretrained(open_source(run).base.name)
        other.add_tokens(["film"])
        monkeypatch.setattr("zofo.saved.source.Source.plain_tokenizer", lambda _: other)
    words = {"disk": "model.norm.weight", "logits": "logits differ", "tokenizer": "splits"}[where]
    with pytest.raises(UserError, match=words):
        export_model(run, tmp_path / "plain", dtype="float32")
    assert not list(tmp_path.iterdir())


def test_refused_before_anything_is_loaded(tmp_path, trained, monkeypatch):
    monkeypatch.setattr("zofo.saved.source.Source.load", lambda _: pytest.fail("loaded"))
    run = trained()
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "notes.txt").write_text("mine")
    with pytest.raises(UserError, match="not empty"):
        export_model(run, tmp_path / "full")
    assert [f.name for f in (tmp_path / "full").iterdir()] == ["notes.txt"]
    with pytest.raises(UserError, match="choose one of"):
        export_model(run, tmp_path / "plain", dtype="int8")
    with pytest.raises(UserError, match="5GB"):
        export_model(run, tmp_path / "plain", max_shard_size="big")
    with pytest.raises(UserError, match="does not exist"):
        export_model(tmp_path / "none", tmp_path / "plain")


def test_an_empty_folder_is_filled_and_a_file_in_the_way_is_reported(tmp_path, trained):
    (tmp_path / "empty").mkdir()
    export_model(trained(), tmp_path / "empty")
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"cannot be written, because .*file is a file"):
        export_model(trained(), tmp_path / "file" / "plain")


def test_a_full_disk_leaves_nothing(tmp_path, trained, monkeypatch):
    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(hf.LlamaForCausalLM, "save_pretrained", full)
    with pytest.raises(UserError, match="No space left"):
        export_model(trained(), tmp_path / "plain")
    assert not list(tmp_path.iterdir())


def test_deviation_notices_nan():
    one, nan = [torch.ones(2)], [torch.tensor([1.0, float("nan")])]
    assert export_check.deviation(one, one).within(0)
    assert not export_check.deviation(nan, one).within(1e9)
    assert not export_check.deviation(one, nan).within(1e9)
