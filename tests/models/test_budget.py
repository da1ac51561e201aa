"""The modules that are kept are those that matter, and their parameters are within the budget."""

import peft
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from zofo.errors import UserError
from zofo.models.budget import Choice, adapter_parts, importances, places_within


class Branches(nn.Module):
    """Three layers side by side, of which the loss below reads one."""

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(4, 4) for _ in range(3))

    def forward(self, x):
        return [layer(x) for layer in self.layers]


def adapted(kind="lora"):
    targets = ["0", "1", "2"]
    if kind == "ia3":
        config = peft.IA3Config(target_modules=targets, feedforward_modules=[])
    else:
        config = peft.LoraConfig(target_modules=targets, use_dora=kind == "dora")
    return peft.get_peft_model(Branches(), config)


@pytest.mark.parametrize("matters", range(3))
@pytest.mark.parametrize("kind", ["lora", "dora", "ia3"])
def test_the_only_layer_that_matters_is_kept(matters, kind):
    model = adapted(kind)
    before = {name: p.clone() for name, p in model.named_parameters()}
    batches = [torch.randn(5, 4) for _ in range(2)]
    scores = importances(model, lambda x: model(x)[matters].square().mean(), batches)
    sizes = {m: sum(p.numel() for p in part) for m, part in adapter_parts(model).items()}
    places = places_within(sizes, scores, next(iter(sizes.values())))
    assert Choice(places, 2, 4).modules == [f"layers.{matters}"]
    assert [place.importance > 0 for place in places] == [i == matters for i in range(3)]
    assert all(torch.equal(before[name], p) for name, p in model.named_parameters())


def test_the_importance_is_the_fall_of_the_loss_over_the_rate():
    model = adapted()
    batches = [torch.randn(5, 4) for _ in range(3)]

    def loss(x):
        return sum((i + 1) * out.square().mean() for i, out in enumerate(model(x)))

    scores = importances(model, loss, batches)
    rate = 1e-4
    for name, part in adapter_parts(model).items():
        total = sum(map(loss, batches)) / 3
        gradients = torch.autograd.grad(total, part)
        with torch.no_grad():
            for p, g in zip(part, gradients, strict=True):
                p -= rate * g
            fall = total - sum(map(loss, batches)) / 3
            for p, g in zip(part, gradients, strict=True):
                p += rate * g
        assert float(fall) / rate == pytest.approx(scores[name], rel=0.05)


@settings(max_examples=50, deadline=None)
@given(
    st.dictionaries(
        st.text(min_size=1), st.tuples(st.integers(1, 50), st.floats(0, 1e6)), min_size=1
    ),
    st.integers(1, 300),
)
def test_the_kept_modules_are_within_the_budget_and_leave_no_room(values, budget):
    sizes = {name: size for name, (size, _) in values.items()}
    places = places_within(sizes, {name: score for name, (_, score) in values.items()}, budget)
    spent = sum(place.num_parameters for place in places if place.is_kept)
    assert spent <= budget
    assert all(place.num_parameters > budget - spent for place in places if not place.is_kept)
    assert [place.module for place in places] == list(sizes)


def test_the_most_important_per_parameter_come_first():
    sizes, scores = {"wide": 10, "a": 2, "b": 2}, {"wide": 30.0, "a": 4.0, "b": 8.0}
    kept = [p.module for p in places_within(sizes, scores, 12) if p.is_kept]
    assert kept == ["wide", "b"]  # They bring 3 and 4 a parameter, and a brings 2.


def test_a_gradient_that_is_not_finite_is_refused():
    model = adapted()
    with pytest.raises(UserError, match="not finite"):
        importances(model, lambda x: model(x)[0].sum() * float("nan"), [torch.randn(2, 4)])
