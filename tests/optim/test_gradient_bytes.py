"""The bytes of gradients are counted without a change of their values."""

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
from torch.nn.parallel import DistributedDataParallel

from tests.support.groups import in_group
from zofo.optim.gradient_bytes import GradientBytes


def averaged(is_counted):
    """The averaged gradients on this process, and the bytes that it sent for them."""
    torch.manual_seed(0)
    model = DistributedDataParallel(nn.Linear(7, 11))
    counter = GradientBytes()
    torch.manual_seed(dist.get_rank())
    for _ in range(2):
        if is_counted:
            counter.count(model)
        model(torch.randn(3, 7)).square().sum().backward()
    return [p.grad.tolist() for p in model.parameters()], counter.sent


def test_gradients_keep_their_bits_and_their_bytes_are_counted():
    for size in (2, 3):
        plain, counted = (in_group(size, averaged, is_counted) for is_counted in (False, True))
        assert [values for values, _ in counted] == [values for values, _ in plain]
        least = 2 * (size - 1) / size * 4 * (7 * 11 + 11)
        assert [sent for _, sent in counted] == [2 * least] * size


def with_own_hook():
    model = DistributedDataParallel(nn.Linear(7, 11))
    model.register_comm_hook(None, allreduce_hook)
    counter = GradientBytes()
    counter.count(model)
    model(torch.ones(3, 7)).sum().backward()
    return counter.sent


def test_a_hook_of_the_user_stays_and_nothing_is_claimed():
    assert in_group(2, with_own_hook) == [None, None]
