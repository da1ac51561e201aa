"""Scratch buffers for perturbed weights, which one layer after another reuses.

There is one buffer for each level of nesting, dtype and device. It has the size of the largest
layer that was computed in it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_iter, tree_map_only

from zofo.noise.combine import Distribution, prepare
from zofo.perturb.owners import Owner

# Elements between the starts of two weights are a multiple of this, so that vector loads and the
# CUDA kernels find aligned addresses in every dtype.
_ALIGNMENT = 64

_Place = tuple[int, torch.dtype, torch.device]
"""Level, dtype and device of a buffer."""


@dataclass(frozen=True)
class Swap:
    """Perturbed weights of an owner, laid out once. It is valid while the weights do not move."""

    addresses: list[int]  # of the owner's weights
    parameters: list[nn.Parameter]  # views of the scratch, one per slot
    compute: Callable[[float, int, int], None]  # fills them, given scale, step and direction

    def put_in(self, owner: Owner) -> None:
        """Put the perturbed weights into the owner's places; ties stay ties."""
        owner.replaced = [slot.present for slot in owner.slots]
        swapped = dict(zip(owner.slots, self.parameters, strict=True))
        for slot, parameter in swapped.items():
            slot.put(parameter)
        for other, slot in owner.ties:
            other.put(swapped[slot])


class Scratch:
    """The buffers of a perturbed view, and the swaps that lie in them."""

    def __init__(self, seed: int, distribution: Distribution) -> None:
        self._seed, self._distribution = seed, distribution
        self._buffers: dict[_Place, Tensor] = {}
        self._swaps: dict[int, dict[Owner, Swap]] = {}

    def forget_owners(self) -> None:
        """Forget all swaps and keep the buffers."""
        self._swaps.clear()

    @property
    def num_bytes(self) -> int:
        """Size of all buffers."""
        return sum(buffer.nbytes for buffer in self._buffers.values())

    def swap_of(self, owner: Owner, level: int) -> Swap:
        """The owner's swap in the buffers of a level. Its weights are not computed here."""
        swap = self._swaps.get(level, {}).get(owner)
        if swap is None or swap.addresses != [s.present.data_ptr() for s in owner.slots]:
            swap = self._lay_out(owner, level)
            self._swaps.setdefault(level, {})[owner] = swap
        return swap

    def detach(self, output: Any) -> Any:
        """Copy the tensors of a module's output that lie in a buffer, which others will reuse."""
        buffers = {t.untyped_storage().data_ptr() for t in self._buffers.values()}

        # Sparse tensors have no storage to compare.
        def is_scratch(t: Tensor) -> bool:
            return t.layout == torch.strided and t.untyped_storage().data_ptr() in buffers

        if isinstance(output, Tensor):
            return output.clone() if is_scratch(output) else output
        if any(isinstance(t, Tensor) and is_scratch(t) for t in tree_iter(output)):
            return tree_map_only(Tensor, lambda t: t.clone() if is_scratch(t) else t, output)
        return output

    def _lay_out(self, owner: Owner, level: int) -> Swap:
        weights = [slot.present for slot in owner.slots]
        views = self._views(weights, level)
        of_unit: dict[float, list[int]] = {}
        for i, slot in enumerate(owner.slots):
            of_unit.setdefault(slot.unit, []).append(i)
        prepared = [
            (
                unit,
                prepare(
                    [weights[i] for i in places],
                    [views[i] for i in places],
                    tensors=[owner.slots[i].tensor for i in places],
                    seed=self._seed,
                    distribution=self._distribution,
                ),
            )
            for unit, places in of_unit.items()
        ]

        def compute(scale: float, step: int, direction: int) -> None:
            for unit, run in prepared:
                run(scale * unit, step, direction)

        return Swap(
            [weight.data_ptr() for weight in weights],
            [nn.Parameter(view, requires_grad=False) for view in views],
            compute,
        )

    def _views(self, weights: list[nn.Parameter], level: int) -> list[Tensor]:
        """A part of the level's buffers for each weight, in its shape."""
        needed: dict[_Place, int] = {}
        places = []
        for weight in weights:
            place = (level, weight.dtype, weight.device)
            places.append((place, needed.get(place, 0)))
            # -(-a // b) rounds the quotient up.
            padded = -(-weight.numel() // _ALIGNMENT) * _ALIGNMENT
            needed[place] = needed.get(place, 0) + padded
        for place, size in needed.items():
            if place not in self._buffers or self._buffers[place].numel() < size:
                # Every reference to the smaller buffer goes first, so that both never coexist.
                self._buffers.pop(place, None)
                self._swaps.pop(level, None)
                self._buffers[place] = torch.empty(size, dtype=place[1], device=place[2])
        return [
            self._buffers[place][start : start + weight.numel()].view(weight.shape)
            for weight, (place, start) in zip(weights, places, strict=True)
        ]
