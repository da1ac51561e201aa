"""Counts the bytes of the gradients that `DistributedDataParallel` averages.

    bytes that a process sends = 2 (n − 1) / n · bytes of the gradients,  n processes

This is the least that an all-reduce can send, and what a ring sends. gloo and NCCL use a ring or
send more.

References:
    Patarasuk and Yuan, "Bandwidth Optimal All-reduce Algorithms for Clusters of Workstations",
    2009, Section 3.
"""

from typing import Any  # Torch reads the hook's annotations, so they are not postponed.

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel


def all_reduce_bytes(num_bytes: float, num_processes: int) -> float:
    """The bytes that each process sends to sum `num_bytes` over all processes."""
    return 2 * num_bytes * (num_processes - 1) / num_processes


class GradientBytes:
    """The bytes of gradients that this process has sent.

    Attributes:
        sent: the bytes; None: the model has a communication hook of its own, which may send others.
    """

    def __init__(self) -> None:
        self.sent: float | None = 0.0
        self._model: DistributedDataParallel | None = None

    def count(self, model: DistributedDataParallel) -> None:
        """Count the gradients of a model from now on; their values stay the same."""
        if model is self._model:
            return
        self._model = model
        if vars(model).get("_comm_hooks"):  # Torch accepts one hook.
            self.sent = None
        else:
            model.register_comm_hook(self, _average)


def _average(state: Any, bucket: dist.GradBucket) -> torch.futures.Future[torch.Tensor]:
    """Average a bucket of gradients to the bits that DistributedDataParallel gives without hook."""
    gradients, model = bucket.buffer(), state._model
    group = model.process_group
    size = dist.get_world_size(group)
    if state.sent is not None:
        state.sent += all_reduce_bytes(gradients.nbytes, size)
    # Torch multiplies by the reciprocal, whose last bit may differ from that of a division.
    work: Any = dist.all_reduce(gradients.mul_(1 / size), group=group, async_op=True)

    def first(done: torch.futures.Future[list[Tensor]]) -> Tensor:
        return done.value()[0]

    return work.get_future().then(first)
