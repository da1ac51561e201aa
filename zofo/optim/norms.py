"""Norms of tensors, of which some may be shards: then those of the whole tensors."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor, nn

from zofo.perturb.shards import local_part, shard_group


@torch.no_grad()
def norm_of(tensors: Sequence[Tensor]) -> Tensor:
    """The norm of all elements of all tensors, float64, []; at least one tensor.

    All processes that share the tensors call it.
    """
    norms = torch._foreach_norm([local_part(tensor)[0] for tensor in tensors])
    squares = torch.stack(norms).double().square()
    groups = [shard_group(tensor) for tensor in tensors]
    for group in dict.fromkeys(group for group in groups if group is not None):
        mine = torch.tensor([other is group for other in groups], device=squares.device)
        sums = torch.where(mine, squares, 0.0)
        dist.all_reduce(sums, group=group)
        squares = torch.where(mine, sums, squares)
    return squares.sum().sqrt()


@torch.no_grad()
def clip_gradients(parameters: Sequence[Tensor], max_norm: float) -> Tensor:
    """Scale the gradients in place to a norm of at most `max_norm`; returns their norm before."""
    found = [p.grad for p in parameters if p.grad is not None]
    if all(shard_group(gradient) is None for gradient in found):
        return nn.utils.clip_grad_norm_(parameters, max_norm)
    norm = norm_of(found)
    factor = (max_norm / (norm + 1e-6)).clamp(max=1.0)
    for gradient in found:
        part, _ = local_part(gradient)
        part.mul_(factor.to(part))
    return norm
