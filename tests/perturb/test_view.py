"""The perturbed view equals a perturbed copy of the model and never writes to a weight."""

from __future__ import annotations

import copy

import peft
import pytest
import torch
import transformers as hf
from torch import nn

from tests.support.models import (
    CASES,
    VOCABULARY,
    assert_same_bits,
    batch_for,
    bits,
    build,
    loss_of,
)
from zofo.errors import UserError
from zofo.noise.combine import combine
from zofo.optim.blocks import split_parameters
from zofo.optim.estimator import projected_gradients
from zofo.perturb.view import Perturbation, SelfCheckError

SMALL = {
    "vocab_size": VOCABULARY,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "pad_token_id": 0,
}
DTYPES = [torch.float32, torch.bfloat16]


def view_of(model, *, seed=5, distribution="rademacher"):
    blocks = split_parameters(model)
    return Perturbation(
        model,
        list(blocks.base.values()),
        [blocks.base_index[name] for name in blocks.base],
        seed=seed,
        distribution=distribution,
    )


def really_perturbed(model, scale, *, step, seed=5, distribution="rademacher"):
    twin = copy.deepcopy(model)
    blocks = split_parameters(twin)
    for name, parameter in blocks.base.items():
        combine(
            parameter,
            (scale,),
            seed=seed,
            step=step,
            tensor=blocks.base_index[name],
            distribution=distribution,
        )
    return twin


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("architecture", "adapter"), CASES)
def test_bit_equal_to_a_really_perturbed_copy(architecture, adapter, dtype):
    model = build(architecture, adapter, dtype=dtype).eval()
    batch = batch_for(architecture)
    before = bits(model)
    twin = really_perturbed(model, 1e-2, step=3)
    with torch.no_grad():
        with view_of(model).at(1e-2, step=3, self_check=True):
            seen = loss_of(model, batch)
        assert torch.equal(seen, loss_of(twin, batch))
        if dtype == torch.float32:  # In bfloat16 the mean loss of two classes takes few values.
            assert seen != loss_of(model, batch)
    assert_same_bits(bits(model), before)


@pytest.mark.parametrize(("architecture", "adapter"), CASES)
def test_size_zero_gives_the_same_loss(architecture, adapter):
    model = build(architecture, adapter).eval()
    batch = batch_for(architecture)
    with torch.no_grad():
        plain = loss_of(model, batch)
        with view_of(model).at(0.0, step=0):
            assert torch.equal(loss_of(model, batch), plain)


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
@pytest.mark.parametrize(("architecture", "adapter"), CASES)
def test_an_exception_inside_the_forward_leaves_every_bit(architecture, adapter, error):
    model = build(architecture, adapter)
    before, identities = bits(model), {n: id(p) for n, p in model.named_parameters()}
    modules = [m for m in model.modules() if m._parameters and not list(m.children())]
    batch = batch_for(architecture)
    for place in modules:

        def explode(*_):
            raise error("inside the forward")

        handle = place.register_forward_hook(explode)
        try:
            with torch.no_grad(), view_of(model).at(1e-1, step=0):
                loss_of(model, batch)
        except error:
            pass
        handle.remove()
        assert_same_bits(bits(model), before)
        assert {n: id(p) for n, p in model.named_parameters()} == identities
    assert not any(m._forward_pre_hooks for m in modules)


class Nested(nn.Module):
    """Owns a weight, calls a child twice, ties two weights, and calls a child that returns one."""

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.randn(4))
        self.first = nn.Linear(4, 4)
        self.last = nn.Linear(4, 4, bias=False)
        self.last.weight = self.first.weight
        self.table = Table()
        self.extra = nn.ParameterList([nn.Parameter(torch.randn(4))])

    def forward(self, x):
        x = self.first(self.first(x)) * self.scale
        row = self.table()
        return (self.last(x) + row + self.extra[0]).square().sum()


class Table(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(3, 4))

    def forward(self):
        return self.weight[1]


def test_nested_tied_repeated_and_returned_weights():
    model, x = Nested(), torch.randn(2, 4)
    twin = really_perturbed(model, 0.1, step=1)
    with torch.no_grad():
        with view_of(model).at(0.1, step=1, self_check=True):
            seen = model(x)
        assert torch.equal(seen, twin(x))


class Sneaky(nn.Module):
    """Reads its child's weight without calling the child."""

    def __init__(self):
        super().__init__()
        self.child = nn.Linear(4, 4)

    def forward(self, x):
        return nn.functional.linear(x, self.child.weight).sum()


def test_self_check_names_the_weight_that_is_read_directly():
    model = Sneaky()
    with (
        pytest.raises(SelfCheckError, match=r"child\.weight of Linear"),
        torch.no_grad(),
        view_of(model).at(0.1, step=0, self_check=True),
    ):
        model(torch.randn(2, 4))


@pytest.mark.parametrize(
    "module", [nn.MultiheadAttention(8, 2), nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0)]
)
def test_modules_that_read_their_children_are_swapped_whole(module):
    class Wrapped(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = module

        def forward(self, x):
            arguments = (x, x, x) if isinstance(self.inner, nn.MultiheadAttention) else (x,)
            out = self.inner(*arguments)
            return (out[0] if isinstance(out, tuple) else out).sum()

    model = Wrapped().train()
    x = torch.randn(3, 2, 8)
    twin = really_perturbed(model, 0.1, step=0)
    with torch.no_grad():
        with view_of(model).at(0.1, step=0, self_check=True):
            seen = model(x)
        assert torch.equal(seen, twin(x))


@pytest.mark.parametrize("option", [{"use_dora": True}, {"trainable_token_indices": [1, 2]}])
def test_adapters_that_read_their_base_layer(option):
    config = peft.LoraConfig(
        task_type="CAUSAL_LM", target_modules=["q_proj"], init_lora_weights=False, **option
    )
    model = peft.get_peft_model(build("llama", None), config).eval()
    batch, twin = batch_for("llama"), really_perturbed(model, 1e-2, step=3)
    with torch.no_grad():
        with view_of(model).at(1e-2, step=3, self_check=True):
            seen = loss_of(model, batch)
        assert torch.equal(seen, loss_of(twin, batch))


def test_gradient_checkpointing_of_the_first_order_pass():
    losses, gradients = [], []
    for checkpointing in (False, True):
        model = build("llama", "lora").train()
        if checkpointing:
            model.gradient_checkpointing_enable()
            model.enable_input_require_grads()
        batch = batch_for("llama")
        loss = loss_of(model, batch)
        loss.backward()
        with torch.no_grad(), view_of(model).at(1e-2, step=0, self_check=True):
            losses.append(loss_of(model, batch))
        gradients.append([p.grad for p in model.parameters() if p.grad is not None])
    assert torch.equal(*losses)
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


def test_scratch_is_that_of_the_largest_layer_and_of_the_small_weights():
    model = build("llama", "lora").eval()
    view = view_of(model)
    with torch.no_grad(), view.at(1e-2, step=0):
        loss_of(model, batch_for("llama"))
    largest = max(p.numel() * p.element_size() for p in split_parameters(model).base.values())
    assert 0 < view.scratch_bytes <= largest + 64 * 4

    model, x = WithSmallWeights(), torch.randn(3, 256)
    parameters = list(model.parameters())
    view = Perturbation(model, parameters, range(len(parameters)), seed=9)
    with torch.no_grad(), view.at(1e-2, step=0):
        model(x)
    largest = model.layers[0].weight.numel() * 4
    assert largest < view.scratch_bytes <= largest * (1 + 1 / 32)
    assert largest < view.largest_layer_bytes <= largest * (1 + 1 / 64)


def test_the_direction_of_a_weight_does_not_depend_on_the_adapter():
    plain = split_parameters(build("llama", None)).base_index
    for adapter in ("lora", "prefix", "prompt"):
        assert split_parameters(build("llama", adapter)).base_index == plain


def test_an_embedding_perturbs_only_the_rows_it_reads():
    """A lookup gives the rows of the perturbed table.

    Only these rows are perturbed, and other hooks still run.
    """
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(1000, 24), nn.Linear(24, 3))
    model[0].register_forward_hook(lambda module, args, output: output * 2)
    ids = torch.randint(0, 1000, (4, 5))
    parameters = list(model.parameters())
    view = Perturbation(model, parameters, range(3), seed=9)
    copied = copy.deepcopy(model)
    for tensor, parameter in enumerate(copied.parameters()):
        combine(parameter, (0.1,), seed=9, step=4, tensor=tensor)
    with torch.no_grad():
        expected = copied(ids)
        with view.at(0.1, step=4, self_check=True):
            seen = model(ids)
    assert torch.equal(seen, expected)
    assert view.scratch_bytes < parameters[0].numel()


def test_an_embedding_that_renormalises_is_perturbed_whole():
    torch.manual_seed(0)
    model = nn.Embedding(10, 4, max_norm=0.5)
    view = Perturbation(model, [model.weight], [0], seed=9)
    before = model.weight.detach().clone()
    with torch.no_grad(), view.at(0.1, step=4):
        seen = model(torch.arange(10))
    assert seen.norm(dim=1).max() <= 0.5 + 1e-6
    assert torch.equal(model.weight, before)


class WithSmallWeights(nn.Module):
    """Has a layer so large that the norm and the biases count as small, and a weight of its own."""

    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(256, 256), nn.LayerNorm(256), nn.Linear(256, 2))
        self.shift = nn.Parameter(torch.tensor(0.5))

    def forward(self, x):
        return self.layers(x).square().mean() + self.shift


def test_small_weights_are_seen_perturbed_without_hooks_of_their_own():
    torch.manual_seed(0)
    model, x = WithSmallWeights(), torch.randn(3, 256)
    parameters = list(model.parameters())
    before = bits(model)
    view = Perturbation(model, parameters, range(len(parameters)), seed=9)
    for step in range(3):
        if step == 1:  # The weight moves to another address.
            model.layers[0].bias.data = model.layers[0].bias.data.clone()
        if step == 2:
            model.layers[1].weight.data = model.layers[1].weight.data.clone()
        twin = copy.deepcopy(model)
        for tensor, parameter in enumerate(twin.parameters()):
            combine(parameter, (0.1,), seed=9, step=step, tensor=tensor)
        with torch.no_grad(), view.at(0.1, step=step, self_check=True):
            assert torch.equal(model(x), twin(x))
            with pytest.raises(RuntimeError, match="already"), view.at(0.1, step=step):
                pass
        assert_same_bits(bits(model), before)
        assert all(a is b for a, b in zip(model.parameters(), parameters, strict=True))


@pytest.mark.parametrize("size", [(1,), ()])
def test_a_loss_that_is_a_small_weight_is_measured(size):
    model = WithSmallWeights().double()
    model.shift = nn.Parameter(torch.full(size, 0.5, dtype=torch.float64))
    parameters = list(model.parameters())
    view = Perturbation(model, parameters, range(len(parameters)), seed=9)
    scalars = projected_gradients(
        lambda: model.shift.squeeze(), view, None, eps=1e-3, step=0, estimator="central"
    )
    assert scalars.abs().item() == pytest.approx(1.0)


MIXERS = {
    "qwen3-next": lambda: hf.Qwen3NextConfig(
        **SMALL,
        num_experts=2,
        num_experts_per_tok=1,
        moe_intermediate_size=8,
        shared_expert_intermediate_size=8,
        linear_num_value_heads=2,
        linear_num_key_heads=2,
        linear_key_head_dim=8,
        linear_value_head_dim=8,
        layer_types=["linear_attention"],
    ),
    "lfm2": lambda: hf.Lfm2Config(**SMALL, layer_types=["conv"], conv_L_cache=3, block_ff_dim=24),
    "jamba": lambda: hf.JambaConfig(
        **{**SMALL, "num_hidden_layers": 2},
        num_experts=1,
        attn_layer_period=2,
        attn_layer_offset=1,
        use_mamba_kernels=False,
        mamba_d_state=4,
        mamba_d_conv=2,
        mamba_dt_rank=4,
    ),
}


@pytest.mark.parametrize("architecture", MIXERS)
@torch.no_grad()
def test_mixers_that_read_the_weights_of_their_children(architecture):
    model = hf.AutoModelForCausalLM.from_config(MIXERS[architecture]()).eval()
    model.config.use_cache = False
    batch = batch_for("llama")
    with view_of(model).at(1e-2, step=3, self_check=True):
        seen = loss_of(model, batch)
    assert torch.equal(seen, loss_of(really_perturbed(model, 1e-2, step=3), batch))
    assert seen != loss_of(model, batch)


def test_a_failed_self_check_is_an_error_that_a_user_can_act_on():
    assert issubclass(SelfCheckError, UserError)
