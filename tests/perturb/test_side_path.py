"""Rank-one directions on side paths: the same function as a really perturbed copy of the model."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional

from tests.perturb.test_view import view_of
from tests.support import zoo
from tests.support.models import assert_same_bits, bits
from zofo.models.adapters import create_adapter
from zofo.noise.combine import combine
from zofo.optim.blocks import split_parameters
from zofo.perturb.side_path import NotByRows, RowDirections
from zofo.perturb.view import Perturbation, SelfCheckError

EPS, ROWS = 1e-2, 3
PAIRS = [
    pytest.param(
        *(architecture, adapter),
        marks=()
        if adapter == "lora" or architecture in ("llama", "bert", "t5")
        else pytest.mark.slow,
    )
    for architecture in zoo.ARCHITECTURES
    for adapter in ("lora", "prefix", "prompt")
    # DeBERTa's layers take no keys and values from outside.
    if not (adapter == "prefix" and architecture.startswith("deberta"))
]


def perturbed_copy(model, view, direction):
    """A copy whose matrices have the direction of one row."""
    twin = copy.deepcopy(model)
    blocks = split_parameters(twin)
    for name, parameter in blocks.base.items():
        tensor = blocks.base_index[name]
        combine(
            parameter,
            (EPS,),
            seed=view.seed,
            step=4,
            tensor=tensor,
            first_direction=direction if tensor in view.rank_one else 0,
            distribution="rank-one" if tensor in view.rank_one else "rademacher",
        )
    return twin


def shares_of(model, batch):
    """Each row's share of a mean over rows: [rows]."""
    logits, labels = model(**batch).logits, batch["labels"]
    if logits.ndim == 3:  # Virtual tokens come first.
        logits = logits[:, -labels.shape[1] :].transpose(1, 2)
    losses = functional.cross_entropy(logits, labels, reduction="none")
    return losses.view(len(labels), -1).mean(1) / len(labels)


@torch.no_grad()
def by_rows(view, evaluate, directions):
    """Evaluate at the rows' directions, after the layers that cannot tell rows were left out."""
    try:
        with view.at(EPS, step=4, directions=directions):
            return evaluate()
    except NotByRows as error:
        view.only_rank_one(view.rank_one - error.found.keys())
    with view.at(EPS, step=4, directions=directions):
        return evaluate()


@pytest.mark.parametrize(("architecture", "adapter"), PAIRS)
def test_each_row_sees_a_copy_with_its_own_direction(architecture, adapter):
    head = zoo.head_of(architecture)
    model = zoo.bare(architecture, dtype=torch.float64)
    model = create_adapter(model, type=adapter, head=head, tokenizer=None)
    model = model.to(torch.float64).eval()
    batch, view = zoo.batch_for(architecture, rows=ROWS), view_of(model, distribution="rank-one")
    before = bits(model)
    directions = RowDirections(5, ROWS, torch.arange(5, 5 + ROWS))
    own = by_rows(view, lambda: shares_of(model, batch), directions)
    with torch.no_grad():
        with view.at(EPS, step=4, direction=0):
            together = shares_of(model, batch)
        expected = [shares_of(perturbed_copy(model, view, d), batch) for d in (5, 6, 7, 0)]
    assert_same_bits(before, bits(model))
    for row in range(ROWS):
        torch.testing.assert_close(own[row], expected[row][row], rtol=1e-10, atol=0)
    torch.testing.assert_close(together, expected[3], rtol=1e-10, atol=0)


def view_on(model, **options):
    names = [name for name, _ in model.named_parameters()]
    parameters = list(model.parameters())
    options = {"seed": 3, "distribution": "rank-one"} | options
    return Perturbation(model, parameters, range(len(names)), **options), names


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed, self.hidden = nn.Embedding(11, 6), nn.Linear(6, 6)
        self.places, self.norm = nn.Embedding(4, 6), nn.LayerNorm(6)
        self.head = nn.Linear(6, 11, bias=False)
        self.head.weight = self.embed.weight
        self.stacked = nn.Parameter(torch.randn(2, 6, 6))

    def forward(self, ids):
        x = self.embed(ids) + self.places(torch.arange(ids.shape[1])[None])
        x = self.hidden(x.flatten(0, 1)).view(x.shape)  # as routers of experts do
        return self.head(self.norm(x @ self.stacked[0]))


def test_what_has_no_matrix_or_no_rows_has_one_direction_for_the_batch():
    model = Net().double().requires_grad_(False)
    view, names = view_on(model)
    served = {names[t] for t in view.rank_one}
    assert served == {"embed.weight", "hidden.weight", "places.weight"}
    ids = torch.randint(0, 11, (3, 4))
    directions = RowDirections(0, 3, torch.arange(3))
    found = by_rows(view, lambda: model(ids), directions)
    # One row of positions serves the whole batch.
    assert {names[t] for t in view.rank_one} == {"embed.weight", "hidden.weight"}
    for row in range(3):
        twin = copy.deepcopy(model)
        for t, parameter in enumerate(twin.parameters()):
            kind, first = ("rank-one", row) if t in view.rank_one else ("rademacher", 0)
            drawing = {"first_direction": first, "distribution": kind, "seed": 3, "step": 4}
            combine(parameter, (EPS,), tensor=t, **drawing)
        torch.testing.assert_close(found[row], twin(ids)[row], rtol=1e-10, atol=0)


def test_an_error_inside_leaves_hooks_and_weights_as_they_were():
    model = Net().requires_grad_(False)
    view, _ = view_on(model)
    before, ids = bits(model), torch.randint(0, 11, (3, 4))
    plain = model(ids)

    def interrupted():
        with view.at(EPS, step=0):
            model(ids)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert_same_bits(before, bits(model))
    assert torch.equal(model(ids), plain)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_a_read_beside_the_layer_is_found():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)).requires_grad_(False)
    view, _ = view_on(model)
    with pytest.raises(SelfCheckError, match=r"0\.weight"), view.at(EPS, step=0, self_check=True):
        model[0].weight @ torch.ones(4)
    with view.at(EPS, step=0, self_check=True):
        model(torch.ones(2, 4))


def test_only_weights_that_are_no_matrices_need_scratch():
    model = zoo.bare("llama")
    view = view_of(model, distribution="rank-one")
    batch = zoo.batch_for("llama")
    with torch.no_grad(), view.at(EPS, step=0):
        model(**batch)
    norms = [p for p in model.parameters() if p.ndim == 1]
    assert 0 < view.largest_layer_bytes <= sum(p.nbytes for p in norms)
    assert view.scratch_bytes <= 64 * 4 * len(norms)  # each starts at a multiple of 64 elements


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_stays_near_the_exact_perturbation(dtype):
    model = Net().requires_grad_(False)
    exact, ids = copy.deepcopy(model).double(), torch.randint(0, 11, (3, 4))
    view, _ = view_on(model.to(dtype))
    wide, _ = view_on(exact)
    with view.at(EPS, step=0):
        found = model(ids)
    with wide.at(EPS, step=0):
        expected = exact(ids)
    torch.testing.assert_close(found.double(), expected, rtol=0.1, atol=0.1)
