"""A weight that another module reads is swapped for the call of that module."""

from __future__ import annotations

import copy

import peft
import pytest
import torch
import transformers as hf

from tests.perturb.test_view import MIXERS, view_of
from tests.support.models import assert_same_bits, batch_for, bits, build, loss_of
from zofo.noise.combine import combine
from zofo.optim.blocks import split_parameters
from zofo.perturb.view import Perturbation, SelfCheckError

pytestmark = [
    pytest.mark.usefixtures("no_small_weights"),
    # The hooks of the evaluation that finds the reads are on layers that peft passes by.
    pytest.mark.filterwarnings("ignore:One of the base layers adapted with"),
    pytest.mark.filterwarnings("ignore:Sparse invariant checks"),
]


@pytest.fixture
def no_small_weights(monkeypatch):
    """Let the hooks swap every weight, because small ones are swapped for the whole forward."""
    monkeypatch.setattr("zofo.perturb.owners._SMALL_BYTES", 0)


READING = {  # adapters whose layers read the weight of the layer that they wrap
    "HIRA": {"r": 2},
    "SHIRA": {"r": 2},
    "HRA": {"r": 2},
    "GLORA": {"r": 2},
    "PEANUT": {"r": 2},
    "SUPERTUNING": {},
    "LORA": {"target_modules": [], "target_parameters": ["mlp.gate_proj.weight"]},
}
SHARED = {  # adapters whose layers, or whose model, read a weight that belongs to no layer
    "CARTRIDGE": {"num_virtual_tokens": 3},
    "VBLORA": {"r": 2, "num_vectors": 8, "vector_length": 4, "topk": 2},
    "LILY": {"r": 2},
    "TINYLORA": {},
}


def adapted_by(kind, options):
    from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING as KINDS

    targets = {} if kind == "CARTRIDGE" else {"target_modules": ["q_proj", "v_proj"]}
    config = KINDS[peft.PeftType(kind)](task_type="CAUSAL_LM", **{**targets, **options})
    torch.manual_seed(3)
    model = peft.get_peft_model(build("llama", None), config).eval()
    with torch.no_grad():
        for p in split_parameters(model).adapter.values():
            p.add_(torch.randn(p.shape), alpha=0.1)
    return model


def base_of(model):
    """Return the base's parameters and tensor indices by their names in the adapted model."""
    blocks, names = split_parameters(model), {id(p): n for n, p in model.named_parameters()}
    base = {names[id(p)]: p for p in blocks.base.values()}
    return base, {names[id(p)]: blocks.base_index[n] for n, p in blocks.base.items()}


def check_checked(model, block, index, batch):
    """Check that `checked` computes what a perturbed copy computes, and that `at` then does."""
    view = Perturbation(model, list(block.values()), list(index.values()), seed=5)
    before, evaluations = bits(model), []
    twin = copy.deepcopy(model)
    with torch.no_grad():
        for (name, p), tensor in zip(block.items(), index.values(), strict=True):
            place = twin.get_submodule(name.rpartition(".")[0])
            weight = place._parameters[name.rpartition(".")[2]]
            combine(weight, (1e-2,), seed=5, step=3, tensor=tensor)
            assert not torch.equal(weight, p)

        def evaluate():
            evaluations.append(None)
            with view.at(1e-2, step=3, self_check=True):
                return loss_of(model, batch)

        seen = view.checked(evaluate)
        assert torch.equal(seen, loss_of(twin, batch))
        assert seen != loss_of(model, batch)
        assert len(evaluations) <= 2
        with view.at(1e-2, step=3, self_check=True):
            assert torch.equal(loss_of(model, batch), seen)
    assert_same_bits(bits(model), before)


@pytest.mark.parametrize("kind", READING)
def test_adapters_that_read_the_weight_of_the_layer_they_wrap(kind):
    model = adapted_by(kind, READING[kind])
    unprepared = view_of(model).at(1e-2, step=3, self_check=True)
    with torch.no_grad(), pytest.raises(SelfCheckError), unprepared:
        loss_of(model, batch_for("llama"))
    check_checked(model, *base_of(model), batch_for("llama"))


@pytest.mark.parametrize("kind", SHARED)
def test_adapters_whose_weights_are_shared_or_read_from_outside(kind):
    model = adapted_by(kind, SHARED[kind])
    blocks = split_parameters(model)
    check_checked(model, blocks.adapter, blocks.adapter_index, batch_for("llama"))


@pytest.mark.filterwarnings("ignore:The following .*_pattern keys:RuntimeWarning")
@pytest.mark.parametrize("targets", ["all-linear", ["gate"]])
def test_lora_on_qwen3_next(targets):
    torch.manual_seed(3)
    base = hf.AutoModelForCausalLM.from_config(MIXERS["qwen3-next"]()).eval()
    base.config.use_cache = False
    config = peft.LoraConfig(task_type="CAUSAL_LM", r=2, target_modules=targets)
    model = peft.get_peft_model(base, config).eval()
    check_checked(model, *base_of(model), batch_for("llama"))
