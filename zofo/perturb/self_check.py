"""The self-check of a perturbed forward.

Every tensor operation is watched for reads of a weight that should be seen perturbed: a module that
reads a child's weight instead of calling the child is found and named.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from zofo.perturb.owners import Owner


class SelfCheckError(RuntimeError):
    """A weight is read around its module, so the model cannot be seen perturbed."""


class ReadWatch(TorchDispatchMode):
    """Raises when an operation reads the storage of a weight that should be seen perturbed."""

    def __init__(self, owners: Sequence[Owner]) -> None:
        super().__init__()
        self._paths = {
            slot.parameter.untyped_storage().data_ptr(): slot
            for owner in owners
            for slot in owner.slots
            if slot.parameter.numel()
        }
        self._is_paused = False

    def pause_during(self, module: nn.Module) -> list[Any]:
        """Hooks that let a module read what it owns."""

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
        """Within the context reads are allowed."""
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
                    slot = self._paths.get(value.untyped_storage().data_ptr())
                    if slot is not None:
                        raise SelfCheckError(
                            f"the weight {slot.path} of {type(slot.module).__name__} is read by "
                            f"{func} outside its module's call, so its zeroth-order estimate would "
                            "be wrong. Freeze it (a base_lr map of patterns that leaves it out), "
                            "or add the class of the module that reads it to "
                            "zofo.perturb.view.ATOMIC"
                        )
        return func(*args, **(kwargs or {}))
