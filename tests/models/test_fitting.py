"""Folders whose weights do not fit their model: what is mended, what is refused, what is new."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
import transformers as hf
from safetensors.torch import load_file, save_file

from tests.support.hub_folders import make_tokenizer
from zofo.errors import UserError
from zofo.models.adapters import create_adapter
from zofo.models.fitting import explained, new_weights, notes_on_new
from zofo.models.loading import empty_model, head_of, load_model, resolve
from zofo.optim.blocks import split_parameters

WEIGHTS = "model.safetensors"
POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 123456789\n"
WRAPPERS = {
    "compiled": lambda key: f"_orig_mod.{key}",
    "distributed": lambda key: f"module.{key}",
    "both": lambda key: f"module._orig_mod.{key}",
    "compiled inside": lambda key: key.replace("model.", "model._orig_mod.", 1),
    "attribute of a module": lambda key: f"net.{key}",
}


@pytest.fixture
def copied(tmp_path, decoder_folder):
    folder = tmp_path / "copy"
    shutil.copytree(decoder_folder, folder)
    return folder


def rewrite(folder, change):
    """Replace the weights by those that `change` makes of them."""
    changed = change(load_file(folder / WEIGHTS))
    save_file(changed, folder / WEIGHTS, metadata={"format": "pt"})


def edit(folder, **values):
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_names_of_wrappers_are_removed_and_said(copied, decoder_folder, tmp_path, wrapper):
    rewrite(copied, lambda held: {WRAPPERS[wrapper](key): t for key, t in held.items()})
    with pytest.warns(UserWarning, match="name of a wrapper, which was removed"):
        model, _ = load_model(str(copied))
    original = load_model(str(decoder_folder))[0].state_dict()
    assert all(torch.equal(t, original[name]) for name, t in model.state_dict().items())
    model.save_pretrained(tmp_path / "saved")
    assert load_file(tmp_path / "saved" / WEIGHTS).keys() <= original.keys()


def test_an_encoder_under_a_wrappers_name_gets_its_new_head(tmp_path, encoder_folder):
    shutil.copytree(encoder_folder, tmp_path / "copy")
    rewrite(tmp_path / "copy", lambda held: {f"module.{key}": t for key, t in held.items()})
    with pytest.warns(UserWarning, match="wrapper"):
        model, _ = load_model(str(tmp_path / "copy"), head="classification", seed=3)
    plain, _ = load_model(str(encoder_folder), head="classification", seed=3)
    assert all(map(torch.equal, model.parameters(), plain.parameters()))


def without(*parts):
    return lambda held: {k: t for k, t in held.items() if not any(p in k for p in parts)}


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (without("layers.1.mlp"), r"lacks 3 of its 21 weights, model\.layers\.1\.mlp\.down_proj"),
        (without("embed_tokens"), r"lacks 2 of its 21 weights, lm_head\.weight"),
        (
            lambda held: {f"decoder.{k}": t for k, t in held.items()},
            r"lacks 21 of .* and 18 more; it holds decoder\.model\.embed_tokens\.weight",
        ),
    ],
)
def test_missing_weights_are_refused_by_name(copied, change, words):
    rewrite(copied, change)
    with pytest.raises(UserError, match=words):
        load_model(str(copied))


def test_an_untied_head_is_missed(copied):
    edit(copied, tie_word_embeddings=False)
    with pytest.raises(UserError, match=r"lacks 1 of its 21 weights, lm_head\.weight\. They would"):
        load_model(str(copied))


def test_a_classifier_may_lack_its_head_and_nothing_else(tmp_path, encoder_folder):
    model, _ = load_model(encoder_folder, head="classification")
    assert new_weights(model) == {"classifier.weight", "classifier.bias"}
    assert "classifier.bias, classifier.weight" in notes_on_new(model)[0]
    shutil.copytree(encoder_folder, tmp_path / "copy")
    rewrite(tmp_path / "copy", without("encoder.layer.1.output"))
    with pytest.raises(UserError, match=r"lacks 4 .*bert\.encoder\.layer\.1\.output"):
        load_model(str(tmp_path / "copy"), head="classification")
    model.save_pretrained(tmp_path / "whole")
    make_tokenizer().save_pretrained(tmp_path / "whole")
    whole, _ = load_model(str(tmp_path / "whole"), head="classification")
    assert not new_weights(whole)
    assert not notes_on_new(whole)


@pytest.mark.parametrize("num_stored", [1, 5])
def test_a_head_of_another_size(tmp_path, encoder_folder, num_stored):
    trained, tokenizer = load_model(encoder_folder, head="classification", num_labels=num_stored)
    trained.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    with pytest.raises(
        UserError, match=rf"{num_stored}×32 there and 3×32 is needed; use data with"
    ):
        load_model(str(tmp_path), head="classification", num_labels=3)


@pytest.mark.parametrize("values", [{"intermediate_size": 64}, {"vocab_size": 500}])
def test_weights_of_another_shape_than_the_config(copied, values):
    edit(copied, **values)
    with pytest.raises(UserError, match=r"do not fit its config\.json.*×"):
        load_model(str(copied))


@pytest.mark.parametrize(
    ("file", "content", "words"),
    [
        (WEIGHTS, POINTER.encode(), r"model\.safetensors is a pointer of Git LFS.*git lfs pull"),
        ("tokenizer.json", POINTER.encode(), r"tokenizer\.json is a pointer of Git LFS"),
        (WEIGHTS, b"", r"model\.safetensors is damaged or incomplete; download"),
        (WEIGHTS, None, r"model\.safetensors is damaged or incomplete; download"),
    ],
)
def test_files_that_were_not_downloaded_whole(copied, file, content, words):
    path = copied / file
    path.write_bytes(path.read_bytes()[:-200] if content is None else content)
    with pytest.raises(UserError, match=words):
        load_model(str(copied))


def test_a_pointer_in_place_of_a_pickle(copied):
    (copied / WEIGHTS).unlink()
    (copied / "pytorch_model.bin").write_text(POINTER)
    with pytest.raises(UserError, match=r"pytorch_model\.bin is a pointer of Git LFS"):
        load_model(str(copied))


@pytest.mark.parametrize("method", ["gptq", "awq", "hqq", "compressed-tensors"])
def test_quantised_folders_without_their_package(copied, method):
    edit(copied, quantization_config={"quant_method": method, "bits": 4, "group_size": 128})
    with pytest.raises(UserError, match=rf"cannot be loaded .*quantised by {method}: install"):
        load_model(str(copied))


def test_attention_without_its_package(decoder_folder):
    with pytest.raises(UserError, match=r"flash|Flash.*; install that package"):
        load_model(str(decoder_folder), attn_implementation="flash_attention_2")


def test_an_adapter_is_no_model(tmp_path, copied):
    (tmp_path / "lora").mkdir()
    for folder in (tmp_path / "lora", copied):  # The second one is a whole model too.
        (folder / "adapter_config.json").write_text("{}")
        with pytest.raises(UserError, match="holds an adapter of peft, which is no model"):
            resolve(str(folder))


def test_a_relative_path_says_where_it_begins(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=rf"does not exist in {tmp_path}.*start zofo where"):
        resolve("./models/mine")
    remedy = explained(OSError("no such id"), "models/mine", "models/mine", ["minilm"])
    assert f"a folder (now looked for in {tmp_path})" in remedy


OWN_CODE = {
    "configuration_own.py": "from transformers import LlamaConfig\n\n\n"
    "class OwnConfig(LlamaConfig):\n    model_type = 'own'\n",
    "modeling_own.py": "from transformers import LlamaForCausalLM\n\n"
    "from .configuration_own import OwnConfig\n\n\n"
    "class Own(LlamaForCausalLM):\n    config_class = OwnConfig\n",
}


def test_a_trusted_decoder_with_code_of_its_own(copied, tmp_path, monkeypatch):
    from transformers import dynamic_module_utils

    monkeypatch.setattr(dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.syspath_prepend(str(tmp_path / "modules"))
    for name, text in OWN_CODE.items():
        (copied / name).write_text(text)
    classes = {
        "AutoConfig": "configuration_own.OwnConfig",
        "AutoModelForCausalLM": "modeling_own.Own",
    }
    edit(copied, model_type="own", auto_map=classes)
    with pytest.raises(UserError, match="trust_remote_code=true"):
        head_of(str(copied))
    assert head_of(str(copied), trust_remote_code=True) == "causal-lm"
    model, _ = load_model(str(copied), trust_remote_code=True)
    assert type(model).__name__ == "Own"


# A head that is new belongs to the adapter as a whole.

SMALL = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
}
BARE = {
    "DeBERTa": lambda v: hf.DebertaV2Model(hf.DebertaV2Config(vocab_size=v, **SMALL)),
    "XLNet": lambda v: hf.XLNetModel(
        hf.XLNetConfig(vocab_size=v, d_model=16, n_layer=1, n_head=2, d_inner=24)
    ),
    "ModernBERT": lambda v: hf.ModernBertModel(
        hf.ModernBertConfig(vocab_size=v, **SMALL, pad_token_id=0, bos_token_id=0, eos_token_id=0)
    ),
    "BERT without its pooler": lambda v: hf.BertForMaskedLM(hf.BertConfig(vocab_size=v, **SMALL)),
    "GPT-2": lambda v: hf.GPT2Model(hf.GPT2Config(vocab_size=v, n_embd=16, n_layer=1, n_head=2)),
}


@pytest.mark.parametrize("architecture", BARE)
def test_every_new_weight_belongs_to_the_adapter(tmp_path, architecture):
    tokenizer = make_tokenizer()
    BARE[architecture](len(tokenizer)).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    model, _ = load_model(str(tmp_path), head="classification")
    new = new_weights(model)
    assert new_weights(empty_model(str(tmp_path), head="classification")) == new  # for --dry-run
    blocks = split_parameters(
        create_adapter(model, "lora", head="classification", targets="all-linear", r=2)
    )
    inside = {
        name.removeprefix("base_model.model.").replace(".modules_to_save.default", "")
        for name in blocks.adapter
    }
    assert new
    assert new <= inside
    assert not new & blocks.base.keys()
    assert {n for n in inside - new if ".lora_" not in n} == set()
