"""A run on a quantised base, from training to a folder that plain transformers and peft load."""

from __future__ import annotations

import logging
import shutil

import peft
import pytest
import torch
import transformers as hf
from rich.console import Console

from tests.support.quantized import KINDS
from zofo.config.load import load_config
from zofo.console import quiet
from zofo.disk.files import fingerprint
from zofo.errors import UserError
from zofo.optim.blocks import split_parameters
from zofo.perturb.quantized import Scales, has_codes
from zofo.run.train import resumed_config, train
from zofo.saved.artifact import load
from zofo.saved.export import export_model, replay_base
from zofo.saved.export_check import logits_of, sample_inputs
from zofo.saved.source import open_source
from zofo.saved.verify import verify

pytest.importorskip("bitsandbytes")
QUIET = Console(quiet=True)


@pytest.fixture(scope="module")
def trained(tmp_path_factory, decoder_folder):
    """Return a function that trains each kind of run once and gives its folder.

    "nested" is a folder of bitsandbytes with double quantisation. The other kinds are quantised
    while they load.
    """
    logging.getLogger("bitsandbytes.autograd._functions").setLevel(logging.ERROR)
    root = tmp_path_factory.mktemp("runs")
    rows = [f"film {i} is {('great', 'dull')[i % 2]},{('good', 'bad')[i % 2]}" for i in range(60)]
    (root / "reviews.csv").write_text("\n".join(["text,label", *rows]) + "\n")
    model = hf.AutoModelForCausalLM.from_pretrained(
        decoder_folder,
        quantization_config=hf.BitsAndBytesConfig(**KINDS["nested"]),
        dtype=torch.float32,
        device_map={"": "cpu"},
    )
    model.save_pretrained(root / "nested")
    hf.AutoTokenizer.from_pretrained(decoder_folder).save_pretrained(root / "nested")

    def get(kind="nf4", adapter="lora", method="hybrid"):
        folder = root / f"{kind}-{adapter}-{method}"
        if folder.exists():
            return folder
        values = {
            "model": root / "nested" if kind == "nested" else decoder_folder,
            "method": method,
            "adapter": adapter,
            "task": "classification",
            "task.train": root / "reviews.csv",
            "task.num_train": 24,
            "task.num_dev": 8,
            "task.num_test": 8,
            "steps": 6,
            "eval_every": 3,
            "batch_size": 4,
            "base_lr": 1e-3,
            "adapter_lr": 0.05,
            "select_best": "false",
            "output_dir": folder,
        }
        if kind != "nested":
            values["model.quantization"] = kind
        train(load_config(overrides=[f"{k}={v}" for k, v in values.items()]), console=QUIET)
        return folder

    return get


CASES = [
    *(("nf4", adapter, "hybrid") for adapter in ("lora", "prefix", "prompt")),
    ("int8", "lora", "hybrid"),
    ("nested", "lora", "hybrid"),
    ("fp4", "none", "zo-ft"),
    ("nested", "lora", "fo-peft"),
]


@pytest.mark.parametrize(("kind", "adapter", "method"), CASES)
def test_an_export_gives_the_logits_of_the_trained_model_bit_for_bit(
    trained, tmp_path, kind, adapter, method
):
    folder = trained(kind, adapter, method)
    assert all(check.is_sound for check in verify(folder))
    artefact = load(folder)
    samples = sample_inputs(open_source(folder), artefact.model, artefact.tokenizer)
    expected = logits_of(artefact.model, samples)

    exported = export_model(folder, tmp_path / "plain")
    assert exported.is_merged == (adapter == "none")
    assert exported.max_logit_difference == 0
    with quiet():
        plain = hf.AutoModelForCausalLM.from_pretrained(
            tmp_path / "plain", device_map={"": "cpu"}
        ).eval()
        assert has_codes(plain)
        if adapter != "none":
            plain = peft.PeftModel.from_pretrained(plain, str(tmp_path / "plain" / "adapter"))
    found = logits_of(plain.eval(), samples)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    assert all(check.is_sound for check in verify(tmp_path / "plain"))


def test_a_merge_into_codes_is_made_on_request_and_measured(trained, tmp_path):
    exported = export_model(trained("nf4"), tmp_path / "merged", merge=True)
    assert exported.is_merged
    assert exported.is_changed
    assert 0 < exported.max_logit_difference < exported.tolerance
    assert "rounded the adapter into the codes" in (tmp_path / "merged" / "README.md").read_text()


def test_the_dtype_of_a_quantised_export_is_its_own(trained, tmp_path):
    with pytest.raises(UserError, match=r"dtype is bfloat16, and the base is quantised.*leave"):
        export_model(trained("nf4"), tmp_path / "plain", dtype="bfloat16")
    assert not (tmp_path / "plain").exists()


def test_a_replayed_base_is_the_one_of_that_step(trained, tmp_path):
    folder = trained("nf4")
    bases = []
    for step in (0, 6):
        replay_base(folder, tmp_path / str(step), step)
        with quiet():
            model = hf.AutoModelForCausalLM.from_pretrained(
                tmp_path / str(step), device_map={"": "cpu"}
            )
        bases.append({n: p.clone() for n, p in split_parameters(model).base.items()})
    trained_base = split_parameters(load(folder).model).base
    assert fingerprint(bases[1]) == fingerprint(trained_base)
    moved = [n for n, p in trained_base.items() if not torch.equal(p, bases[0][n])]
    assert sorted(moved) == sorted(split_parameters(load(folder).model).movable)
    assert any(isinstance(trained_base[name], Scales) for name in moved)


@pytest.mark.parametrize("case", [("nf4",), ("int8",), ("nested",), ("fp4", "none", "zo-ft")])
def test_a_resumed_run_ends_as_the_uninterrupted_one(trained, tmp_path, case):
    whole = trained(*case)
    stopped = tmp_path / "stopped"
    shutil.copytree(whole, stopped, ignore=shutil.ignore_patterns("checkpoint-6", "artifact"))
    (stopped / "result.json").unlink()
    train(resumed_config(stopped), resume=stopped, console=QUIET)
    models = [load(folder).model for folder in (whole, stopped)]
    assert fingerprint(split_parameters(models[0]).base) == fingerprint(
        split_parameters(models[1]).base
    )
    assert fingerprint(split_parameters(models[0]).adapter) == fingerprint(
        split_parameters(models[1]).adapter
    )
