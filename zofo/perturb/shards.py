"""Weights that FSDP2 (`torch.distributed.fsdp.fully_shard`) shards over processes.

    at rest        a module holds a `DTensor`, of which this process has some rows: its shard
    in a forward   FSDP registers the whole weight in the module, gathered from all processes

The optimizer knows the weights at rest, whose names and shapes are those of the whole model. So
directions do not depend on sharding. A perturbed forward finds the whole weight in the module, and
an update writes the shard, as the slice of the whole tensor that begins at its offset.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from zofo.errors import UserError
from zofo.perturb.compiled import compiled_modules


def is_sharded(weight: Tensor) -> bool:
    """Whether the weight is distributed over processes. A model without such does not import it."""
    kind = getattr(sys.modules.get("torch.distributed.tensor"), "DTensor", None)
    return kind is not None and isinstance(weight, kind)


@torch.no_grad()
def local_part(weight: Tensor) -> tuple[Tensor, int]:
    """This process's slice of a weight, and the index of its first element within the whole.

    Args:
        weight: one that `check_sharding` accepts, or a plain tensor, which is its own slice.
    """
    if not is_sharded(weight):
        return weight, 0
    sharded: Any = weight
    local, first = sharded.to_local(), 0
    for dim, placement in enumerate(sharded.placements):
        if placement.is_shard():
            # As torch.chunk divides the rows: the last shards may be shorter, or empty.
            chunk = -(-len(weight) // sharded.device_mesh.size(dim))
            first = min(sharded.device_mesh.get_local_rank(dim) * chunk, len(weight))
    return local, first * math.prod(weight.shape[1:])


def shard_group(weight: Tensor) -> Any:
    """The process group over which the rows of a weight are divided; None if they are not."""
    for dim, placement in enumerate(getattr(weight, "placements", ())):
        if placement.is_shard():
            return weight.device_mesh.get_group(dim)  # type: ignore[attr-defined]
    return None


class Whole(Mapping[str, Tensor]):
    """Whole weights by name, each gathered when it is read: all processes read in one order."""

    def __init__(self, weights: Mapping[str, Tensor]) -> None:
        self._weights = weights

    @torch.no_grad()
    def __getitem__(self, name: str) -> Tensor:
        weight: Any = self._weights[name]
        return weight.full_tensor() if is_sharded(weight) else weight

    def __iter__(self) -> Iterator[str]:
        return iter(self._weights)

    def __len__(self) -> int:
        return len(self._weights)


@torch.no_grad()
def sharded_as(whole: Tensor, weight: Tensor) -> Tensor:
    """A whole tensor, which every process has, divided as `weight` of its shape is, if it is."""
    if not is_sharded(weight):
        return whole
    from torch.distributed.tensor import distribute_tensor

    sharded: Any = weight
    return distribute_tensor(whole, sharded.device_mesh, sharded.placements, src_data_rank=None)


@contextmanager
def gathered(model: nn.Module, weights: Iterable[Tensor]) -> Iterator[bool]:
    """Inside the context, the model holds some sharded weights as whole ones.

    All processes enter it, and no forward may run inside. The value tells whether this process
    writes the files: it is the only one of an unsharded model, or the first that holds a shard.
    """
    is_writer = is_first(model)
    wanted = {id(weight): weight for weight in weights if is_sharded(weight)}
    whole: dict[int, nn.Parameter] = {}
    places: list[tuple[nn.Module, str, Any]] = []
    for module in model.modules():
        for name, weight in module._parameters.items():
            if id(weight) in wanted:
                places.append((module, name, weight))
                if id(weight) not in whole:
                    values = Whole({name: wanted[id(weight)]})[name]
                    whole[id(weight)] = nn.Parameter(values, requires_grad=False)
    try:
        for module, name, weight in places:
            module._parameters[name] = whole[id(weight)]
        yield is_writer
    finally:
        for module, name, weight in places:
            module._parameters[name] = weight


def is_first(model: nn.Module) -> bool:
    """Whether the model is not sharded, or this is the first process that holds a shard."""
    sharded: Any = next(filter(is_sharded, model.parameters()), None)
    return sharded is None or not any(sharded.device_mesh.get_coordinate())


def kind_of(module: nn.Module) -> type:
    """The class of a module, without the subclass that `fully_shard` makes of it."""
    kind = type(module)
    # The order of classes is FSDPLinear, FSDPModule, Linear, ...
    return kind.__mro__[getattr(kind, "_orig_cls_mro_index", 2)] if is_unit(module) else kind


def is_unit(module: nn.Module) -> bool:
    """Whether `fully_shard` was applied to this module."""
    kind = getattr(sys.modules.get("torch.distributed.fsdp"), "FSDPModule", None)
    return kind is not None and isinstance(module, kind)


def reshard(model: nn.Module) -> None:
    """Free the whole weights that FSDP keeps after a forward, so that modules hold shards."""
    for module in model.modules():
        if is_unit(module):
            module.reshard()  # type: ignore[operator]


def begin_anew(model: nn.Module) -> None:
    """Return FSDP to the state between two iterations, also after a forward that failed."""
    reshard(model)
    for module in model.modules():
        # The outermost unit keeps the state of all. The first forward makes it.
        if is_unit(module) and module._get_fsdp_state()._is_root:  # type: ignore[operator]
            module.reset_iter_state()  # type: ignore[operator]


def check_sharding(model: nn.Module, weights: Iterable[Tensor]) -> None:
    """Refuse ways of sharding whose slices of a weight are not known.

    Args:
        model: the model.
        weights: its perturbed weights.

    Raises:
        UserError: for FSDP1, DeepSpeed's stage 3, placements other than rows over processes, and
            compiled modules.
    """
    remedy = (
        "; shard the model with torch.distributed.fsdp.fully_shard on a mesh of one dimension, or "
        "of two to replicate the shards"
    )
    weights = list(weights)
    if any(type(module).__name__ == "FullyShardedDataParallel" for module in model.modules()):
        raise UserError(
            f"the model is wrapped in FullyShardedDataParallel (FSDP1), which flattens the "
            f"weights that a zeroth-order step addresses one by one{remedy}"
        )
    if any(hasattr(weight, "ds_id") for weight in weights):
        raise UserError(
            f"DeepSpeed's stage 3 partitions the weights, whose rows a zeroth-order step cannot "
            f"tell{remedy}"
        )
    for weight in filter(is_sharded, weights):
        placements = weight.placements  # type: ignore[attr-defined]
        shards = [p for p in placements if not p.is_replicate()]
        if len(shards) > 1 or any(repr(p) != "Shard(dim=0)" for p in shards):
            raise UserError(
                f"a weight of shape {list(weight.shape)} has the placements {placements}, and zofo "
                f"takes rows that one dimension of the mesh divides, not tensor parallelism{remedy}"
            )
    compiled = compiled_modules(model.modules())
    if compiled and any(map(is_sharded, weights)):
        raise UserError(
            f"{type(compiled[0]).__name__} is compiled, and its graph would gather sharded weights "
            "without the perturbation; leave torch.compile out"
        )
    for module in filter(is_unit, model.modules()):
        if not hasattr(module, "reset_iter_state"):
            raise UserError(
                f"torch {torch.__version__} cannot end a forward of FSDP2 that failed "
                "(FSDPModule.reset_iter_state); install torch 2.13 or newer"
            )
