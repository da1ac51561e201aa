"""Tests of adapters in some layers: which these are, where the backward pass ends, what is refused.

The tiny models have two layers; encoder-decoders have two in each part, or one in the decoder.
"""

from __future__ import annotations

import pytest
import torch

from tests.support import zoo
from tests.support.trainers import trainer_for
from zofo.config.load import load_config
from zofo.errors import UserError
from zofo.models.adapter_kinds import KINDS
from zofo.models.adapters import create_adapter
from zofo.models.layers import backward_share, numbers_of, share_by_config
from zofo.models.saved_adapters import attach_adapter
from zofo.optim.blocks import split_parameters
from zofo.optim.methods import apply_method
from zofo.run.plan import make_plan

STACKS = {
    "gpt2": ["transformer.h"],
    "gpt-neox": ["gpt_neox.layers"],
    "opt": ["model.decoder.layers"],
    "opt-350m": ["model.decoder.layers"],
    "bert": ["bert.encoder.layer"],
    "roberta": ["roberta.encoder.layer"],
    "deberta-v2": ["deberta.encoder.layer"],
    "deberta-v3": ["deberta.encoder.layer"],
    "t5": ["encoder.block", "decoder.block"],
    "flan-t5": ["encoder.block", "decoder.block"],
    "bart": ["model.encoder.layers", "model.decoder.layers"],
}
LAYERED = [kind for kind in KINDS if "layers" in KINDS[kind].options]


def layers_of(model, architecture):
    """The layers in the order of the forward pass."""
    stacks = STACKS.get(architecture, ["model.layers"])
    return [layer for stack in stacks for layer in model.get_submodule(stack)]


def attach(architecture, kind="lora", **options):
    model = zoo.bare(architecture)
    return create_adapter(model, kind, head=zoo.head_of(architecture), **options)


def numbers_with_adapter(model, architecture):
    adapter = set(split_parameters(model).adapter.values())
    layers = layers_of(model.get_base_model(), architecture)
    return [i for i, layer in enumerate(layers) if adapter & set(layer.parameters())]


def in_graph(model, layers, batch):
    """Whether the output of the embeddings, and of each layer, is part of the graph."""
    found = {}

    def note(key):
        def hook(module, inputs, output):
            output = output if isinstance(output, torch.Tensor) else output[0]
            found[key] = found.get(key, False) or output.requires_grad

        return hook

    embeddings = [m for m in model.modules() if isinstance(m, torch.nn.Embedding)]
    hooks = [module.register_forward_hook(note(-1)) for module in embeddings]
    hooks += [layer.register_forward_hook(note(i)) for i, layer in enumerate(layers)]
    loss = model(**batch).loss
    for hook in hooks:
        hook.remove()
    return [found[i] for i in sorted(found)], loss


@pytest.mark.parametrize(
    ("kind", "architecture"),
    [
        *(("lora", architecture) for architecture in zoo.ARCHITECTURES),
        *(("ia3", architecture) for architecture in ("llama", "gpt2", "bart")),
    ],
)
def test_the_backward_pass_ends_at_the_lowest_layer_with_an_adapter(architecture, kind):
    model = attach(architecture, kind, layers="last 1")
    apply_method(model, "hybrid")
    layers = layers_of(model.get_base_model(), architecture)
    last = len(layers) - 1
    assert numbers_with_adapter(model, architecture) == [last]
    states, loss = in_graph(model, layers, zoo.batch_for(architecture))
    assert states == [False] * len(layers) + [True]
    assert backward_share(model) == pytest.approx(1 / len(layers))
    loss.backward()
    blocks = split_parameters(model)
    assert all(p.grad is None for p in blocks.base.values())
    assert all(p.grad is not None for p in blocks.adapter.values())


@pytest.mark.parametrize("kind", LAYERED)
@pytest.mark.parametrize(
    ("layers", "numbers", "share"),
    [
        ("all", [0, 1], 1),
        ("last 2", [0, 1], 1),
        ("last 1", [1], 0.5),
        ("first 1", [0], 1),
        ([1], [1], 0.5),
        ([1, 0, 1], [0, 1], 1),
    ],
)
def test_every_form_with_every_kind_that_has_layers(kind, layers, numbers, share):
    model = attach("llama", kind, layers=layers)
    assert numbers_with_adapter(model, "llama") == numbers
    apply_method(model, "fo-peft")
    assert backward_share(model) == share


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "t5"])
@pytest.mark.parametrize("targets", [None, "all-linear"])
def test_all_layers_by_number_are_all_layers(architecture, targets):
    plain = attach(architecture, targets=targets)
    count = len(layers_of(plain.get_base_model(), architecture))
    chosen = attach(architecture, targets=targets, layers=list(range(count)))
    assert repr(chosen) == repr(plain)
    halves = [attach(architecture, targets=targets, layers=[i]) for i in range(count)]
    names = [name for model in halves for name in split_parameters(model).adapter]
    assert sorted(names) == sorted(split_parameters(plain).adapter)


def test_a_pattern_of_pefts_in_some_layers(monkeypatch):
    import peft.utils

    known = peft.utils.TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING
    monkeypatch.setitem(known, "llama", r".*\.(q_proj|v_proj)")
    names = split_parameters(attach("llama", layers="last 1")).adapter
    assert {name.split(".")[-4] for name in names} == {"q_proj", "v_proj"}
    assert all(".layers.1." in name for name in names)


@pytest.mark.parametrize(("kind", "architecture"), [("dora", "llama"), ("ia3", "t5")])
def test_a_saved_adapter_is_in_the_same_layers(tmp_path, kind, architecture):
    model = attach(architecture, kind, layers="last 1")
    for parameter in split_parameters(model).adapter.values():
        parameter.data.add_(0.1)
    model.save_pretrained(tmp_path)
    again = attach_adapter(zoo.bare(architecture), tmp_path)
    saved, loaded = (split_parameters(m.eval()).adapter for m in (model, again))
    assert saved.keys() == loaded.keys()
    assert all(torch.equal(saved[name], loaded[name]) for name in saved)


# The tests below check the share of the layers that a backward pass reaches.


@pytest.mark.parametrize("kind", ["prompt", "prefix", "p-tuning"])
def test_a_prompt_is_below_all_layers(kind):
    model = attach("llama", kind)
    apply_method(model, "fo-peft")
    assert backward_share(model) == 1


def test_a_head_is_above_all_layers():
    model = zoo.bare("bert").requires_grad_(False)
    model.classifier.requires_grad_(True)
    assert backward_share(model) == 0
    model.bert.embeddings.requires_grad_(True)
    assert backward_share(model) == 1


@pytest.mark.parametrize("architecture", ["llama", "bert", "flan-t5"])
@pytest.mark.parametrize("layers", ["last 1", "first 1", "last 2", (1,)])
def test_the_share_by_the_configuration_is_the_models(tmp_path, architecture, layers):
    given = layers if isinstance(layers, str) else list(layers)
    model = attach(architecture, layers=given)
    apply_method(model, "hybrid")
    zoo.bare(architecture).config.save_pretrained(tmp_path)
    share = share_by_config(layers, str(tmp_path), None, False)
    assert share == pytest.approx(backward_share(model))


def test_the_plan_counts_the_adapter_in_its_layers(decoder_folder, tmp_path):
    rows = tmp_path / "rows.csv"
    rows.write_text("text,label\n" + "".join(f"film {i},{'ab'[i % 2]}\n" for i in range(60)))
    task = {"name": "classification", "train": str(rows)}
    task |= {"num_train": 20, "num_dev": 10, "num_test": 10}
    values = {"model": decoder_folder, "task": task, "adapter": {"type": "lora"}}
    plans = []
    for layers in ("all", "last 1"):
        values["adapter"]["layers"] = layers
        plans.append(make_plan(load_config(values=values)))
    whole, half = plans
    assert half.num_parameters["adapter"][1] * 2 == whole.num_parameters["adapter"][1]
    assert half.num_parameters["base"] == whole.num_parameters["base"]
    for kind in ("gradients", "optimizer states", "activations (estimate)"):
        assert half.memory_bytes[kind] * 2 == whole.memory_bytes[kind]
    assert whole.forward_equivalents / half.forward_equivalents == 3 / 2.5


@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_trainer_counts_the_layers_in_the_graph(tmp_path, checkpointing):
    model = attach("llama", layers="last 1")
    states = {}

    def note(module, inputs, output):
        if torch.is_grad_enabled():
            output = output if isinstance(output, torch.Tensor) else output[0]
            states.setdefault(names[module], set()).add(output.requires_grad)

    names = {layer: i for i, layer in enumerate(layers_of(model.get_base_model(), "llama"))}
    for layer in names:
        layer.register_forward_hook(note)
    trainer = trainer_for(tmp_path, model, max_steps=2, gradient_checkpointing=checkpointing)
    trainer.train()
    # transformers puts a hook on the embeddings for checkpointing, so the pass goes through all.
    assert states == {0: {checkpointing}, 1: {True}}
    assert trainer.forward_equivalents == 2 * ((2 if checkpointing else 1.5) + 1)


# The tests below check what is refused.


@pytest.mark.parametrize(
    "layers", ["top 4", "last", "last 0", "last -1", "last 1.5", "4", "", 4, [], [-1], ["1"], [1.0]]
)
def test_other_forms_are_refused(layers):
    with pytest.raises(UserError, match=r"layers (is|are) .*must be all, last 4, first 4"):
        numbers_of(layers, 2, "it")
    with pytest.raises(UserError, match=r"adapter\.layers is .*must be all, last 4, first 4"):
        load_config(values={"adapter": {"layers": layers}})


@pytest.mark.parametrize(
    ("layers", "message"),
    [
        ("last 3", "has 2 layers; choose at most 2"),
        ("first 99999999", "has 2 layers; choose at most 2"),
        ([0, 2], "has 2 layers; choose from 0 to 1"),
    ],
)
def test_more_layers_than_the_model_has(layers, message):
    with pytest.raises(UserError, match=message):
        attach("llama", layers=layers)
    with pytest.raises(UserError, match=message):
        numbers_of(layers, 2, "it")


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind not in LAYERED])
def test_kinds_without_layers_name_those_that_have_them(kind):
    words = rf"a {kind} reaches every layer; leave layers out, or choose adapter .*lora.* or ia3"
    with pytest.raises(UserError, match=words):
        attach("llama", kind, layers="last 1")
    with pytest.raises(UserError, match=words):
        load_config(overrides=[f"adapter={kind}", "adapter.layers=last 1"])


def test_a_file_chooses_its_layers_itself(tmp_path):
    file = tmp_path / "mine.json"
    file.write_text('{"peft_type": "LORA", "layers_to_transform": [1]}')
    model = attach("llama", config_file=file)
    assert numbers_with_adapter(model, "llama") == [1]
    apply_method(model, "hybrid")
    assert backward_share(model) == 0.5
    with pytest.raises(UserError, match="choose them in the file"):
        attach("llama", config_file=file, layers="last 1")
    with pytest.raises(UserError, match="choose them in the file"):
        load_config(overrides=[f"adapter.config_file={file}", "adapter.layers=last 1"])


def test_a_model_whose_layers_cannot_be_found():
    model = zoo.bare("llama")
    model.config.num_hidden_layers = 3
    with pytest.raises(UserError, match=r"no list of blocks of Llama.*name the modules.*targets"):
        create_adapter(model, layers="last 1")
    model = create_adapter(model)
    apply_method(model, "hybrid")
    assert backward_share(model) == 1


def test_a_target_outside_the_layers():
    with pytest.raises(UserError, match="'lm_head' matches no linear module in the layers last 1"):
        attach("opt", targets=["q_proj", "lm_head"], layers="last 1")
