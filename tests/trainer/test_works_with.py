"""Hybrid steps work with gradient checkpointing, attention implementations and quantized bases."""

from __future__ import annotations

import peft
import pytest
import torch

from tests.support.models import assert_same_bits, batch_for, bits, build, loss_of
from tests.support.quantized import load_quantized, plain_decoder
from tests.support.trainers import history, trainer_for
from zofo.errors import UserError
from zofo.optim.blocks import split_parameters
from zofo.optim.methods import param_groups
from zofo.optim.optimizer import HybridOptimizer

# Tests of gradient checkpointing.


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad:UserWarning")
@pytest.mark.parametrize("way", ["reentrant", "not reentrant", "trainer"])
@pytest.mark.parametrize("adapter", ["lora", "prompt"])
def test_gradient_checkpointing_changes_no_bit(tmp_path, adapter, way):
    runs = []
    for checkpointing in (False, True):
        model = build("llama", adapter, lora_dropout=0.3)
        model.get_base_model().config.attention_dropout = 0.2
        for layer in model.get_base_model().model.layers:
            layer.self_attn.attention_dropout = 0.2
        kwargs = {"use_reentrant": way == "reentrant"}
        changes = {}
        if checkpointing and way == "trainer":
            changes = {"gradient_checkpointing": True}
        elif checkpointing:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=kwargs)
            model.enable_input_require_grads()
        trainer = trainer_for(tmp_path, model, max_steps=3, num_directions=2, **changes)
        torch.manual_seed(1)
        trainer.train()
        assert model.get_base_model().model.gradient_checkpointing == checkpointing
        runs.append((history(trainer, "loss"), history(trainer, "projected_grad"), bits(model)))
    assert runs[0][:2] == runs[1][:2]
    assert all(runs[0][1])
    assert_same_bits(runs[0][2], runs[1][2])


# Tests of attention implementations.


def test_attention_implementations_agree():
    runs = []
    for implementation in ("eager", "sdpa"):
        model = build("llama", "lora")
        model.get_base_model().set_attn_implementation(implementation)
        assert model.get_base_model().config._attn_implementation == implementation
        optimizer = HybridOptimizer(param_groups(model, "hybrid", base_lr=1e-4), model, eps=1e-2)
        rows = []
        for seed in range(3):
            loss = optimizer.step(lambda m=model, s=seed: loss_of(m, batch_for("llama", seed=s)))
            rows.append((float(loss), optimizer.last_step.projected_grad[0]))
        runs.append(torch.tensor(rows))
    torch.testing.assert_close(*runs, rtol=1e-3, atol=1e-3)
    assert runs[0][:, 1].abs().min() > 1e-2


# Tests of quantized bases.


def quantized(kind, folder):
    """Return a Llama loaded in 8 or 4 bits."""
    return load_quantized(plain_decoder(folder), kind)


def with_lora(model):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        config = peft.LoraConfig(
            task_type="CAUSAL_LM", r=4, target_modules="all-linear", init_lora_weights=False
        )
        return peft.get_peft_model(model, config)


@pytest.mark.parametrize("kind", ["int8", "nf4"])
@pytest.mark.parametrize(("method", "rate"), [("fo-peft", 1e-2), ("zo-peft", 1e-3)])
def test_a_quantized_base_stays_and_its_adapter_learns(tmp_path, kind, method, rate):
    model = with_lora(quantized(kind, tmp_path / "base")).train()
    before = {n: p.detach().clone() for n, p in split_parameters(model).base.items()}
    optimizer = HybridOptimizer(
        param_groups(model, method, adapter_lr=rate),
        model,
        optimizer="AdamW",
        estimator="central",
        num_directions=2,
        eps=1e-2,
    )
    batch = batch_for("llama")
    losses = [float(optimizer.step(lambda: loss_of(model, batch))) for _ in range(30)]
    assert losses[-1] < losses[0] - 0.02
    assert_same_bits(split_parameters(model).base, before)


def gradients_of(model):
    loss_of(model.train(), batch_for("llama")).backward()
    found = [p.grad.clone() for p in model.parameters() if p.grad is not None]
    model.zero_grad()
    return found


def evaluated(model):
    with torch.no_grad():
        loss_of(model.eval(), batch_for("llama"))
    return model


def test_evaluating_a_4_bit_base_does_not_change_gradients(tmp_path):
    model = with_lora(quantized("nf4", tmp_path / "base"))
    param_groups(model, "fo-peft")
    before = gradients_of(model)
    after = gradients_of(evaluated(model))
    assert len(before) == len(after) > 0
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))


def test_a_4_bit_base_packed_by_an_evaluation_is_refused(tmp_path):
    model = evaluated(with_lora(quantized("nf4", tmp_path / "base")))
    states = [getattr(p, "quant_state", None) for p in model.parameters()]
    if not any(getattr(state, "packing_format_for_cpu", False) for state in states):
        pytest.skip("bitsandbytes packs nothing on this CPU")
    with pytest.raises(UserError, match=r"packed .* load the base anew"):
        param_groups(model, "fo-peft")


@pytest.mark.parametrize("method", ["hybrid", "fo-peft", "zo-peft"])
def test_trainer_on_a_quantized_base(tmp_path, method):
    model = with_lora(quantized("nf4", tmp_path / "base"))
    trainer = trainer_for(tmp_path, model, method=method, max_steps=2)
    trainer.train()
    assert trainer.state.global_step == 2
