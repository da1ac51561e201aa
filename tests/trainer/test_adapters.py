"""Several adapters, adapters of any name, and adapters on the embeddings: kept to the bit."""

from __future__ import annotations

import json
import shutil

import peft
import pytest
import torch
import transformers as hf

from tests.support.models import assert_same_bits, batch_for, bits, build
from tests.support.trainers import Recorder, trainer_for
from zofo.errors import UserError
from zofo.models.saved_adapters import load_adapter
from zofo.optim.blocks import split_parameters
from zofo.saved.checkpoint import load_checkpoint

# peft warns of adapters on tied weights, which can only be merged untied.
pytestmark = pytest.mark.filterwarnings("ignore:Model (with|has) `tie_word_embeddings")
STEPS = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2, "base_lr": 1e-2}
STEPS |= {"lr_scheduler_type": "constant"}


def lora(*targets, **options):
    return peft.LoraConfig(task_type="CAUSAL_LM", r=2, target_modules=list(targets), **options)


def two_adapters(*active):
    model = build("llama", "lora")
    torch.manual_seed(5)
    model.add_adapter("second", lora("k_proj", "o_proj", init_lora_weights=False))
    model.base_model.set_adapter(list(active))
    return model


def one_called_mine():
    torch.manual_seed(5)
    config = lora("q_proj", init_lora_weights=False)
    return peft.get_peft_model(build("llama", None), config, adapter_name="mine")


def untied():
    torch.manual_seed(0)
    config = build("llama", None).config
    config.tie_word_embeddings = False
    return hf.LlamaForCausalLM(config)


def on_embeddings(make_base, *targets):
    torch.manual_seed(1)
    return peft.get_peft_model(make_base(), lora("q_proj", *targets))


def tied():
    return build("llama", None)


CASES = {
    "default": (tied, lambda: two_adapters("default")),
    "second": (tied, lambda: two_adapters("second")),
    "both": (tied, lambda: two_adapters("default", "second")),
    "both, the other way round": (tied, lambda: two_adapters("second", "default")),
    "mine": (tied, one_called_mine),
    "head of tied": (tied, lambda: on_embeddings(tied, "lm_head")),
    "embedding of tied": (tied, lambda: on_embeddings(tied, "embed_tokens")),
    "both of tied": (tied, lambda: on_embeddings(tied, "embed_tokens", "lm_head")),
    "head of untied": (untied, lambda: on_embeddings(untied, "lm_head")),
    "embedding of untied": (untied, lambda: on_embeddings(untied, "embed_tokens")),
}


@pytest.fixture(scope="module", params=CASES)
def trained(request, tmp_path_factory):
    """Folder, base, maker of the model, and the trained model."""
    make_base, make = CASES[request.param]
    folder, model = tmp_path_factory.mktemp("run"), make()
    trainer_for(folder, model, **STEPS).train()
    return folder, make_base, make, model


def test_a_resumed_run_ends_as_the_uninterrupted_one(trained, tmp_path):
    folder, _, make, model = trained
    resumed = make()
    trainer_for(tmp_path, resumed, **{**STEPS, "save_strategy": "no"}).train(
        resume_from_checkpoint=str(folder / "checkpoint-2")
    )
    assert_same_bits(bits(resumed), bits(model))


@torch.no_grad()
def test_a_checkpoint_loads_with_the_adapters_that_were_trained(trained):
    folder, make_base, _, model = trained
    loaded = load_checkpoint(make_base(), folder / "checkpoint-4")
    assert list(loaded.active_adapters) == list(model.active_adapters)
    assert_same_bits(bits(loaded), bits(model))
    batch = batch_for("llama")
    assert torch.equal(loaded(**batch).logits, model.eval()(**batch).logits)


@pytest.mark.parametrize("case", ["both", "embedding of tied"])
def test_the_best_step_comes_back_with_every_adapter(tmp_path, case):
    recorder, model = Recorder(), CASES[case][1]()
    best = {"eval_strategy": "steps", "eval_steps": 2, "load_best_model_at_end": True}
    changed = {**STEPS, **best, "learning_rate": 3.0}  # The first evaluation is the best.
    trainer = trainer_for(tmp_path, model, callbacks=[recorder], **changed)
    trainer.train()
    assert trainer.state.best_global_step == 2
    assert_same_bits(bits(model), recorder.weights[2])


def test_other_active_adapters_are_refused_before_the_first_step(tmp_path):
    trainer_for(tmp_path, two_adapters("default", "second"), **STEPS).train()
    for active in (["default"], ["second", "default"]):
        other = two_adapters(*active)
        before = bits(other)
        with pytest.raises(UserError, match="active adapters default, second, and this model has"):
            trainer_for(tmp_path, other, **STEPS).train(resume_from_checkpoint=True)
        assert_same_bits(bits(other), before)
    shutil.rmtree(tmp_path / "checkpoint-4" / "second")
    with pytest.raises(UserError, match=r"adapters \['default', 'second'\] and holds default"):
        load_checkpoint(tied(), tmp_path / "checkpoint-4")


@pytest.mark.parametrize(("saved", "loaded"), [("q_proj", "k_proj"), ("k_proj", "q_proj")])
def test_an_adapter_of_other_modules_is_refused(tmp_path, saved, loaded):
    peft.get_peft_model(tied(), lora("v_proj", saved)).save_pretrained(tmp_path)
    for targets in (["v_proj"], ["v_proj", loaded], ["v_proj", "q_proj", "k_proj"]):
        with pytest.raises(UserError, match=r"it (holds|lacks) \d+ tensors"):
            load_adapter(peft.get_peft_model(tied(), lora(*targets)), tmp_path)


@pytest.mark.parametrize("method", ["hybrid", "fo-peft"])
def test_what_peft_freezes_stays_frozen(tmp_path, method):
    def make():
        torch.manual_seed(2)
        config = peft.CartridgeConfig(
            task_type="CAUSAL_LM", num_virtual_tokens=3, num_frozen_tokens=1
        )
        return peft.get_peft_model(tied(), config)

    model = make()
    encoder = model.prompt_encoder["default"]
    before = {name: p.detach().clone() for name, p in encoder.named_parameters()}
    trainer_for(tmp_path, model, method=method, **STEPS).train()
    after = dict(encoder.named_parameters())
    assert [n for n in after if not torch.equal(after[n], before[n])] == ["trainable_embedding"]
    assert not any("frozen" in name for name in split_parameters(model).adapter)
    torch.manual_seed(9)
    resumed = make()
    with torch.no_grad():
        resumed.prompt_encoder["default"].frozen_embedding.zero_()
    trainer_for(tmp_path, resumed, method=method, **STEPS).train(
        resume_from_checkpoint=str(tmp_path / "checkpoint-2")
    )
    assert_same_bits(bits(resumed), bits(model))


def test_a_new_head_that_peft_does_not_know_is_said(tmp_path):
    config = hf.XLNetConfig(vocab_size=61, d_model=16, n_layer=1, n_head=2, d_inner=24)
    hf.XLNetModel(config).save_pretrained(tmp_path / "base")
    model = hf.XLNetForSequenceClassification.from_pretrained(tmp_path / "base")
    model.config.pad_token_id = 0
    adapted = peft.get_peft_model(
        model, peft.LoraConfig(task_type="SEQ_CLS", r=2, target_modules=["layer_1"])
    )
    with pytest.warns(UserWarning, match=r"4 weights .*modules_to_save=\['logits_proj'"):
        trainer_for(tmp_path / "run", adapted)


def test_old_checkpoints_of_several_adapters_say_which_one_they_load(tmp_path):
    """They do not record which adapters were active."""
    from zofo.models.saved_adapters import attach_adapter

    two_adapters("default", "second").save_pretrained(tmp_path)
    with pytest.warns(UserWarning, match="did not record which of them"):
        loaded = attach_adapter(tied(), tmp_path, {})
    assert list(loaded.active_adapters) == ["default"]
    assert json.loads((tmp_path / "adapter_config.json").read_text())["r"] == 2
