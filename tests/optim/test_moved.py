"""An adapter is not saved without the base that has moved with it."""

from __future__ import annotations

import copy
import pickle

import peft
import pytest
import torch
import transformers as hf
from accelerate import Accelerator
from torch import nn

from tests.support.models import batch_for, build
from zofo.errors import UserError
from zofo.optim.methods import param_groups
from zofo.optim.moved import mark_moved
from zofo.optim.optimizer import HybridOptimizer
from zofo.saved.checkpoint import load_checkpoint, save_checkpoint


def trained(base_lr, adapter="lora"):
    model = build("llama", adapter)
    optimizer = HybridOptimizer(param_groups(model, base_lr=base_lr, adapter_lr=1e-2), model)
    batch = batch_for("llama")
    for _ in range(2):
        optimizer.step(lambda: model(**batch).loss)
    return model.eval(), optimizer


@pytest.fixture(scope="module")
def moved():
    return trained(1e-2)


def logits(model):
    with torch.no_grad():
        return model(**batch_for("llama")).logits


class Wrapper(nn.Module):
    """As the wrappers of distributed training and of value heads are."""

    def __init__(self, inner):
        super().__init__()
        self.inner = inner


@pytest.mark.parametrize(
    "same",
    [
        lambda model: model,
        copy.deepcopy,
        lambda model: pickle.loads(pickle.dumps(model)),
        lambda model: Accelerator(cpu=True).unwrap_model(model),
        lambda model: Wrapper(model).inner,
    ],
    ids=["itself", "deepcopy", "pickle", "unwrapped", "wrapped"],
)
@pytest.mark.parametrize("call", ["save_pretrained", "push_to_hub"])
def test_peft_does_not_save_the_adapter_alone(tmp_path, moved, same, call):
    model = same(moved[0])
    with pytest.raises(UserError, match=r"save_checkpoint.*merge_and_unload"):
        getattr(model, call)(str(tmp_path / "folder"))
    assert not (tmp_path / "folder").exists()
    assert torch.equal(logits(model), logits(moved[0]))


@pytest.mark.parametrize("adapter", ["lora", "prompt"])
def test_a_base_that_did_not_move_is_saved_as_ever(tmp_path, adapter):
    model, _ = trained(0.0, adapter)
    assert not {"save_pretrained", "push_to_hub"} & vars(model).keys()
    model.save_pretrained(tmp_path)
    again = peft.PeftModel.from_pretrained(build("llama", None), tmp_path).eval()
    torch.testing.assert_close(logits(again), logits(model))


def test_the_merged_model_is_whole(tmp_path, moved):
    copy.deepcopy(moved[0]).merge_and_unload().save_pretrained(tmp_path)
    again = hf.AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    torch.testing.assert_close(logits(again), logits(moved[0]), rtol=1e-4, atol=1e-5)


def test_a_state_dict_is_whole(tmp_path, moved):
    Accelerator(cpu=True).save_model(moved[0], str(tmp_path))
    fresh = build("llama", "lora", seed=5).eval()
    from accelerate import load_checkpoint_in_model

    load_checkpoint_in_model(fresh, str(tmp_path))
    assert torch.equal(logits(fresh), logits(moved[0]))


@pytest.mark.parametrize("adapter", ["lora", "prompt"])
def test_a_loop_saves_both_parts(tmp_path, adapter):
    model, optimizer = trained(1e-2, adapter)
    save_checkpoint(tmp_path / "new" / "folder", model, optimizer)
    again = load_checkpoint(build("llama", None), tmp_path / "new" / "folder")
    assert torch.equal(logits(again), logits(model))
    for one in (model, again):  # The loaded model's base has moved as well.
        with pytest.raises(UserError, match="has moved"):
            one.save_pretrained(tmp_path / "other")
    with pytest.warns(UserWarning, match="zofo_load_with"):
        peft.PeftModel.from_pretrained(build("llama", None), tmp_path / "new" / "folder")
    with pytest.raises(UserError, match="the base that the run began with"):
        load_checkpoint(build("llama", None, seed=3), tmp_path / "new" / "folder")


def test_a_model_without_adapter_is_saved_by_itself(tmp_path):
    model = build("llama", None)
    optimizer = HybridOptimizer(param_groups(model, "zo-ft", base_lr=1e-3), model)
    optimizer.step(lambda: model(**batch_for("llama")).loss)
    with pytest.raises(UserError, match="call that"):
        save_checkpoint(tmp_path / "folder", model, optimizer)
    model.save_pretrained(tmp_path)
    assert torch.equal(
        logits(hf.AutoModelForCausalLM.from_pretrained(tmp_path).eval()), logits(model.eval())
    )


def test_the_mark_goes_when_the_base_goes_back(moved):
    model = copy.deepcopy(moved[0])
    mark_moved(model, has_moved=False)
    assert model.save_pretrained.__func__ is peft.PeftModel.save_pretrained


def test_an_adapter_of_transformers_is_not_saved_alone_either(tmp_path):
    model = build("llama", None)
    model.add_adapter(peft.LoraConfig(r=2, target_modules=["q_proj"]))
    mark_moved(model)
    with pytest.raises(UserError, match="has moved"):
        model.save_pretrained(tmp_path / "folder")
