"""Populations: known answers in closed form, answers left out, replay, and generation by rows."""

from __future__ import annotations

import copy
import itertools
import math
import warnings

import pytest
import torch
from torch import nn

from tests.support.models import assert_same_bits, bits, build
from zofo.errors import UserError
from zofo.optim.methods import param_groups
from zofo.optim.optimizer import HybridOptimizer
from zofo.optim.population import Population, advantages
from zofo.perturb.side_path import RowDirections

X = torch.tensor([[1.0, -0.5, 0.3], [0.2, 0.8, -1.0]]).double()  # one row for each prompt
TARGET = torch.tensor([[0.3, 1.0], [-1.0, 0.5]]).double()
PAYOFF = torch.tensor([[1.0, 0.0], [0.0, 4.0]]).double()  # of each arm, by prompt


def layer():
    torch.manual_seed(5)
    return nn.Linear(3, 2, bias=False).double()


def optimizer_of(model, **options):
    options = {"eps": 0.4, "seed": 11, "self_check": False} | options
    return HybridOptimizer(
        param_groups(model, "zo-ft", base_lr=1.0),
        model,
        distribution="rank-one",
        directions_per_step="rows",
        **options,
    )


def population_of(model, reward, num_answers, **options):
    """Each prompt's row of X goes through the layer, once for each answer."""

    def respond(rows):
        prompts = torch.tensor(list(rows)) // num_answers
        return list(zip(prompts.tolist(), model(X[prompts]), strict=True))

    def score(answers):
        return torch.stack([reward(prompt, output) for prompt, output in answers])

    return Population(respond, score, len(X), num_answers, **options)


def quadratic(prompt, output):
    return -(output - TARGET[prompt]).square().sum() / 2


def bandit(generator):
    """The payoff of an arm that is drawn from the softmax of the outputs."""

    def reward(prompt, output):
        arm = torch.multinomial(output.softmax(0), 1, generator=generator)
        return PAYOFF[prompt, arm[0]]

    return reward


def all_directions():
    signs = lambda n: torch.tensor(list(itertools.product((-1.0, 1.0), repeat=n))).double()  # noqa: E731
    return [torch.outer(a, b) for a in signs(2) for b in signs(3)]


def closed_form(weight, eps):
    """E J(w + eps v) v / eps of each prompt, and the variance of its rewards, over all v."""
    found = []
    for i in range(len(X)):
        expected = [PAYOFF[i] @ ((weight + eps * v) @ X[i]).softmax(0) for v in all_directions()]
        squares = [
            PAYOFF[i] ** 2 @ ((weight + eps * v) @ X[i]).softmax(0) for v in all_directions()
        ]
        slopes = [j * v / eps for j, v in zip(expected, all_directions(), strict=True)]
        variance = torch.stack(squares).mean() - torch.stack(expected).mean() ** 2
        found.append((torch.stack(slopes).mean(0), variance))
    return found


def moves(reward, num_answers, num_steps, *, estimator, scale):
    """The estimates of the gradient of the reward at one point: [steps, weights]."""
    model = layer()
    start = model.weight.detach().clone()
    optimizer = optimizer_of(model, estimator=estimator)
    population = population_of(model, reward, num_answers, scale=scale)
    found = []
    for _ in range(num_steps):
        with torch.no_grad():
            model.weight.copy_(start)
        optimizer.step(zeroth_loss=lambda: population)
        found.append((model.weight.detach() - start).flatten())
    return torch.stack(found)


def assert_mean(found, expected, *, bias=0.0):
    error = (found.mean(0) - expected.flatten()).abs() - bias * expected.norm()
    assert (error / (found.std(0) / len(found) ** 0.5)).max() < 4.5


@pytest.mark.parametrize("estimator", ["forward", "central"])
def test_a_quadratic_reward_gives_its_gradient(estimator):
    weight = layer().weight.detach().requires_grad_()
    reward = sum(quadratic(i, weight @ X[i]) for i in range(len(X))) / len(X)
    (expected,) = torch.autograd.grad(reward, weight)
    found = moves(quadratic, 3, 300, estimator=estimator, scale="none")
    assert_mean(found, expected)
    assert (found.mean(0) - expected.flatten()).norm() < 0.3 * expected.norm()


@pytest.mark.parametrize("num_answers", [1, 4])
@pytest.mark.parametrize("estimator", ["forward", "central"])
def test_a_bandit_gives_the_gradient_of_its_smoothed_payoff(estimator, num_answers):
    reward = bandit(torch.Generator().manual_seed(1))
    expected = sum(slope for slope, _ in closed_form(layer().weight.detach(), 0.4)) / len(X)
    found = moves(reward, num_answers, 300, estimator=estimator, scale="none")
    assert_mean(found, expected)


@pytest.mark.parametrize("scale", ["group", "batch"])
@pytest.mark.parametrize("estimator", ["forward", "central"])
def test_a_standardised_bandit_gives_the_gradient_over_the_spread(estimator, scale):
    reward = bandit(torch.Generator().manual_seed(2))
    parts = closed_form(layer().weight.detach(), 0.4)
    spreads = [variance.sqrt() for _, variance in parts]
    if scale == "batch":
        spreads = [torch.stack([variance for _, variance in parts]).mean().sqrt()] * len(parts)
    expected = sum(p[0] / s for p, s in zip(parts, spreads, strict=True)) / len(X)
    # The spread of n answers is biased by a few times 1 / n.
    assert_mean(moves(reward, 100, 60, estimator=estimator, scale=scale), expected, bias=0.04)


@pytest.mark.parametrize("scale", ["group", "batch"])
@pytest.mark.parametrize("has_pairs", [False, True])
def test_standardised_rewards_do_not_depend_on_their_unit(scale, has_pairs):
    ahead, behind = torch.randn(2, 3, 5, generator=torch.Generator().manual_seed(0)).double()
    other = behind if has_pairs else None
    found = advantages(ahead, other, scale)
    scaled = advantages(7 + 100 * ahead, None if other is None else 7 + 100 * other, scale)
    assert torch.allclose(found, scaled)
    assert advantages(torch.full((2, 3), 0.1), None, scale).abs().max() == 0


def test_an_answer_without_reward_is_left_out_as_if_it_were_not_there():
    rewards = torch.tensor([[1.0, math.nan, 3.0, 5.0], [2.0, 2.0, math.nan, math.nan]]).double()
    for scale in ("none", "group"):
        found = advantages(rewards, None, scale)
        assert torch.equal(found.isnan(), rewards.isnan())
        kept = rewards[:1, [0, 2, 3]]
        assert torch.equal(found[0, [0, 2, 3]], advantages(kept, None, scale)[0])
        assert found[1, :2].abs().max() == 0
    only = advantages(torch.tensor([[1.0, math.nan]]), None, "group")
    assert only[0, 0] == 0


def test_without_any_reward_the_weights_stay_and_the_step_says_so():
    model = layer()
    before, optimizer = bits(model), optimizer_of(model)
    population = population_of(model, lambda i, y: y.sum() * math.nan, 2)
    with pytest.warns(UserWarning, match="no row has"):
        optimizer.step(zeroth_loss=lambda: population)
    assert_same_bits(bits(model), before)
    assert optimizer.last_step.non_finite
    population = population_of(model, lambda i, y: y.sum() * (math.nan if i else 1), 2)
    with pytest.warns(UserWarning, match="2 rows"):
        optimizer.step(zeroth_loss=lambda: population)
    assert optimizer.last_step.rows_left_out == 2
    assert not torch.equal(model.weight, before["weight"])


@pytest.mark.parametrize("estimator", ["forward", "central"])
def test_a_step_is_the_same_in_batches_and_is_replayed_from_its_scalars(estimator):
    def trained(batches):
        model = layer()
        original = copy.deepcopy(model)
        optimizer = optimizer_of(model, estimator=estimator)
        for _ in range(3):
            population = population_of(model, quadratic, 3, batches=batches)
            optimizer.step(zeroth_loss=lambda p=population: p)
        optimizer.trajectory.replay(dict(original.named_parameters()))
        assert_same_bits(bits(original), bits(model))
        assert len(optimizer.trajectory.updates[0][0].projected_grad) == 6
        return bits(model)

    assert_same_bits(trained(None), trained([[4, 1], [0], [5, 3, 2]]))


def test_micro_batches_have_directions_of_their_own():
    model = layer()
    optimizer = optimizer_of(model)
    for _ in range(2):
        population = population_of(model, quadratic, 2, weight=0.5)
        optimizer.measure(None, None, zeroth_loss=population)
    optimizer.step()
    scalars = optimizer.last_step.projected_grad
    assert len(scalars) == 8
    assert scalars[:4] != scalars[4:]


def test_the_options_must_give_each_row_a_direction():
    model = layer()
    optimizer = HybridOptimizer(
        param_groups(model, "zo-ft", base_lr=1.0), model, distribution="rank-one"
    )
    with pytest.raises(UserError, match="directions_per_step"):
        optimizer.step(zeroth_loss=lambda: population_of(model, quadratic, 2))


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "opt"])
def test_rows_of_a_cached_generation_keep_their_directions(architecture):
    """An answer equals the one that is generated alone, where every row has its direction."""
    model = build(architecture, "lora").eval()
    view = HybridOptimizer(
        param_groups(model, "hybrid", base_lr=1.0, adapter_lr=1.0),
        model,
        distribution="rank-one",
        directions_per_step="rows",
    ).perturbation
    prompt = torch.tensor([[3, 14, 15, 9, 2]])
    num, options = 6, {"max_new_tokens": 8, "min_new_tokens": 8, "do_sample": False}

    def generated(directions, rows):
        ids = prompt.expand(rows, -1)
        with warnings.catch_warnings(), view.at(0.1, step=0, directions=directions):
            warnings.simplefilter("ignore")
            return model.generate(
                input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=True, **options
            )

    order = torch.tensor([4, 0, 5, 1, 3, 2])
    together = generated(RowDirections(0, num, order), num)
    for row, direction in enumerate(order.tolist()):
        assert torch.equal(together[row], generated(RowDirections(direction), 1)[0])
    assert len({tuple(row.tolist()) for row in together}) > 1
