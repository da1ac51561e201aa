"""The self-check of a perturbed forward.

It watches every tensor operation for reads of an unperturbed weight. So it finds and names a weight
that some module reads without calling the weight's own module.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from zofo.errors import UserError
from zofo.perturb.owners import Owner


class SelfCheckError(UserError, RuntimeError):
    """A weight is read outside its module's call, so the read misses the perturbation."""


class ReadWatch(TorchDispatchMode):
    """Raises SelfCheckError when an operation reads the storage of an owner's weight."""

    def __init__(self, owners: Sequence[Owner]) -> None:
        super().__init__()
        # By address, because views and detached tensors share the storage of a weight.
        self._slots = {
            slot.parameter.untyped_storage().data_ptr(): slot
            for owner in owners
            for slot in owner.slots
            if slot.parameter.numel()
        }
        self._is_paused = False

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

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Allow reads inside the context."""
        self._is_paused = True
        try:
            yield
        finally:
            self._is_paused = False

    def __torch_dispatch__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        if not self._is_paused:
            for value in tree_iter((args, kwargs)):
                if isinstance(value, Tensor) and value.layout == torch.strided:
                    slot = self._slots.get(value.untyped_storage().data_ptr())
                    if slot is not None:
                        raise SelfCheckError(
                            f"the weight {slot.path} of {type(slot.module).__name__} is read by "
                            f"{func} outside its module's call, so its zeroth-order estimate would "
                            "be wrong. Freeze it (a base_lr map of patterns that leaves it out), "
                            "choose another kind of adapter if an adapter reads it, or add the "
                            "class of the module that reads it to zofo.perturb.view.ATOMIC"
                        )
        return func(*args, **(kwargs or {}))
