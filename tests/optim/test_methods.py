"""Tests of the table of methods and of the blocks of a model.

An adapter must not change the names of base parameters.
"""

from __future__ import annotations

import copy
import warnings
from typing import get_args

import peft
import pytest
import torch
import transformers as hf
from torch import nn

from tests.support.models import (
    ADAPTERS,
    ARCHITECTURES,
    CASES,
    assert_same_bits,
    batch_for,
    bits,
    build,
    loss_of,
)
from zofo.errors import UserError
from zofo.optim.blocks import ADAPTER_TENSORS_FROM, split_parameters
from zofo.optim.methods import METHODS, MethodName, apply_method, get_method, param_groups
from zofo.optim.optimizer import HybridOptimizer

TABLE = {
    "hybrid": ("zeroth", "first"),
    "fo-peft": ("frozen", "first"),
    "zo-peft": ("frozen", "zeroth"),
    "fo-ft": ("first", "frozen"),
    "zo-ft": ("zeroth", "frozen"),
}
LM = {"task_type": "CAUSAL_LM"}
QV = {"target_modules": ["q_proj", "v_proj"], **LM}
PEFT_KINDS = {
    "dora": peft.LoraConfig(use_dora=True, **QV),
    "lora on the embedding": peft.LoraConfig(**{**QV, "target_modules": ["embed_tokens"]}),
    "lora and a trained head": peft.LoraConfig(modules_to_save=["lm_head"], **QV),
    "lora and trained norms": peft.LoraConfig(modules_to_save=["input_layernorm"], **QV),
    "lora and trained tokens": peft.LoraConfig(trainable_token_indices=[1, 2], **QV),
    "trained tokens": peft.TrainableTokensConfig(token_indices=[1, 2], **LM),
    "adalora": peft.AdaLoraConfig(total_step=10, tinit=1, tfinal=2, **QV),
    "ia3": peft.IA3Config(target_modules=["k_proj"], feedforward_modules=[], **LM),
    "loha": peft.LoHaConfig(**QV),
    "oft": peft.OFTConfig(oft_block_size=4, **QV),
    "vera": peft.VeraConfig(target_modules=["q_proj"], r=2, **LM),
    "p-tuning": peft.PromptEncoderConfig(num_virtual_tokens=3, encoder_hidden_size=8, **LM),
    "prefix by projection": peft.PrefixTuningConfig(
        num_virtual_tokens=3, prefix_projection=True, encoder_hidden_size=8, **LM
    ),
}


# Kinds that replace base weights by trained copies. The trained head is not among them: its
# original is tied to the embedding, which stays in use.
REPLACED = {"lora and trained norms": "input_layernorm"}


def wrapped(kind):
    model = build("llama", None)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Model has `tie_word_embeddings=True`")
        return peft.get_peft_model(model, copy.deepcopy(PEFT_KINDS[kind]))


def identities(parameters):
    return {id(p) for p in parameters}


# Tests of the table.


def test_the_table_of_methods():
    assert {name: (m.base, m.adapter) for name, m in METHODS.items()} == TABLE
    assert get_args(MethodName) == tuple(METHODS)
    for name, (_, adapter) in TABLE.items():
        assert get_method(name).needs_adapter == (adapter != "frozen")


@pytest.mark.parametrize(
    ("typed", "meant"),
    [("hybird", "hybrid"), ("fo-pft", "fo-peft"), ("zoft", "zo-ft"), ("ZO-PEFT", "zo-peft")],
)
def test_an_unknown_method_names_the_nearest(typed, meant):
    with pytest.raises(UserError, match=f"'{typed}' does not exist; did you mean '{meant}'"):
        get_method(typed)


def test_an_unknown_method_far_from_all_lists_them():
    with pytest.raises(UserError) as caught:
        get_method("quantum")
    assert "did you mean" not in str(caught.value)
    assert all(name in str(caught.value) for name in METHODS)


@pytest.mark.parametrize("method", METHODS)
def test_what_requires_a_gradient_is_what_is_first_order(method):
    base_order, adapter_order = TABLE[method]
    model = build("llama", None if adapter_order == "frozen" else "lora")
    for _ in range(2):  # In the second pass the flags have other values beforehand.
        blocks = apply_method(model, method)
        assert {p.requires_grad for p in blocks.base.values()} == {base_order == "first"}
        assert {p.requires_grad for p in blocks.adapter.values()} <= {adapter_order == "first"}
        model.requires_grad_(adapter_order != "first")


# Tests of the blocks.


@pytest.mark.parametrize(("architecture", "adapter"), CASES)
def test_the_adapter_is_what_peft_trains_and_the_base_is_the_model(architecture, adapter):
    model, plain = build(architecture, adapter), build(architecture, None)
    blocks = split_parameters(model)
    trained = identities(p for p in model.parameters() if p.requires_grad)
    assert identities(blocks.adapter.values()) == trained
    assert not trained & identities(blocks.base.values())
    # Without peft, every parameter stands under the model's own name.
    names: dict[int, list[str]] = {}
    for name, parameter in plain.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    own = {min(tied): plain.get_parameter(min(tied)).shape for tied in names.values()}
    assert set(split_parameters(plain).base) == set(own)
    # For sequence classification, peft trains a copy of the head in place of the original.
    kept = {n: s for n, s in own.items() if not n.startswith("classifier.")}
    assert (len(kept) < len(own)) == (architecture == "bert")
    assert {n: p.shape for n, p in blocks.base.items()} == kept


@pytest.mark.parametrize("kind", PEFT_KINDS)
def test_names_and_indices_do_not_depend_on_the_kind_of_adapter(kind):
    plain, model = split_parameters(build("llama", None)), wrapped(kind)
    blocks = split_parameters(model)
    assert blocks.base_index == plain.base_index
    trained = identities(p for p in model.parameters() if p.requires_grad)
    assert identities(blocks.adapter.values()) == trained
    # The base holds the original weights, except those that a trained copy replaces.
    replaced = {name for name in plain.base if name not in blocks.base}
    assert all(REPLACED.get(kind, "nothing") in name for name in replaced)
    assert bool(replaced) == (kind in REPLACED)
    for name, parameter in blocks.base.items():
        assert torch.equal(parameter, plain.base[name]), name


@pytest.mark.parametrize("kind", ["adalora", "lora and trained tokens", "p-tuning", "vera"])
def test_base_lr_zero_is_what_peft_trains_for_other_kinds(kind):
    ours, theirs = wrapped(kind), wrapped(kind)
    theirs.load_state_dict(ours.state_dict())
    trained = [p for p in theirs.parameters() if p.requires_grad]
    plain = torch.optim.AdamW(trained, lr=1e-2, weight_decay=0.0)
    optimizer = HybridOptimizer(
        param_groups(ours, base_lr=0.0, adapter_lr=1e-2), ours, optimizer="AdamW"
    )
    for seed in range(2):
        batch = batch_for("llama", seed=seed)
        plain.zero_grad()
        loss_of(theirs, batch).backward()
        plain.step()
        optimizer.step(lambda b=batch: loss_of(ours, b))
    assert_same_bits(bits(ours), bits(theirs))
    assert optimizer.last_step.projected_grad != (0.0,)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (peft.LoraConfig(bias="all", **QV), "bias='all', which trains biases of the base"),
        (peft.LoraConfig(bias="lora_only", **QV), "bias='lora_only'"),
        (
            peft.AdaptionPromptConfig(adapter_len=3, adapter_layers=1, **LM),
            "ADAPTION_PROMPT|has none",
        ),
        (
            peft.CPTConfig(cpt_token_ids=[1], cpt_mask=[1], cpt_tokens_type_mask=[1], **LM),
            "'default' is of kind CPT",
        ),
    ],
)
def test_adapters_that_cannot_be_told_from_the_base_are_refused(config, message):
    model = peft.get_peft_model(build("llama", None), config)
    with pytest.raises(UserError, match=message):
        param_groups(model)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_indices_are_ranks_among_the_sorted_names(architecture):
    blocks = split_parameters(build(architecture, None))
    assert list(blocks.base_index.values()) == list(range(len(blocks.base)))
    assert list(blocks.base_index) == sorted(blocks.base)


def test_indices_do_not_depend_on_the_order_of_modules():
    forth = nn.ModuleDict({"a": nn.Linear(2, 2), "b": nn.Linear(2, 2)})
    back = nn.ModuleDict({"b": nn.Linear(2, 2), "a": nn.Linear(2, 2)})
    assert split_parameters(forth).base_index == split_parameters(back).base_index


def test_indices_do_not_depend_on_what_requires_a_gradient_or_is_trained():
    model = build("llama", "lora")
    expected = split_parameters(model).base_index
    for method in ("hybrid", "fo-peft", "zo-peft"):
        param_groups(model, method, base_lr={"*q_proj*": 1e-3} if method == "hybrid" else 1e-3)
        assert split_parameters(model).base_index == expected


def test_a_second_adapter_leaves_the_base_alone():
    model = build("llama", "lora")
    expected, adapter = split_parameters(model), split_parameters(model).adapter
    model.add_adapter("other", copy.deepcopy(model.peft_config["default"]))
    blocks = split_parameters(model)
    assert blocks.base_index == expected.base_index
    assert set(blocks.adapter) == set(adapter)  # The second adapter is not active.


def test_a_shortcut_of_peft_to_the_embedding_is_not_its_name():
    """A second name that peft gives to the embedding does not change any base index.

    Prompt tuning registers the embedding again, as `word_embeddings`.
    """
    config = hf.YosoConfig(
        vocab_size=61,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=64,
    )
    plain = split_parameters(hf.YosoForSequenceClassification(config)).base_index
    model = peft.get_peft_model(
        hf.YosoForSequenceClassification(config),
        peft.PromptTuningConfig(task_type="SEQ_CLS", num_virtual_tokens=3),
    )
    assert split_parameters(model).base_index == plain


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.z, self.a, self.head = nn.Linear(3, 3), nn.Linear(3, 3), nn.Linear(3, 3)
        self.z.weight = self.a.weight


def test_tied_parameters_count_once_under_their_first_name():
    blocks = split_parameters(Tied())
    assert set(blocks.base) == {"a.weight", "a.bias", "z.bias", "head.weight", "head.bias"}
    llama = split_parameters(build("llama", "lora")).base
    assert "lm_head.weight" in llama
    assert "model.embed_tokens.weight" not in llama
    groups = param_groups(build("llama", "lora"))
    parameters = [p for g in groups for p in g["params"]]
    assert len(parameters) == len(identities(parameters))


def test_without_peft_what_requires_a_gradient_is_the_adapter_if_not_all_does():
    model = Tied()
    assert not split_parameters(model).adapter
    model.requires_grad_(False)
    assert not split_parameters(model).adapter
    model.head.requires_grad_(True)
    blocks = split_parameters(model)
    assert set(blocks.adapter) == {"head.weight", "head.bias"}
    assert set(blocks.base) == {"a.weight", "a.bias", "z.bias"}


def test_tensor_indices_of_adapter_and_base_never_meet():
    blocks = split_parameters(build("llama", "lora"))
    indices = sorted(blocks.adapter_index.values())
    assert indices == list(range(ADAPTER_TENSORS_FROM, ADAPTER_TENSORS_FROM + len(indices)))
    assert set(blocks.adapter_index) == set(blocks.adapter)
    assert max(blocks.base_index.values()) < ADAPTER_TENSORS_FROM


# Tests of the parameter groups.


def test_groups_carry_what_the_optimizer_needs():
    model = build("llama", "lora")
    blocks = split_parameters(model)
    adapter, base = param_groups(
        model, base_lr=1e-4, adapter_lr=1e-2, base_weight_decay=0.1, adapter_weight_decay=0.2
    )
    assert (adapter["block"], adapter["order"]) == ("adapter", "first")
    assert (adapter["lr"], adapter["weight_decay"]) == (1e-2, 0.2)
    assert (base["block"], base["order"]) == ("base", "zeroth")
    assert (base["lr"], base["weight_decay"]) == (1e-4, 0.1)
    for group, source, index in (
        (adapter, blocks.adapter, blocks.adapter_index),
        (base, blocks.base, blocks.base_index),
    ):
        assert set(group["names"]) == set(source)
        for name, parameter, tensor in zip(
            group["names"], group["params"], group["tensors"], strict=True
        ):
            assert parameter is source[name]
            assert tensor == index[name]


@pytest.mark.parametrize("adapter", ADAPTERS)
@pytest.mark.parametrize(
    ("method", "blocks"),
    [("hybrid", ["adapter", "base"]), ("fo-peft", ["adapter"]), ("zo-peft", ["adapter"])],
)
def test_groups_exist_for_the_blocks_that_move(method, blocks, adapter):
    groups = param_groups(build("llama", adapter), method)
    assert [g["block"] for g in groups] == blocks


def test_the_first_matching_pattern_counts():
    model = build("llama", "lora")
    rates = {"*layers.1*": 3e-3, "*q_proj*": 2e-3, "*_proj*": 1e-3}
    groups = [g for g in param_groups(model, base_lr=rates) if g["block"] == "base"]
    found = {name: g["lr"] for g in groups for name in g["names"]}
    assert found["model.layers.1.self_attn.q_proj.weight"] == 3e-3
    assert found["model.layers.1.input_layernorm.weight"] == 3e-3
    assert found["model.layers.0.self_attn.q_proj.weight"] == 2e-3
    assert found["model.layers.0.mlp.up_proj.weight"] == 1e-3
    unmatched = set(split_parameters(model).base) - set(found)
    assert unmatched == {
        "lm_head.weight",
        "model.norm.weight",
        "model.layers.0.input_layernorm.weight",
        "model.layers.0.post_attention_layernorm.weight",
    }


def test_full_fine_tuning_freezes_what_no_pattern_matches():
    model = build("llama", None)
    param_groups(model, "fo-ft", base_lr={"*q_proj*": 1e-3})
    assert {n for n, p in model.named_parameters() if p.requires_grad} == {
        f"model.layers.{i}.self_attn.q_proj.weight" for i in range(2)
    }


@pytest.mark.parametrize(
    "rates",
    [
        {"*q_porj*": 1e-3, "*": 1e-4},
        # The first pattern takes every weight, so the second matches nothing.
        {"*": 1e-4, "*q_proj*": 1e-3},
        {"base_model.*": 1e-3},  # Patterns match the names of the model without adapter.
    ],
)
def test_a_pattern_that_matches_nothing_is_an_error(rates):
    unused = next(p for p in rates if p != "*")
    with pytest.raises(UserError) as caught:
        param_groups(build("llama", "lora"), base_lr=rates)
    message = str(caught.value)
    assert f"pattern {unused!r} matches no base parameter" in message
    assert "'lm_head.weight'" in message


def test_all_bad_rates_are_named_at_once():
    with pytest.raises(UserError) as caught:
        param_groups(
            build("llama", "lora"),
            base_lr={"*q_proj*": -1.0, "*": float("nan")},
            adapter_lr=float("inf"),
        )
    for part in ("base_lr['*q_proj*'] is -1.0", "base_lr['*'] is nan", "adapter_lr is inf"):
        assert part in str(caught.value)


def test_spared_parameters_have_no_weight_decay():
    model = build("llama", None)
    norms = [n for n, _ in model.named_parameters() if "norm" in n]
    groups = param_groups(model, "fo-ft", base_weight_decay=0.1, no_decay=norms)
    decays = {name: g["weight_decay"] for g in groups for name in g["names"]}
    assert {n for n, decay in decays.items() if decay == 0} == set(norms)
    assert {decays[n] for n in decays if n not in norms} == {0.1}


@pytest.mark.parametrize(
    ("method", "adapter", "message"),
    [
        ("hybrid", None, "moves an adapter and the model has none; wrap it with peft.get_peft_mod"),
        ("zo-ft", "lora", "moves no adapter and the model has one; pass the model without"),
    ],
)
def test_a_method_that_does_not_fit_the_model(method, adapter, message):
    model = build("llama", adapter)
    flags = [p.requires_grad for p in model.parameters()]
    with pytest.raises(UserError, match=message):
        param_groups(model, method)
    assert [p.requires_grad for p in model.parameters()] == flags


def test_a_frozen_base_is_left_to_torch():
    """A method that freezes the base does not check the patterns of the base's learning rates."""
    groups = param_groups(build("llama", "lora"), "fo-peft", base_lr={"nothing*": 1e-3})
    assert all(isinstance(p, torch.Tensor) for g in groups for p in g["params"])


def wrapped_by_transformers():
    model = build("llama", None)
    model.add_adapter(peft.LoraConfig(r=2, target_modules=["q_proj"]))
    return model


def injected():
    return peft.inject_adapter_in_model(peft.LoraConfig(r=2, **QV), build("llama", None))


def mixed():
    return peft.get_peft_model(build("llama", None), peft.LoraConfig(r=2, **QV), mixed=True)


@pytest.mark.parametrize("method", ["hybrid", "fo-peft", "zo-ft"])
@pytest.mark.parametrize("make", [wrapped_by_transformers, injected, mixed])
def test_layers_of_an_adapter_without_a_peft_model_are_refused(make, method):
    with pytest.raises(UserError, match=r"no PeftModel, as after .*peft\.get_peft_model\(model"):
        apply_method(make(), method)


@pytest.mark.parametrize("outer", ["lora", "prompt"])
@pytest.mark.filterwarnings("ignore:.*second time", "ignore:.*multiple adapters")
def test_an_adapter_over_an_adapter_is_refused(outer):
    config = (
        peft.LoraConfig(r=2, target_modules=["k_proj"], **LM)
        if outer == "lora"
        else peft.PromptTuningConfig(num_virtual_tokens=3, **LM)
    )
    model = peft.get_peft_model(build("llama", "lora"), config)
    with pytest.raises(UserError, match=r"PeftModel inside a PeftModel.*merge_and_unload"):
        apply_method(model, "hybrid")


@pytest.mark.parametrize("start", ["pissa", "olora"])
def test_initial_values_that_change_the_base_are_refused_where_it_moves(start):
    config = peft.LoraConfig(r=2, init_lora_weights=start, **QV)
    model = peft.get_peft_model(build("llama", None), config)
    with pytest.raises(UserError, match=f"init_lora_weights='{start}', and only"):
        apply_method(model, "hybrid")
    assert apply_method(model, "fo-peft").adapter


@pytest.mark.parametrize("method", ["hybrid", "fo-peft", "zo-peft"])
def test_weights_that_the_user_froze_stay_frozen(method):
    model = build("llama", "lora")
    for name, parameter in model.named_parameters():
        if "lora_A" in name:
            parameter.requires_grad_(False)
    for _ in range(2):  # A trainer applies its method twice.
        adapter = apply_method(model, method).adapter
        assert {"lora_A" in name for name in adapter} == {False}
