"""Tests of the loss difference on a part of the batch.

The difference is unbiased, its cost is counted, and a batch is split along its rows.
"""

from __future__ import annotations

import copy
from itertools import combinations

import pytest
import torch

from tests.support.models import batch_for, build
from tests.support.smooth import Net, base_of, optimizer_for, rows
from zofo.errors import UserError
from zofo.optim.batch_part import num_rows_of, split_rows
from zofo.optim.generators import GeneratorState
from zofo.optim.zeroth_loss import ZerothLoss


def scalar_of(x, chosen=None, *, knows=True, **options):
    """Return the report of one step from a fixed start, with the difference on the rows `chosen`.

    If `knows` is true, the step is given the unperturbed loss of these rows.
    """
    net = Net()
    with torch.random.fork_rng():
        torch.manual_seed(4)
        for p in net.parameters():
            p.data.copy_(torch.randn_like(p))
    part = None
    if chosen is not None:
        taken = x[list(chosen)]
        known = net(taken).detach() if knows else None

        def part():
            return ZerothLoss(lambda: net(taken), len(taken) / len(x), known)

    optimizer = optimizer_for(net, **options)
    optimizer.step(lambda: net(x), part)
    return optimizer.last_step


# Tests of the estimate.


@pytest.mark.parametrize("knows", [True, False])
@pytest.mark.parametrize(
    ("estimator", "eps"), [("forward", 1e-3), ("forward", 0.5), ("central", 1e-3)]
)
def test_the_mean_over_all_parts_is_the_whole(estimator, eps, knows):
    """The mean of the scalars over all parts of a size equals the scalar of the whole batch.

    This is exact for every eps, because the difference of a mean is the mean of the differences.
    """
    x, options = rows(6), {"estimator": estimator, "eps": eps, "knows": knows}
    whole = scalar_of(x, estimator=estimator, eps=eps)
    for size in (1, 2, 5):
        parts = [scalar_of(x, chosen, **options) for chosen in combinations(range(6), size)]
        scalars = [part.projected_grad[0] for part in parts]
        assert max(scalars) - min(scalars) > 1e-2
        mean = sum(scalars) / len(scalars)
        assert mean == pytest.approx(whole.projected_grad[0], rel=1e-8)
        assert {part.loss for part in parts} == {whole.loss}


@pytest.mark.parametrize("knows", [True, False])
@pytest.mark.parametrize("estimator", ["forward", "central"])
def test_a_part_that_is_the_whole_gives_the_same_bits(estimator, knows):
    x = rows(6)
    whole = scalar_of(x, estimator=estimator, num_directions=2)
    part = scalar_of(x, range(6), estimator=estimator, num_directions=2, knows=knows)
    assert part.projected_grad == whole.projected_grad


@pytest.mark.parametrize(
    ("estimator", "knows", "cost"),
    [
        ("forward", True, 0.75),
        ("forward", False, 1.0),
        ("central", True, 1.5),
        ("central", False, 1.5),
    ],
)
def test_cost(estimator, knows, cost):
    """The cost counts three directions on a quarter of the batch.

    An unknown unperturbed loss of that part costs one more evaluation of it.
    """
    seen = []
    hook = torch.nn.modules.module.register_module_forward_pre_hook(
        lambda module, args: seen.append(len(args[0])) if isinstance(module, Net) else None
    )
    try:
        step = scalar_of(
            rows(8), (0, 1), estimator=estimator, knows=knows, num_directions=3, self_check=False
        )
    finally:
        hook.remove()
    # The forward pass over the batch and the test's own evaluation do not count.
    outside = 8 + (2 if knows else 0)
    assert (sum(seen) - outside) / 8 == step.num_forwards == cost


def test_micro_batches_with_parts_add_up():
    x = rows(12)
    net = Net()
    model = copy.deepcopy(net)
    one, many = optimizer_for(net), optimizer_for(model)
    many.zero_grad()
    for micro in x.split(4):
        taken = micro[:2]
        part = ZerothLoss(lambda t=taken: model(t) / 3, 0.5)
        many.accumulate(lambda m=micro: model(m) / 3, lambda part=part: part)
    many.step()
    taken = torch.cat([micro[:2] for micro in x.split(4)])
    one.step(lambda: net(x), lambda: ZerothLoss(lambda: net(taken), 0.5))
    assert many.last_step.projected_grad == pytest.approx(one.last_step.projected_grad)
    assert many.last_step.num_forwards == 3 * one.last_step.num_forwards == 3
    torch.testing.assert_close(base_of(model), base_of(net), rtol=1e-9, atol=1e-12)


def test_with_dropout_both_sides_of_the_difference_have_the_same_masks():
    """The difference equals one that is computed by hand with the same masks on both sides.

    Other masks would change it by hundreds.
    """
    model = build("llama", "lora", lora_dropout=0.5).train()
    twin = copy.deepcopy(model)
    batch = batch_for("llama", rows=4)
    taken = {key: value[:2] for key, value in batch.items()}
    optimizer = optimizer_for(model, base_lr=0.0)
    torch.manual_seed(11)
    optimizer.step(
        lambda: model(**batch).loss, lambda: ZerothLoss(lambda: model(**taken).loss, 0.5)
    )
    by_hand = optimizer_for(twin, base_lr=0.0).perturbation
    with torch.no_grad():
        torch.manual_seed(11)
        plain = twin(**taken).loss.double()
        torch.manual_seed(11)
        with by_hand.at(1e-3, step=0):
            ahead = twin(**taken).loss.double()
    assert optimizer.last_step.projected_grad == (float((ahead - plain) / 1e-3),)
    assert abs(optimizer.last_step.projected_grad[0]) < 50


def test_generators_know_whether_something_was_drawn():
    state = GeneratorState.capture()
    assert state.is_current()
    torch.nn.functional.dropout(torch.ones(3), 0.5)
    assert not state.is_current()
    state.restore()
    assert state.is_current()
    import random

    import numpy as np

    for draw in (random.random, np.random.rand):
        state = GeneratorState.capture()
        draw()
        assert not state.is_current()
        state.restore()


@pytest.mark.parametrize(
    ("fraction", "num_rows", "expected"),
    [
        (0.5, 8, 4),
        (0.5, 7, 4),
        (1e-38, 8, 1),
        (0.25, 3, 1),
        (0.7, 10, 7),
        (0.01, 5, 1),
        (1.0, 5, 5),
        (0.3, 10, 3),
    ],
)
def test_rows_of_a_fraction(fraction, num_rows, expected):
    assert num_rows_of(fraction, num_rows) == expected


# Tests of splitting a batch.


def test_a_batch_is_cut_along_its_rows_and_keeps_its_padding():
    batch = {"input_ids": torch.arange(12).view(3, 4), "use_cache": False, "names": ["a", "b", "c"]}
    first, rest = split_rows({**batch, "labels": None}, 2)
    assert torch.equal(first["input_ids"], batch["input_ids"][:2])
    assert torch.equal(rest["input_ids"], batch["input_ids"][2:])
    assert (first["names"], rest["names"]) == (["a", "b"], ["c"])
    assert first["use_cache"] is False
    assert first["labels"] is None


@pytest.mark.parametrize(
    "value", [torch.zeros(6, 4), torch.zeros(()), {"a": torch.zeros(3)}, [1, 2], torch.zeros(1, 3)]
)
def test_what_has_no_entry_for_each_row_is_refused(value):
    with pytest.raises(UserError, match=r"'odd'.*one entry a row"):
        split_rows({"input_ids": torch.zeros(3, 4), "odd": value}, 2)
