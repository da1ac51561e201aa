"""The scales of quantised layers move, and the codes stay."""

from __future__ import annotations

import copy
import math

import pytest
import torch

from tests.support.models import batch_for, loss_of
from tests.support.quantized import KINDS, load_quantized, plain_decoder
from zofo.disk.files import fingerprint
from zofo.errors import UserError
from zofo.noise.combine import combine, direction
from zofo.optim.blocks import split_parameters
from zofo.perturb.quantized import Scales, has_moving_scales, unit_of, unnest_scales
from zofo.perturb.side_path import RowDirections
from zofo.perturb.view import Perturbation


@pytest.fixture(scope="module", params=[64, 40])
def folder(request, tmp_path_factory):
    return plain_decoder(tmp_path_factory.mktemp("base"), width=request.param)


def view_of(model, distribution="rademacher"):
    blocks = split_parameters(model)
    base = blocks.movable
    tensors = [blocks.base_index[name] for name in base]
    return (
        base,
        tensors,
        Perturbation(model, list(base.values()), tensors, seed=7, distribution=distribution),
    )


@pytest.mark.parametrize(
    ("kind", "distribution"), [*((kind, "rademacher") for kind in KINDS), ("nf4", "gaussian")]
)
def test_a_perturbed_evaluation_is_that_of_a_rescaled_copy(folder, kind, distribution):
    model = load_quantized(folder, kind).train()
    unnest_scales(model)
    base, tensors, view = view_of(model, distribution)
    codes = fingerprint(split_parameters(model).base)
    num_scales = sum(isinstance(p, Scales) for p in base.values())
    assert num_scales == 14 == sum(map(has_moving_scales, model.modules()))

    rescaled = copy.deepcopy(model)
    copied = split_parameters(rescaled).movable
    for (name, parameter), tensor in zip(base.items(), tensors, strict=True):
        assert unit_of(copied[name]) == unit_of(parameter)
        combine(
            copied[name].data,
            (1e-2 * unit_of(parameter),),
            seed=7,
            step=3,
            tensor=tensor,
            first_direction=1,
            distribution=distribution,
        )
    batch = batch_for("llama")
    with torch.no_grad():
        expected, before = loss_of(rescaled, batch), loss_of(model, batch)
        with view.at(1e-2, step=3, direction=1, self_check=True):
            perturbed = loss_of(model, batch)
        after = loss_of(model, batch)
    assert torch.equal(perturbed, expected)
    assert torch.equal(after, before)
    assert not torch.equal(before, perturbed)
    assert fingerprint(split_parameters(model).base) == codes


@pytest.mark.parametrize("kind", KINDS)
def test_an_exception_in_a_perturbed_evaluation_leaves_the_scales(folder, kind):
    model = load_quantized(folder, kind).train()
    unnest_scales(model)
    base, _, view = view_of(model)
    before = {name: p.detach().clone() for name, p in base.items()}
    model.lm_head.register_forward_pre_hook(lambda *_: next(iter(())))
    with pytest.raises(StopIteration), view.at(1e-2, step=0):
        loss_of(model, batch_for("llama"))
    again = split_parameters(model).movable
    assert all(again[name] is p and torch.equal(p, before[name]) for name, p in base.items())


def test_unnested_scales_compute_the_same_bits(folder):
    model = load_quantized(folder, "nested").train()
    batch = batch_for("llama")
    names = {n for n in split_parameters(model).base if "absmax" in n}
    with torch.no_grad():
        before = loss_of(model, batch)
        added = unnest_scales(model)
        assert torch.equal(loss_of(model, batch), before)
    scales = {n: p for n, p in split_parameters(model).movable.items() if isinstance(p, Scales)}
    assert {f"{n.rpartition('.')[0]}.nested_absmax" for n in scales} <= names
    assert 0 < added < sum(p.nbytes for p in scales.values())
    assert unnest_scales(model) == 0


@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_units_are_powers_of_two_in_proportion_to_the_scales(folder, kind):
    model = load_quantized(folder, kind)
    scales = [p for p in split_parameters(model).base.values() if isinstance(p, Scales)]
    exponents = [math.log2(p.unit) for p in scales]
    assert all(exponent == int(exponent) for exponent in exponents)
    assert len(set(exponents)) > 2
    assert abs(sum(exponents) / len(exponents)) <= 0.5  # The unit of an average layer is 1.
    ratios = [float(p.mean()) / p.unit for p in scales]
    assert max(ratios) <= 2 * min(ratios)
    again = split_parameters(model).base.values()
    assert {id(p) for p in scales} <= {id(p) for p in again}


@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_scales_that_the_layer_no_longer_reads_are_refused(folder, kind):
    model = load_quantized(folder, kind)
    _, _, view = view_of(model)
    layer = model.model.layers[0].self_attn.q_proj
    state, key = (layer.state, "SCB") if kind == "int8" else (layer.weight.quant_state, "absmax")
    setattr(state, key, getattr(state, key).clone())
    match = r"layers\.0\.self_attn\.q_proj\.(weight\.absmax|SCB), .*; make the optimizer afterwards"
    with pytest.raises(UserError, match=match), view.at(1e-2, step=0):
        loss_of(model, batch_for("llama"))


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_compiled_model_whose_scales_move_is_refused(folder):
    model = load_quantized(folder, "nf4")
    model.model.layers[0].compile()
    with pytest.raises(UserError, match=r"LlamaDecoderLayer is compiled, and the scales"):
        view_of(model)


@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_the_difference_of_losses_is_the_derivative_along_the_direction(folder, kind):
    """Against the dequantised model, whose weights have gradients."""
    from bitsandbytes.functional import dequantize_4bit

    model = load_quantized(folder, kind).train()
    base, tensors, view = view_of(model)
    floats = type(model)(copy.deepcopy(model.config))
    del floats.config.quantization_config
    weights, ratios = {}, {}
    for name, module in model.named_modules():
        if not has_moving_scales(module):
            continue
        scales = next(p for n, p in base.items() if n.startswith(f"{name}."))
        if kind == "int8":
            weights[name] = module.weight.data.float() * scales / 127
            spread = lambda s, w: s.expand_as(w)  # noqa: E731
        else:
            weights[name] = dequantize_4bit(module.weight.data, module.weight.quant_state)
            spread = lambda s, w: s.reshape(-1).repeat_interleave(64)[: w.numel()].view_as(w)  # noqa: E731
        ratios[name] = (scales, spread)
    plain = dict(floats.named_parameters())
    known = {"model.embed_tokens.weight": "lm_head.weight"}  # The head is tied.
    for name, parameter in plain.items():
        owner = name.removesuffix(".weight")
        source = weights[owner] if owner in weights else base[known.get(name, name)]
        parameter.data = source.detach().clone()
    batch = batch_for("llama")
    floats.train().zero_grad()
    loss_of(floats, batch).backward()
    index = dict(zip(base, tensors, strict=True))
    expected = 0.0
    for name, parameter in plain.items():
        owner = name.removesuffix(".weight")
        if owner in ratios:
            scales, spread = ratios[owner]
            full = next(n for n, p in base.items() if p is scales)
            v = direction(scales.shape, seed=7, step=0, tensor=index[full]) * scales.unit
            change = parameter.detach() * spread(v / scales.detach(), parameter)
        else:
            tensor = index[known.get(name, name)]
            change = direction(parameter.shape, seed=7, step=0, tensor=tensor)
        expected += float((parameter.grad * change).sum())
    with torch.no_grad():
        values = []
        for eps in (3e-4, -3e-4):
            with view.at(eps, step=0):
                values.append(loss_of(model, batch).double())
    found = float(values[0] - values[1]) / 6e-4
    assert abs(expected) > 1e-2
    assert found == pytest.approx(expected, rel=0.01, abs=5e-3)


@pytest.mark.parametrize("kind", ["nf4", "fp4", "int8"])
def test_a_side_path_evaluates_rescaled_copies_row_by_row(kind, tmp_path):
    """Each row at its own rank-one direction of the scales, against a copy moved along it."""
    model = load_quantized(plain_decoder(tmp_path), kind).train()
    base, tensors, view = view_of(model, "rank-one")
    scales = {t for p, t in zip(base.values(), tensors, strict=True) if isinstance(p, Scales)}
    assert scales <= view.rank_one
    batch = batch_for("llama")
    rows = len(batch["input_ids"])
    inputs = {key: batch[key] for key in ("input_ids", "attention_mask") if key in batch}
    directions = RowDirections(first=2, num=rows, of_rows=torch.arange(2, 2 + rows))
    with torch.no_grad(), view.at(1e-2, step=3, direction=2, directions=directions):
        found = model(**inputs).logits
    for row in range(rows):
        rescaled = copy.deepcopy(model)
        copied = split_parameters(rescaled).movable
        for (name, parameter), tensor in zip(base.items(), tensors, strict=True):
            is_rank_one = tensor in view.rank_one
            combine(
                copied[name].data,
                (1e-2 * unit_of(parameter),),
                seed=7,
                step=3,
                tensor=tensor,
                first_direction=2 + row if is_rank_one else 2,
                distribution="rank-one" if is_rank_one else "rademacher",
            )
        with torch.no_grad():
            expected = rescaled(**inputs).logits
            before = model(**inputs).logits
        torch.testing.assert_close(found[row], expected[row], rtol=1e-4, atol=1e-4)
        assert (expected[row] - before[row]).abs().max() > 1e-2
