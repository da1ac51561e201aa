"""Buffers that a forward pass changes, such as the running statistics of batch normalisation.

A step evaluates the loss several times, and plain training does it once. Every evaluation after the
first therefore starts with the buffers that the first one started with, and the buffers then get
the values back that the first one left. So two losses of a step differ only by the perturbation,
and a step changes the buffers as a step of plain training does.

The first step finds out which buffers change. Most models have none, and nothing is copied then.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Final

import torch
from torch import Tensor, nn

from zofo.optim.blocks import canonical_name, wrapper_prefix
from zofo.perturb.compiled import WRAPPED_NAME

_MAX_INTEGERS: Final = 1 << 16
"""Larger buffers of integers are masks and packed weights, which no forward pass changes."""


@dataclass(frozen=True)
class _Place:
    """The entry `name` of a module's table of buffers, and its value at one time."""

    module: nn.Module
    name: str
    buffer: Tensor
    value: Tensor

    @classmethod
    def of(cls, module: nn.Module, name: str) -> _Place:
        buffer: Any = module._buffers[name]
        return cls(module, name, buffer, buffer.detach().clone())

    def has_changed(self) -> bool:
        present = self.module._buffers.get(self.name)
        return present is not self.buffer or not _same(present, self.value)

    @torch.no_grad()
    def restore(self) -> None:
        # A module may put a new tensor into its place instead of changing the old one.
        self.module._buffers[self.name] = self.buffer
        self.buffer.copy_(self.value)


class MovingBuffers:
    """The buffers of a model that its forward pass changes.

    Args:
        model: the model, whose buffers have their values before training.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._original = {name: place.value for name, place in _places(model).items()}
        self._moving: list[tuple[nn.Module, str]] | None = None  # None before the first step
        self._before: list[_Place] | None = None  # before the first evaluation of a micro-batch

    def note(self) -> None:
        """Note the values that all evaluations of the coming micro-batch start with."""
        if self._moving is None:
            self._before = list(_places(self._model).values())
        else:
            self._before = [_Place.of(*place) for place in self._moving]

    def forget(self) -> None:
        """Forget the noted values, which belong to a micro-batch that is done."""
        self._before = None

    def unchanged_by(self, closure: Callable[[], Any]) -> Callable[[], Any]:
        """The closure, run with the noted values; it leaves the present ones as they are."""
        if self._before is None:
            self.note()
        return closure if self._moving == [] else lambda: self._run(closure)

    def _run(self, closure: Callable[[], Any]) -> Any:
        noted = self._before or []
        present = [_Place.of(place.module, place.name) for place in noted]
        moved = {id(place) for place in noted if place.has_changed()}
        for place in noted:
            place.restore()
        try:
            result = closure()
            if self._moving is None:
                moved |= {id(place) for place in noted if place.has_changed()}
                self._moving = [(p.module, p.name) for p in noted if id(p) in moved]
            return result
        finally:
            for place in present:
                place.restore()

    def moved(self) -> dict[str, Tensor]:
        """Name without adapter -> value, of the persistent buffers that training has changed."""
        return {
            name: place.value.cpu().contiguous()
            for name, place in _places(self._model).items()
            if place.name not in place.module._non_persistent_buffers_set
            and not _same(self._original.get(name), place.value)
        }

    def restore_original(self) -> None:
        """Give every buffer its value before training."""
        set_buffers(self._model, self._original)


@torch.no_grad()
def set_buffers(model: nn.Module, values: Mapping[str, Tensor]) -> None:
    """Set buffers to saved values.

    Args:
        model: the model.
        values: name without adapter -> value.

    Raises:
        KeyError, RuntimeError: if the model has no such buffer, or one of another shape.
    """
    places = _places(model) if values else {}
    for name, value in values.items():
        places[name].buffer.copy_(value)


def _places(model: nn.Module) -> dict[str, _Place]:
    """Name without adapter -> each buffer that a forward pass may change."""
    prefix, found = wrapper_prefix(model), {}
    for path, module in model.named_modules():
        for name, buffer in module._buffers.items():
            if buffer is None or buffer.layout != torch.strided or buffer.is_meta:
                continue
            if buffer.is_floating_point() or buffer.numel() <= _MAX_INTEGERS:
                full = f"{path}.{name}".removeprefix(".").replace(WRAPPED_NAME, "")
                found[canonical_name(full, prefix)] = _Place.of(module, name)
    return found


def _same(a: Tensor | None, b: Tensor) -> bool:
    return a is not None and a.shape == b.shape and torch.equal(a.to(b.device), b)
