"""The losses of a trainer's micro-batch: the first-order block's, and the zeroth-order block's.

The two are one unless `compute_zeroth_loss` is overridden; `base_batch_fraction` takes the second
on the first rows alone.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from zofo.errors import UserError
from zofo.optim.batch_part import batch_rows, num_rows_of, split_rows
from zofo.optim.estimator import unperturbed
from zofo.optim.generators import GeneratorState
from zofo.optim.zeroth_loss import ZerothLoss
from zofo.trainer.trainer_mixin import TrainerMixin


class BatchLossMixin(TrainerMixin):
    """What `HybridMixin` evaluates."""

    def compute_zeroth_loss(
        self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Any = None
    ) -> Tensor | float:
        """What the zeroth-order block lowers; override it for a loss that has no gradient.

        It is called without gradients, at the weights as they are and at perturbed ones, in
        training mode with the same dropout masks, or in the mode that it sets for itself. The
        first-order block goes on following `compute_loss`.

        Args:
            model: the model.
            inputs: the micro-batch, on the device; with `base_batch_fraction` its first rows.
            num_items_in_batch: as for `compute_loss`.

        Returns:
            A scalar, lower is better, that depends on model and inputs alone: a mean over rows,
            such as 1 − accuracy. Micro-batches of one step are averaged.
        """
        loss: Any = self.compute_loss(model, inputs, num_items_in_batch=num_items_in_batch)
        return loss

    @property
    def has_zeroth_loss(self) -> bool:
        """Whether the zeroth-order block follows another loss than the first-order one."""
        return type(self).compute_zeroth_loss is not BatchLossMixin.compute_zeroth_loss

    def whole_batch(
        self, model: nn.Module, inputs: Mapping[str, Any], num_items_in_batch: Any
    ) -> ZerothLoss:
        """The zeroth-order block's own loss on all of a micro-batch."""
        return ZerothLoss(lambda: self._zeroth_loss_of(model, inputs, num_items_in_batch))

    def batch_part(
        self, model: nn.Module, inputs: Mapping[str, Any], num_items_in_batch: Any, num_first: int
    ) -> tuple[ZerothLoss, ZerothLoss | None]:
        """The first rows of a micro-batch and the others, after the pass over all of them.

        Override it for batches that cannot be cut along the first dimension of their tensors, or
        to hand over the part's unperturbed loss.

        Args:
            model: the model.
            inputs: the micro-batch, as for `training_step`.
            num_items_in_batch: likewise.
            num_first: rows of the part; fewer than the micro-batch has.

        Returns:
            The part, and the rest of the micro-batch for a check at the first step; None: no check.

        Raises:
            UserError: if the batch cannot be cut.
        """
        num_rows = batch_rows(inputs)

        def taken(rows: Mapping[str, Any], num: int) -> ZerothLoss:
            share = num / num_rows
            # Divided by its share of the batch's tokens, a sum estimates the batch's.
            items = None if num_items_in_batch is None else num_items_in_batch * share
            return ZerothLoss(lambda: self._zeroth_loss_of(model, rows, items), share)

        first, rest = split_rows(inputs, num_first)
        return taken(first, num_first), taken(rest, num_rows - num_first)

    def num_batch_rows(self, inputs: Mapping[str, Any]) -> int:
        """Rows of a micro-batch that `batch_part` can choose from."""
        return batch_rows(inputs)

    def _differenced(
        self,
        model: nn.Module,
        inputs: Mapping[str, Any],
        num_items_in_batch: Any,
        generators: GeneratorState,
    ) -> tuple[ZerothLoss | None, ZerothLoss | None]:
        """What the differences are taken of, None for the micro-batch's loss; and its rest."""
        fraction = self.hybrid_options.base_batch_fraction
        num_rows = self.num_batch_rows(inputs) if fraction < 1 else 0
        num_first = num_rows_of(fraction, num_rows)
        if num_first == num_rows:
            if not self.has_zeroth_loss:
                return None, None
            return self.whole_batch(model, inputs, num_items_in_batch), None
        part, rest = self.batch_part(model, inputs, num_items_in_batch, num_first)
        return (part, rest) if self._is_exact(generators) else (replace(part, loss=None), None)

    def _check_losses(
        self,
        loss: Tensor,
        model: nn.Module,
        inputs: Mapping[str, Any],
        num_items_in_batch: Any,
        generators: GeneratorState,
        parts: tuple[ZerothLoss, ZerothLoss] | None,
    ) -> None:
        """What is differenced must be the same twice, and a part must stand for its batch."""
        graph = self.hybrid_optimizer.evaluates_with_graph

        def evaluate(closure: Callable[[], Tensor | float]) -> Tensor:
            return unperturbed(closure, generators, with_graph=graph)

        own = ZerothLoss(lambda: self._loss_of(model, inputs, num_items_in_batch), loss=loss)
        if self.has_zeroth_loss:
            own = self.whole_batch(model, inputs, num_items_in_batch)
        known = evaluate(own.closure) if own.loss is None else own.loss
        check_same(known, evaluate(own.closure), type(self))
        if parts is not None:
            first, rest = (evaluate(part.closure) for part in parts)
            check_part(known, first, rest, type(self))

    def _is_exact(self, generators: GeneratorState) -> bool:
        """Whether a row's loss in the pass just made is what it would be in a smaller batch."""
        return (
            self.args.device.type in ("cpu", "cuda")  # whose generators are known
            and not (self.args.bf16 or self.args.fp16)
            and all(p.dtype in (torch.float32, torch.float64) for p in self.model.parameters())
            and generators.is_current()
            and not self.hybrid_optimizer.evaluates_with_graph
        )

    def _loss_of(
        self, model: nn.Module, inputs: Mapping[str, Any], num_items_in_batch: Any
    ) -> Tensor:
        """The loss of a micro-batch, scaled as Trainer scales it."""
        batch = self._prepare_inputs(dict(inputs))
        with self.compute_loss_context_manager():
            loss: Any = self.compute_loss(model, batch, num_items_in_batch=num_items_in_batch)
        return loss / self._loss_divisor(num_items_in_batch)

    def _zeroth_loss_of(
        self, model: nn.Module, inputs: Mapping[str, Any], num_items_in_batch: Any
    ) -> Tensor | float:
        if not self.has_zeroth_loss:
            return self._loss_of(model, inputs, num_items_in_batch)
        batch = self._prepare_inputs(dict(inputs))
        with self.compute_loss_context_manager():
            loss = self.compute_zeroth_loss(model, batch, num_items_in_batch)
        return loss / self.current_gradient_accumulation_steps

    def _loss_divisor(self, num_items_in_batch: Any) -> int:
        scaled = _is_scaled(self, num_items_in_batch)
        return 1 if scaled else self.current_gradient_accumulation_steps


@contextmanager
def metrics_set_aside(trainer: Any) -> Iterator[None]:
    """What trl's trainers collect inside compute_loss is collected once a batch, unperturbed."""
    names = ("_metrics", "_stored_metrics", "_total_train_tokens")
    kept = {name: vars(trainer)[name] for name in names if name in vars(trainer)}
    vars(trainer).update(copy.deepcopy(kept))
    try:
        yield
    finally:
        vars(trainer).update(kept)


def _is_scaled(trainer: Any, num_items_in_batch: Any) -> bool:
    """Whether compute_loss has divided by the accumulation steps, by Trainer's own rule."""
    scaled = getattr(trainer, "loss_is_scaled_for_ga", None)
    if scaled is not None:
        return scaled
    counted = trainer.model_accepts_loss_kwargs and num_items_in_batch is not None
    return counted or trainer.compute_loss_func is not None


def check_part(loss: Tensor, first: Tensor, rest: Tensor, trainer: type) -> None:
    """A mean over the batch lies between the means over its two parts."""
    low, high = sorted((float(first), float(rest)))
    slack = 1e-3 * max(abs(low), abs(high)) + 1e-6
    if not low - slack <= float(loss) <= high + slack:
        raise UserError(
            f"the loss of {trainer.__name__} is {loss:.6g} on a batch, {first:.6g} on its first "
            f"rows and {rest:.6g} on the others, so it is no mean over rows; leave "
            "base_batch_fraction at 1"
        )


def check_same(loss: Tensor, again: Tensor, trainer: type) -> None:
    """The loss difference means nothing unless a second evaluation gives the same loss."""
    if not torch.allclose(loss.double(), again.double(), rtol=1e-3, atol=1e-6, equal_nan=True):
        raise UserError(
            f"the loss of {trainer.__name__} is {loss:.6g}, and {again:.6g} when computed again on "
            "the same batch; a loss difference needs a compute_loss or compute_zeroth_loss without "
            "side effects or randomness of its own"
        )
