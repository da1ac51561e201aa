"""The invariants hold for every adapter on every architecture with every method.

The table in docs/guide/adapters.md says which pairs work. These tests check that table.
"""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

from tests.perturb.test_view import really_perturbed, view_of
from tests.support import zoo
from tests.support.models import assert_same_bits, bits, loss_of
from zofo.errors import UserError
from zofo.models.adapter_kinds import KINDS
from zofo.models.adapters import create_adapter
from zofo.optim.blocks import split_parameters
from zofo.optim.methods import METHODS, apply_method, param_groups
from zofo.optim.optimizer import HybridOptimizer

PAGE = Path(__file__).parents[2] / "docs" / "guide" / "adapters.md"
CELLS = ("yes", "random", "no")


def table_of_the_page():
    """Return a dict from (architecture, adapter) to the cell of the table."""
    text = PAGE.read_text().split("## What works on what")[1]
    rows = [
        [cell.strip() for cell in line.strip("|").split("|")]
        for line in re.findall(r"^\|.*\|$", text, re.MULTILINE)
    ]
    header, _, *body = rows
    return {
        (row[0].strip("`"), adapter.strip("`")): cell
        for row in body
        for adapter, cell in zip(header[1:], row[1:], strict=True)
    }


TABLE = table_of_the_page()
TELLING = ("llama", "gpt2", "bert", "deberta-v3", "t5")
"""Architectures on which the default run tests every adapter.

On the others it tests only the paper's adapters.
"""
WORKING = [pair for pair, cell in TABLE.items() if cell != "no"]
ADAPTED = [name for name, method in METHODS.items() if method.needs_adapter]
FULL = [name for name, method in METHODS.items() if not method.needs_adapter]


def some(pairs):
    """Mark as slow the pairs that add little to the others."""

    def is_telling(architecture, adapter):
        return architecture in TELLING or adapter in ("lora", "prefix", "prompt")

    return [
        pytest.param(*pair, marks=[] if is_telling(*pair) else [pytest.mark.slow]) for pair in pairs
    ]


def adapted(architecture, adapter, *, dtype=torch.float32, **options):
    """Return a model whose adapter weights all contribute to the output."""
    model = create_adapter(
        zoo.bare(architecture, dtype=dtype),
        adapter,
        head=zoo.head_of(architecture),
        **{"num_virtual_tokens": 3, **({"r": 2} if "lora" in adapter else {}), **options},
    )
    generator = torch.Generator().manual_seed(4)
    with torch.no_grad():
        for p in split_parameters(model).adapter.values():
            p.add_(torch.randn(p.shape, generator=generator), alpha=0.1)
    return model


def optimizer_for(model, method="hybrid", *, base_lr=1e-3, adapter_lr=1e-2, **options):
    groups = param_groups(model, method, base_lr=base_lr, adapter_lr=adapter_lr)
    return HybridOptimizer(groups, model, seed=3, self_check=False, **options)


def train(model, architecture, method, steps=2, **options):
    optimizer = optimizer_for(model, method, **options)
    for step in range(steps):
        batch = zoo.batch_for(architecture, seed=step)
        optimizer.step(lambda b=batch: loss_of(model, b))
    return optimizer


@torch.no_grad()
def put_back(model, saved):
    for name, p in model.named_parameters():
        p.copy_(saved[name])


def base_bits(model):
    return {name: p.detach().clone() for name, p in split_parameters(model).base.items()}


def adapter_bits(model):
    return {name: p.detach().clone() for name, p in split_parameters(model).adapter.items()}


def check_view(model, architecture):
    """Check the perturbed view of a model.

    The loss under the view equals the loss of a perturbed copy. At size zero it equals the plain
    loss. No weight changes.
    """
    model.eval()
    batch, before = zoo.batch_for(architecture), bits(model)
    with torch.no_grad():
        plain = loss_of(model, batch)
        view = view_of(model)
        with view.at(1e-2, step=3, self_check=True):
            seen = loss_of(model, batch)
        assert torch.equal(seen, loss_of(really_perturbed(model, 1e-2, step=3), batch))
        if plain.dtype == torch.float32:
            assert seen != plain
        with view.at(0.0, step=3):
            assert torch.equal(loss_of(model, batch), plain)
    assert_same_bits(bits(model), before)


def check_replay(model, architecture, method, **options):
    """Replaying the recorded steps on the original base gives the trained base, bit for bit."""
    before, original = bits(model), base_bits(model)
    optimizer = train(model, architecture, method, **options)
    moved = base_bits(model)
    assert all(not torch.equal(moved[name], original[name]) for name in original)
    put_back(model, before)
    optimizer.trajectory.replay(split_parameters(model).base)
    assert_same_bits(base_bits(model), moved)
    put_back(model, before)


def test_the_table_names_every_adapter_and_architecture():
    assert set(TABLE) == {(a, k) for a in zoo.ARCHITECTURES for k in KINDS}
    assert set(TABLE.values()) <= set(CELLS)


@pytest.mark.parametrize(("architecture", "adapter"), [p for p, c in TABLE.items() if c == "no"])
def test_what_does_not_work_is_said(architecture, adapter):
    with pytest.raises(UserError, match="choose"):
        adapted(architecture, adapter)


@pytest.mark.parametrize(("architecture", "adapter"), some(WORKING))
def test_the_invariants_hold(architecture, adapter):
    model = adapted(architecture, adapter)
    for method in ADAPTED:
        orders, blocks = METHODS[method], apply_method(model, method)
        for block, order in ((blocks.base, orders.base), (blocks.adapter, orders.adapter)):
            assert {p.requires_grad for p in block.values()} == {order == "first"}
    check_view(model, architecture)
    check_replay(model, architecture, "hybrid")
    original, base, unmoved = bits(model), base_bits(model), adapter_bits(model)

    # The hybrid method with base_lr 0 gives the bits of fo-peft, which moves the adapter alone.
    train(model, architecture, "fo-peft", steps=1)
    alone = bits(model)
    assert_same_bits(base_bits(model), base)
    assert any(not torch.equal(p, unmoved[name]) for name, p in adapter_bits(model).items())
    put_back(model, original)
    optimizer = train(model, architecture, "hybrid", steps=1, base_lr=0.0)
    assert optimizer.last_step.projected_grad != (0.0,)
    assert_same_bits(bits(model), alone)
    put_back(model, original)

    train(model, architecture, "zo-peft", steps=1, eps=1e-1)
    assert_same_bits(base_bits(model), base)
    assert all(not torch.equal(p, unmoved[name]) for name, p in adapter_bits(model).items())


@pytest.mark.parametrize("architecture", zoo.ARCHITECTURES)
def test_the_invariants_hold_without_an_adapter(architecture):
    model = zoo.bare(architecture)
    for method in FULL:
        base = apply_method(model, method).base
        assert {p.requires_grad for p in base.values()} == {METHODS[method].base == "first"}
    check_view(model, architecture)
    check_replay(model, architecture, "zo-ft")
    train(model, architecture, "fo-ft", steps=1)
    assert_same_bits(base_bits(model), bits_of_plain_sgd(architecture))


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("architecture", "adapter"), WORKING)
def test_the_base_in_half_precision(architecture, adapter, dtype):
    model = adapted(architecture, adapter, dtype=dtype)
    check_view(model, architecture)
    options = {"distribution": "gaussian", "estimator": "central", "num_directions": 2}
    check_replay(model, architecture, "hybrid", base_lr=1e-2, **options)


def bits_of_plain_sgd(architecture):
    """Return the base after one step of torch's SGD, on a model that zofo has not touched."""
    model = zoo.bare(architecture)
    plain = torch.optim.SGD(model.parameters(), lr=1e-3)
    loss_of(model, zoo.batch_for(architecture, seed=0)).backward()
    plain.step()
    return base_bits(model)


@pytest.mark.parametrize("architecture", ["deberta-v3", *zoo.OTHERS])
def test_weights_that_their_parent_reads_are_swapped_for_its_call(monkeypatch, architecture):
    """A weight that its parent module reads is swapped for the duration of the parent's call.

    The test sets the size limit to zero, because small weights are swapped for the whole forward
    pass.
    """
    monkeypatch.setattr("zofo.perturb.owners._SMALL_BYTES", 0)
    model = zoo.bare(architecture)
    # torch's convolutions round differently where a gradient is required.
    apply_method(model, "zo-ft")
    check_view(model, architecture)
