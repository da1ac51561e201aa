"""A large linear layer computed tile by tile equals a perturbed copy of it, bit for bit."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from tests.support.models import assert_same_bits, bits
from zofo.noise.combine import combine
from zofo.perturb.tiles import ROWS, TiledLinear, is_tileable
from zofo.perturb.view import Perturbation

OUT = 8 * ROWS + 100  # The last tile is smaller than the others.


class Head(nn.Module):
    def __init__(self, bias=True):
        super().__init__()
        torch.manual_seed(0)
        self.body, self.head = nn.Linear(6, 40), nn.Linear(40, OUT, bias=bias)

    def forward(self, x):
        return self.head(self.body(x).tanh())


def view_of(model):
    return Perturbation(model, list(model.parameters()), range(4), seed=9)


def really_perturbed(model, scale, step):
    twin = copy.deepcopy(model)
    for tensor, parameter in enumerate(twin.parameters()):
        combine(parameter, (scale,), seed=9, step=step, tensor=tensor)
    return twin


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(6,), (1, 6), (5, 6), (2, 3, 6)])
def test_bit_equal_to_a_perturbed_copy(shape, bias, dtype):
    model = Head(bias).to(dtype)
    view = Perturbation(model, list(model.parameters()), range(3 + bias), seed=9)
    x = torch.randn(shape).to(dtype)
    before = bits(model)
    with torch.no_grad():
        for step in range(2):
            if step == 1:  # The weights move to another address.
                model.head.weight.data = model.head.weight.data.clone()
            twin = really_perturbed(model, 0.1, step)
            with view.at(0.1, step=step, self_check=step == 0):
                seen = model(x)
            assert torch.equal(seen, twin(x))
            with view.at(0.0, step=step):
                assert torch.equal(model(x), Head.forward(model, x))
    assert_same_bits(bits(model), before)
    assert "forward" not in vars(model.head)


def test_the_scratch_is_a_tile():
    model = Head()
    view = view_of(model)
    with torch.no_grad(), view.at(0.1, step=0):
        model(torch.randn(5, 6))
    tile, bias, body = ROWS * 40 * 4, OUT * 4, 4 * 64 * 8
    assert tile <= view.scratch_bytes <= tile + bias + body < model.head.weight.numel() * 4
    assert tile <= view.largest_layer_bytes <= tile + bias + body


def test_layers_share_the_tile():
    model = nn.Sequential(nn.Linear(6, OUT), nn.Linear(OUT, 3), nn.Linear(3, OUT))
    view = Perturbation(model, list(model.parameters()), range(6), seed=9)
    twin = copy.deepcopy(model)
    for tensor, parameter in enumerate(twin.parameters()):
        combine(parameter, (0.1,), seed=9, step=0, tensor=tensor)
    x = torch.randn(5, 6)
    with torch.no_grad(), view.at(0.1, step=0):
        assert torch.equal(model(x), twin(x))
    assert sum(t.numel() for t in view._tile.values()) == ROWS * 6


@pytest.mark.parametrize("why", ["other bits", "gradients", "autocast"])
def test_a_layer_is_computed_whole_where_tiles_will_not_do(why, monkeypatch):
    model, x = Head(), torch.randn(5, 6)
    view, twin = view_of(model), really_perturbed(model, 0.1, 0)
    if why == "other bits":
        product = TiledLinear._product
        monkeypatch.setattr(TiledLinear, "_product", lambda *args: product(*args) * (1 + 2**-20))
    autocast = torch.autocast("cpu", torch.bfloat16, enabled=why == "autocast")
    with torch.set_grad_enabled(why == "gradients"), autocast:
        with view.at(0.1, step=0):
            seen = model(x)
        assert torch.equal(seen, twin(x))


def test_hooks_of_the_layer_run_and_an_error_leaves_it_clean():
    model, x = Head(), torch.randn(5, 6)
    before, calls = bits(model), []
    model.head.register_forward_hook(lambda module, args, output: output * 2)
    with torch.no_grad():
        with view_of(model).at(0.1, step=0):
            seen = model(x)
        twin = really_perturbed(model, 0.1, 0)
        assert torch.equal(seen, twin(x))

        def fail(module, args, output):
            calls.append(1)
            raise ZeroDivisionError

        model.head.register_forward_hook(fail)
        with pytest.raises(ZeroDivisionError), view_of(model).at(0.1, step=0):
            model(x)
    assert calls
    assert_same_bits(bits(model), before)
    assert "forward" not in vars(model.head)


def test_only_plain_large_layers_are_tiled():
    class Own(nn.Linear):
        def forward(self, x):
            return super().forward(x) + 1

    assert is_tileable(nn.Linear(4, 8 * ROWS))
    assert not is_tileable(nn.Linear(4, 8 * ROWS - 1))
    assert not is_tileable(Own(4, 8 * ROWS))
    assert not is_tileable(nn.Linear(4, 8 * ROWS).half())
    patched = nn.Linear(4, 8 * ROWS)
    patched.forward = lambda x: x
    assert not is_tileable(patched)
