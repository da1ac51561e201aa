"""The self-check of a perturbed forward.

It watches every tensor operation for reads of an unperturbed weight. So it finds a weight that some
module reads without calling the weight's own module, and the innermost running module that contains
both. The view can then swap the weight for the call of that module (`Perturbation.checked`).
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from zofo.errors import UserError
from zofo.perturb.owners import Owner
from zofo.perturb.shards import is_sharded, kind_of
from zofo.perturb.slots import Slot


class SelfCheckError(UserError, RuntimeError):
    """A weight is read outside its module's call, so the read misses the perturbation.

    Attributes:
        readers: class name -> paths of the modules below it whose weights it reads; empty if the
            reading module is not known.
    """

    readers: Mapping[str, tuple[str, ...]] = {}


class ReadWatch(TorchDispatchMode):
    """Notes when an operation reads the storage of an owner's weight.

    Args:
        owners: the owners of the perturbed weights.
        known: class name -> paths of modules whose weights are swapped for its calls.
    """

    def __init__(self, owners: Sequence[Owner], known: Mapping[str, tuple[str, ...]]) -> None:
        super().__init__()
        self._known = known
        self._error: SelfCheckError | None = None
        self._readers: dict[str, dict[str, None]] = {}
        # By address, because views and detached tensors share the storage of a weight.
        self._slots: dict[int, list[Slot]] = {}
        self._owners = owners
        self._is_paused = False
        self.find()

    def find(self) -> None:
        """Find the whole weights, of which FSDP gathers some while a module runs."""
        self._slots.clear()
        for owner in self._owners:
            held = dict(zip(owner.slots, owner.replaced, strict=False))
            for slot in (*owner.slots, *(other for other, _ in owner.ties)):
                weight: Any = slot.parameter
                if is_sharded(weight):
                    weight = held.get(slot, slot.module._parameters[slot.name])
                if weight.numel() and not is_sharded(weight):
                    address = weight.untyped_storage().data_ptr()
                    self._slots.setdefault(address, []).append(slot)

    def check(self) -> None:
        """Raise the error of the first unperturbed read, with all the readers that were found."""
        if self._error is not None:
            self._error.readers = {name: tuple(paths) for name, paths in self._readers.items()}
            raise self._error

    def pause_during(self, module: nn.Module) -> list[Any]:
        """Hook a module so that its own calls may read its weights; returns the handles."""

        def pause(*_: Any) -> None:
            self._is_paused = True

        def go_on(*_: Any) -> None:
            self._is_paused = False

        return [
            module.register_forward_pre_hook(pause),
            module.register_forward_hook(go_on, always_call=True),
        ]

    def find_in_calls_of(self, modules: Iterable[nn.Module]) -> list[Any]:
        """Hook modules for whose calls FSDP gathers weights; returns the handles."""
        handles: list[Any] = []
        for module in modules:
            handles.append(module.register_forward_pre_hook(lambda *_: self.find()))
            handles.append(module.register_forward_hook(lambda *_: self.find(), always_call=True))
        return handles

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Allow reads inside the context."""
        before, self._is_paused = self._is_paused, True
        try:
            yield
        finally:
            self._is_paused = before

    def __torch_dispatch__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        if not self._is_paused:
            for value in tree_iter((args, kwargs)):
                if (
                    isinstance(value, Tensor)
                    and value.layout == torch.strided
                    and not is_sharded(value)
                ):
                    slots = self._slots.get(value.untyped_storage().data_ptr())
                    if slots is not None:
                        self._note(slots, func)
        return func(*args, **(kwargs or {}))

    def _note(self, slots: Sequence[Slot], func: Any) -> None:
        """Note a read and who reads; raise at once if the reader is unknown or was served."""
        slot, name, path = _reader_of(slots)
        error = SelfCheckError(
            f"the weight {slot.path} of {type(slot.module).__name__} is read by {func} outside its "
            "module's call, so its zeroth-order estimate would be wrong. Freeze it (a base_lr map "
            "of patterns that leaves it out), choose another kind of adapter if an adapter reads "
            "it, or add the class of the module that reads it to zofo.perturb.view.ATOMIC"
        )
        if not path or path in self._known.get(name, ()):
            raise error
        self._error = self._error or error
        self._readers.setdefault(name, {})[path] = None


def _reader_of(slots: Sequence[Slot]) -> tuple[Slot, str, str]:
    """The innermost running module around one of the slots: slot, its class, path of the slot."""
    for module in _running():
        for slot in slots:
            if module is not slot.module:
                path = next((n for n, m in module.named_modules() if m is slot.module), None)
                if path is not None:
                    return slot, kind_of(module).__name__, path
    return slots[0], "", ""


def _running() -> Iterator[nn.Module]:
    """The modules whose calls are running, the innermost first."""
    frame = sys._getframe()
    while frame is not None:
        if frame.f_code is nn.Module._call_impl.__code__:
            yield frame.f_locals["self"]
        frame = frame.f_back  # type: ignore[assignment]
