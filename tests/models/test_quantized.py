"""Bases in 4 and 8 bits: what is loaded, what is refused, how large they are, nested scales."""

from __future__ import annotations

import importlib.util
import json
import shutil

import pytest
import torch
import transformers as hf

from zofo.config.load import load_config
from zofo.errors import UserError
from zofo.models.adapter_kinds import ADAPTER_TYPES
from zofo.models.adapters import create_adapter
from zofo.models.fitting import new_weights
from zofo.models.loading import empty_model, load_model
from zofo.models.quantized import num_weights, quantized_bytes
from zofo.optim.blocks import is_quantized, split_parameters

pytest.importorskip("bitsandbytes")
KINDS = ("nf4", "fp4", "int8")
IDS = torch.arange(12).reshape(2, 6)


def logits_of(model):
    with torch.no_grad():
        return model.eval()(input_ids=IDS).logits


def saved(folder, source, **values):
    """A folder of bitsandbytes, as `save_pretrained` of a quantised model writes it."""
    model = hf.AutoModelForCausalLM.from_pretrained(
        source,
        quantization_config=hf.BitsAndBytesConfig(**values),
        dtype=torch.float32,
        device_map={"": "cpu"},
    )
    model.save_pretrained(folder)
    hf.AutoTokenizer.from_pretrained(source).save_pretrained(folder)
    return folder


NESTED = {
    "load_in_4bit": True,
    "bnb_4bit_quant_type": "nf4",
    "bnb_4bit_use_double_quant": True,
    "bnb_4bit_compute_dtype": torch.float32,
}
FOLDERS = {"nested nf4": NESTED, "fp4": {"load_in_4bit": True}, "int8": {"load_in_8bit": True}}


@pytest.mark.parametrize("kind", KINDS)
def test_all_linear_layers_but_the_head_are_quantised(decoder_folder, kind):
    plain, _ = load_model(decoder_folder)
    model, _ = load_model(decoder_folder, quantization=kind)
    quantised = {name for name, p in model.named_parameters() if is_quantized(p)}
    linear = {f"{n}.weight" for n, m in plain.named_modules() if isinstance(m, torch.nn.Linear)}
    assert quantised == linear - {"lm_head.weight"}
    rest = {n: p for n, p in model.named_parameters() if n not in quantised}
    assert all(torch.equal(p, plain.get_parameter(name)) for name, p in rest.items())
    assert num_weights(model, model.parameters()) == sum(p.numel() for p in plain.parameters())
    error = (logits_of(model) - logits_of(plain)).abs().max()
    assert 0 < error < 0.1 * logits_of(plain).abs().max()


@pytest.mark.parametrize("kind", KINDS)
def test_evaluation_packs_nothing(decoder_folder, kind):
    model, _ = load_model(decoder_folder, quantization=kind)
    logits_of(model)
    assert not any(getattr(m, "support_avx512bf16_for_cpu", False) for m in model.modules())
    states = [getattr(p, "quant_state", None) for p in model.parameters()]
    assert not any(getattr(state, "packing_format_for_cpu", False) for state in states)


@pytest.mark.parametrize("kind", [*KINDS, *FOLDERS])
def test_a_model_without_weights_counts_those_that_a_loaded_one_has(tmp_path, decoder_folder, kind):
    options = {"quantization": kind}
    if kind in FOLDERS:
        decoder_folder, options = str(saved(tmp_path, decoder_folder, **FOLDERS[kind])), {}
    empty = empty_model(decoder_folder, **options)
    loaded, _ = load_model(decoder_folder, **options)
    assert quantized_bytes(empty) == quantized_bytes(loaded)
    assert {n: (p.shape, p.dtype) for n, p in empty.named_parameters()} == {
        n: (p.shape, p.dtype) for n, p in loaded.named_parameters()
    }
    logits_of(loaded)  # An 8-bit layer hands its scales over in its first forward.
    assert quantized_bytes(loaded) == quantized_bytes(empty)


@pytest.mark.parametrize("kind", FOLDERS)
def test_a_quantised_folder_loads_as_it_is(tmp_path, decoder_folder, kind):
    folder = saved(tmp_path / "base", decoder_folder, **FOLDERS[kind])
    original = hf.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    own = kind.split()[-1]
    for given in (None, own):
        model, _ = load_model(str(folder), quantization=given)
        assert all(map(torch.equal, model.parameters(), original.parameters()))
    other = "int8" if own != "int8" else "nf4"
    with pytest.raises(UserError, match=rf"is {other}, and the weights .* already .*'{own}'"):
        load_model(str(folder), quantization=other)


def test_without_bitsandbytes_the_error_names_what_to_install(
    tmp_path, decoder_folder, monkeypatch
):
    folder = saved(tmp_path, decoder_folder, **NESTED)
    find = importlib.util.find_spec
    monkeypatch.setattr(
        "importlib.util.find_spec", lambda name, *a: None if name == "bitsandbytes" else find(name)
    )
    for call in (
        lambda: load_model(decoder_folder, quantization="nf4"),
        lambda: load_model(str(folder)),
        lambda: empty_model(str(folder)),
        lambda: load_config(overrides=["model.quantization=int8"]),
    ):
        with pytest.raises(UserError, match=r"bitsandbytes.*pip install 'zofo\[quantized\]'"):
            call()


def test_wrong_names_are_refused():
    with pytest.raises(UserError, match=r"model\.quantization is 'int4'.*'?nf4'?.*'?int8'?"):
        load_config(overrides=["model.quantization=int4"])
    assert load_config(overrides=["model.quantization=none"]).model.quantization is None


def test_another_method_is_no_kind_of_bitsandbytes(tmp_path, decoder_folder):
    shutil.copytree(decoder_folder, tmp_path / "gptq")
    path = tmp_path / "gptq" / "config.json"
    quantised = {"quant_method": "gptq", "bits": 4, "group_size": 128}
    path.write_text(json.dumps({**json.loads(path.read_text()), "quantization_config": quantised}))
    with pytest.raises(UserError, match=r"quantised by gptq.*model\.quantization=nf4"):
        load_model(str(tmp_path / "gptq"))
    with pytest.raises(UserError, match=r"is nf4, and the weights .* are already quantised .*gptq"):
        load_model(str(tmp_path / "gptq"), quantization="nf4")


HEADS = {"decoder": "causal-lm", "encoder": "classification", "encoder_decoder": "seq2seq"}


@pytest.mark.parametrize("kind", ["nf4", "int8"])
@pytest.mark.parametrize("family", HEADS)
def test_every_family_of_models(request, family, kind):
    folder = request.getfixturevalue(f"{family}_folder")
    options = {"head": HEADS[family], "quantization": kind}
    loaded, _ = load_model(folder, **options)
    empty = empty_model(folder, **options)
    assert quantized_bytes(empty) == quantized_bytes(loaded)
    assert quantized_bytes(loaded).codes
    assert new_weights(empty) == new_weights(loaded)
    extra = {"decoder_input_ids": IDS} if family == "encoder_decoder" else {}
    loss = loaded(input_ids=IDS, **extra).logits.square().mean()
    assert loss.isfinite()


@pytest.mark.parametrize("kind", ["nf4", "int8"])
@pytest.mark.parametrize("adapter", [name for name in ADAPTER_TYPES if name != "none"])
def test_every_kind_of_adapter_learns_on_a_quantised_base(decoder_folder, adapter, kind):
    model, _ = load_model(decoder_folder, quantization=kind)
    if (adapter, kind) == ("dora", "int8"):
        with pytest.raises(UserError, match=r"DoRA on an 8-bit base on the CPU; choose .*nf4"):
            create_adapter(model, adapter)
        return
    adapted = create_adapter(model, adapter).train()
    blocks = split_parameters(adapted)
    codes = {name: p.clone() for name, p in blocks.base.items()}
    trainer = torch.optim.AdamW(blocks.adapter.values(), lr=1e-2)
    losses = []
    for _ in range(6):
        loss = adapted(input_ids=IDS, labels=IDS).loss
        trainer.zero_grad()
        loss.backward()
        trainer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    assert all(torch.equal(p, codes[name]) for name, p in blocks.base.items())


def test_a_new_head_is_never_held_in_codes(tmp_path, encoder_folder):
    model, tokenizer = load_model(encoder_folder, head="classification", quantization="nf4")
    assert not any(is_quantized(model.get_parameter(name)) for name in new_weights(model))
    bare = hf.AutoModel.from_pretrained(
        encoder_folder, quantization_config=hf.BitsAndBytesConfig(load_in_4bit=True)
    )
    bare.save_pretrained(tmp_path / "bare")
    tokenizer.save_pretrained(tmp_path / "bare")
    with pytest.raises(UserError, match=r"the head of .* is new .*asks for codes of it"):
        load_model(str(tmp_path / "bare"), head="classification")
