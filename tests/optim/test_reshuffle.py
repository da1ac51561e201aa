"""Tests of the sample order.

Epochs are complete, training can resume anywhere, and no global generator is used.
"""

from __future__ import annotations

import json
import random

import numpy as np
import pytest
import torch
from scipy import stats
from torch.utils.data import DataLoader

from zofo.errors import UserError
from zofo.optim.reshuffle import SAMPLINGS, ReshufflingSampler, epoch_order

NUM_SAMPLES = 23


def epochs(sampler, num):
    return [list(sampler) for _ in range(num)]


@pytest.mark.parametrize("num_samples", [1, 2, NUM_SAMPLES])
@pytest.mark.parametrize("sampling", ["reshuffle", "shuffle-once"])
def test_every_sample_exactly_once_an_epoch(sampling, num_samples):
    sampler = ReshufflingSampler(num_samples, seed=3, sampling=sampling)
    for order in epochs(sampler, 4):
        assert sorted(order) == list(range(num_samples))


def test_reshuffling_gives_each_epoch_and_seed_its_own_order():
    orders = epochs(ReshufflingSampler(NUM_SAMPLES, seed=3), 4)
    orders += epochs(ReshufflingSampler(NUM_SAMPLES, seed=4), 4)
    assert len({tuple(order) for order in orders}) == 8


def test_shuffling_once_repeats_one_shuffled_order():
    orders = epochs(ReshufflingSampler(NUM_SAMPLES, seed=3, sampling="shuffle-once"), 3)
    assert orders[0] == orders[1] == orders[2]
    assert orders[0] != list(range(NUM_SAMPLES))


def test_every_permutation_is_equally_likely():
    counts: dict[tuple[int, ...], int] = {}
    for epoch in range(6000):
        order = tuple(epoch_order(3, seed=0, epoch=epoch, sampling="reshuffle").tolist())
        counts[order] = counts.get(order, 0) + 1
    assert len(counts) == 6
    assert stats.chisquare(list(counts.values())).pvalue > 1e-3


def test_with_replacement_draws_independently_and_uniformly():
    num, num_epochs = 10, 2000
    orders = np.array(
        epochs(ReshufflingSampler(num, seed=0, sampling="with-replacement"), num_epochs)
    )
    assert stats.chisquare(np.bincount(orders.ravel(), minlength=num)).pvalue > 1e-3
    # Consecutive draws are independent, within an epoch and across epochs.
    draws = orders.ravel()
    pairs = np.histogram2d(draws[:-1], draws[1:], bins=num)[0]
    assert stats.chi2_contingency(pairs).pvalue > 1e-3
    # Drawing with replacement misses a share (1 - 1/n)^n of the samples. A permutation misses none.
    missed = np.array([num - len(set(order)) for order in orders]) / num
    assert missed.mean() == pytest.approx(0.9**10, abs=0.02)


def take(sampler, num):
    """Return the next `num` samples, over as many epochs as needed.

    The last iteration is abandoned.
    """
    taken = []
    while len(taken) < num:
        for index in sampler:
            taken.append(index)
            if len(taken) == num:
                break
    return taken


@pytest.mark.parametrize("sampling", SAMPLINGS)
@pytest.mark.parametrize("consumed", range(13))
def test_a_state_saved_anywhere_continues_exactly(sampling, consumed):
    def fresh():
        return ReshufflingSampler(5, seed=8, sampling=sampling)

    first, second, third, fourth = epochs(fresh(), 4)
    sampler = fresh()
    found = take(sampler, consumed)
    resumed = fresh()
    resumed.load_state_dict(json.loads(json.dumps(sampler.state_dict())))
    # The first iteration gives the rest of the epoch, or the whole next epoch. It is never empty.
    found += list(resumed)
    assert found == [first, first + second, first + second + third][consumed // 5]
    assert list(resumed) == [second, third, fourth][consumed // 5]


def test_a_batch_loader_resumes_mid_epoch():
    data = torch.arange(12)

    def loader(sampler):
        return DataLoader(data, batch_size=4, sampler=sampler, num_workers=0)

    uninterrupted = ReshufflingSampler(12, seed=8)
    whole = [batch.tolist() for _ in range(3) for batch in loader(uninterrupted)]
    for consumed in range(1, 4):
        sampler = ReshufflingSampler(12, seed=8)
        found = []
        for batch in loader(sampler):
            found.append(batch.tolist())
            if len(found) == consumed:
                break
        resumed = ReshufflingSampler(12, seed=8)
        resumed.load_state_dict(sampler.state_dict())
        while len(found) < len(whole):
            found += [batch.tolist() for batch in loader(resumed)]
        assert found == whole


# Python 3.12 warns when DataLoader forks after another test has started threads.
@pytest.mark.filterwarnings("ignore:.*use of fork:DeprecationWarning")
@pytest.mark.parametrize("num_workers", [1, 2])
def test_the_order_does_not_depend_on_the_number_of_workers(num_workers):
    data = torch.arange(NUM_SAMPLES)

    def order(workers):
        loader = DataLoader(
            data,
            batch_size=4,
            sampler=ReshufflingSampler(NUM_SAMPLES, seed=5),
            num_workers=workers,
        )
        return [batch.tolist() for _ in range(2) for batch in loader]

    assert order(num_workers) == order(0)


@pytest.mark.parametrize("sampling", SAMPLINGS)
def test_no_global_generator_is_read_or_drawn_from(sampling):
    def states():
        return torch.get_rng_state().tolist(), random.getstate(), str(np.random.get_state())

    before = states()
    first = epochs(ReshufflingSampler(NUM_SAMPLES, seed=5, sampling=sampling), 2)
    assert states() == before
    torch.manual_seed(1), random.seed(1), np.random.seed(1)
    assert epochs(ReshufflingSampler(NUM_SAMPLES, seed=5, sampling=sampling), 2) == first


def test_set_epoch_jumps_to_an_epoch_and_does_not_restart_the_present_one():
    expected = epochs(ReshufflingSampler(NUM_SAMPLES, seed=5), 4)
    sampler = ReshufflingSampler(NUM_SAMPLES, seed=5)
    sampler.set_epoch(3)
    assert list(sampler) == expected[3]
    sampler.set_epoch(1)
    iterator = iter(sampler)
    begun = [next(iterator) for _ in range(4)]
    sampler.set_epoch(1)
    assert begun + list(sampler) == expected[1]


def test_length():
    assert len(ReshufflingSampler(NUM_SAMPLES)) == NUM_SAMPLES


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_samples": 3, "sampling": "sorted"}, "sampling is 'sorted'; choose one of reshuffle"),
        ({"num_samples": 0}, "training set has 0 samples"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(UserError, match=message):
        ReshufflingSampler(**options)


@pytest.mark.parametrize("other", [{"seed": 2}, {"sampling": "shuffle-once"}, {"num_samples": 9}])
def test_a_state_of_another_order_is_refused(other):
    options = {"num_samples": 8, "seed": 1, "sampling": "reshuffle"}
    state = ReshufflingSampler(**options).state_dict()
    with pytest.raises(UserError, match=next(iter(other))):
        ReshufflingSampler(**{**options, **other}).load_state_dict(state)
