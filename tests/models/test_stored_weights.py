"""Weights read from their files one at a time equal the loaded weights, bit for bit."""

import re
import shutil

import pytest
import torch
import transformers as hf
from safetensors.torch import load_file, save_file

from tests.support.hub_folders import make_tokenizer
from tests.support.models import assert_same_bits, build
from tests.support.trainers import Rows, arguments
from zofo.disk.files import StoredTensors
from zofo.errors import UserError
from zofo.models.adapters import create_adapter
from zofo.models.loading import copy_weights, load_model, stored_weights
from zofo.optim.blocks import split_parameters
from zofo.trainer.mixin import HybridTrainer

FILE = "model.safetensors"


def rewrite(folder, change):
    """Change the names or dtypes of the tensors in a folder."""
    tensors = load_file(folder / FILE)
    save_file({k: t for old in tensors for k, t in change(old, tensors[old])}, folder / FILE)


def without_prefix(name, tensor):
    return [(name.removeprefix("model."), tensor)]


def in_bfloat16(name, tensor):
    return [(name, tensor.bfloat16())]


def in_shards(folder):
    hf.AutoModelForCausalLM.from_pretrained(folder).save_pretrained(folder, max_shard_size="10KB")
    (folder / FILE).unlink()
    assert len(list(folder.glob("model-*-of-*.safetensors"))) > 1


FORMS = {
    "tied": lambda folder: None,
    "prefixed": lambda folder: rewrite(folder, without_prefix),
    "bfloat16": lambda folder: rewrite(folder, in_bfloat16),
    "sharded": in_shards,
}


@pytest.fixture
def folder(tmp_path, decoder_folder):
    shutil.copytree(decoder_folder, tmp_path / "base")
    return tmp_path / "base"


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("adapter", [None, "lora", "prefix"])
@pytest.mark.parametrize("form", FORMS)
def test_every_weight_is_found_whatever_the_form_of_the_files(folder, form, adapter, dtype):
    FORMS[form](folder)
    model, _ = load_model(str(folder), dtype=dtype)
    if adapter is not None:
        model = create_adapter(model, adapter)
    base = split_parameters(model).base
    stored = stored_weights(str(folder), model, base)
    assert isinstance(stored, StoredTensors)
    assert_same_bits(dict(stored), base)


def test_an_encoder_whose_head_is_fresh_is_not_found(encoder_folder):
    model, _ = load_model(encoder_folder, head="classification")
    base = dict(model.named_parameters())
    assert stored_weights(encoder_folder, model, base) is None
    del base["classifier.weight"], base["classifier.bias"]
    assert_same_bits(dict(stored_weights(encoder_folder, model, base)), base)


def as_pickle(folder):
    torch.save(load_file(folder / FILE), folder / "pytorch_model.bin")
    (folder / FILE).unlink()


def of_another_model(folder):
    rewrite(folder, lambda name, t: [(name, t + (name == "model.norm.weight"))])


def elsewhere(folder):
    (folder / FILE).rename(folder / "other.safetensors")


@pytest.mark.parametrize("change", [as_pickle, of_another_model, elsewhere])
def test_what_the_files_do_not_hold_bit_for_bit_is_not_found(folder, change):
    model, _ = load_model(str(folder))
    change(folder)
    assert stored_weights(str(folder), model, dict(model.named_parameters())) is None


def test_weights_under_the_names_of_another_version_are_not_found(tmp_path):
    tokenizer = make_tokenizer()
    sizes = dict.fromkeys(("hidden_size", "intermediate_size", "max_position_embeddings"), 16)
    config = hf.BertConfig(
        vocab_size=len(tokenizer), num_hidden_layers=1, num_attention_heads=2, **sizes
    )
    saved = hf.BertForSequenceClassification(config)
    saved.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    rewrite(tmp_path, lambda name, t: [(re.sub("LayerNorm.weight$", "LayerNorm.gamma", name), t)])
    model, _ = load_model(str(tmp_path), head="classification")  # transformers knows the old name.
    assert_same_bits(dict(model.named_parameters()), dict(saved.named_parameters()))
    assert stored_weights(str(tmp_path), model, dict(model.named_parameters())) is None


def test_the_original_base_of_another_run_is_refused(tmp_path):
    model = build("llama", "lora")
    wrong = {name: p.detach() + 1 for name, p in split_parameters(model).base.items()}
    trainer = HybridTrainer(
        model=model,
        args=arguments(
            tmp_path,
            eval_strategy="steps",
            eval_steps=1,
            save_strategy="steps",
            save_steps=1,
            load_best_model_at_end=True,
            metric_for_best_model="eval_loss",
        ),
        train_dataset=Rows(),
        eval_dataset=Rows(4, seed=2),
        original_base=lambda: wrong,
    )
    with pytest.raises(UserError, match="load the base that the run began with"):
        trainer.train()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_whole_model_is_copied_into_the_live_one(folder, dtype):
    saved = hf.AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
    live = hf.AutoModelForCausalLM.from_config(saved.config, dtype=dtype)
    places = {name: p.data_ptr() for name, p in live.named_parameters()}
    saved.save_pretrained(folder)
    assert copy_weights(folder, live)
    assert_same_bits(dict(live.named_parameters()), dict(saved.named_parameters()))
    assert places == {name: p.data_ptr() for name, p in live.named_parameters()}


def one_missing(folder):
    rewrite(folder, lambda name, t: [] if name == "model.norm.weight" else [(name, t)])


def one_too_many(folder):
    rewrite(folder, lambda name, t: [(name, t), (f"{name}.more", t.clone())])


@pytest.mark.parametrize("change", [one_missing, one_too_many, in_shards, as_pickle])
def test_a_file_that_is_not_the_whole_model_is_left_to_others(folder, change):
    live = hf.AutoModelForCausalLM.from_pretrained(folder)
    before = {name: p.clone() for name, p in live.named_parameters()}
    change(folder)
    assert not copy_weights(folder, live)
    assert_same_bits(dict(live.named_parameters()), before)


def test_a_weight_of_another_shape_is_refused(folder):
    live = hf.AutoModelForCausalLM.from_pretrained(folder)
    rewrite(folder, lambda name, t: [(name, t[:1].clone())])
    with pytest.raises(UserError, match="in another shape"):
        copy_weights(folder, live)
