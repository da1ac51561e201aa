"""The state that all parts of `HybridMixin` share: options, optimizer and output folder.

A mixin stands before a Trainer class, so at run time it has no base class. The type checker sees
`transformers.Trainer` as its base, so that every use of the Trainer is checked.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from zofo.errors import UserError
from zofo.optim.optimizer import HybridOptimizer
from zofo.trainer.base_history import BaseHistory
from zofo.trainer.options import HybridOptions

if TYPE_CHECKING:
    from transformers import Trainer as _Trainer
else:
    _Trainer = object


class TrainerMixin(_Trainer):
    """Declares the attributes that `HybridMixin` sets and its parts read."""

    model: Any  # Trainer's type allows None, but every trainer has one here
    optimizer: Any  # a HybridOptimizer, which accelerate may wrap
    _given_options: HybridOptions | None
    _hybrid: HybridOptimizer | None  # the optimizer without accelerate's wrapper
    _original: Mapping[str, Tensor] | None = None  # the base before training, for an anchor
    _original_base: Callable[[], Mapping[str, Tensor]] | None  # as the caller gave it
    _history: BaseHistory | None  # None unless zeroth-order steps train the base

    @property
    def hybrid_options(self) -> Any:
        """The object that holds the hybrid options."""
        if self._given_options is not None:
            return self._given_options
        if hasattr(self.args, "base_lr"):
            return self.args
        raise UserError(
            f"{type(self.args).__name__} carries no hybrid options; "
            "pass hybrid=HybridOptions(...) to the trainer, or use HybridArguments"
        )

    @property
    def hybrid_optimizer(self) -> HybridOptimizer:
        """The optimizer of both blocks, which exists from the beginning of training."""
        assert self._hybrid is not None
        return self._hybrid

    @property
    def _output_folder(self) -> Path:
        return Path(str(self.args.output_dir))
