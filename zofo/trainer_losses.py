"""The losses of a trainer's micro-batch: of all of it, and of the part that stands for it."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from zofo.estimator import GeneratorState
from zofo.part import Part, batch_rows, num_rows_of, split_rows


class BatchLossMixin:
    """What `HybridMixin` evaluates."""

    def batch_part(
        self, model: nn.Module, inputs: Mapping[str, Any], num_items_in_batch: Any, num_first: int
    ) -> tuple[Part, Part | None]:
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

        def taken(rows: Mapping[str, Any], num: int) -> Part:
            share = num / num_rows
            # Divided by its share of the batch's tokens, a sum estimates the batch's.
            items = None if num_items_in_batch is None else num_items_in_batch * share
            return Part(lambda: self._loss_of(model, rows, items), share)

        first, rest = split_rows(inputs, num_first)
        return taken(first, num_first), taken(rest, num_rows - num_first)

    def num_batch_rows(self, inputs: Mapping[str, Any]) -> int:
        """Rows of a micro-batch that `batch_part` can choose from."""
        return batch_rows(inputs)

    def _part_and_rest(
        self, model: nn.Module, inputs: Mapping[str, Any], num_items_in_batch: Any
    ) -> tuple[Part | None, Part | None]:
        trainer: Any = self
        fraction = getattr(trainer.hybrid_options, "base_batch_fraction", 1.0)
        if fraction == 1:
            return None, None
        num_rows = self.num_batch_rows(inputs)
        num_first = num_rows_of(fraction, num_rows)
        if num_first == num_rows:
            return None, None
        return self.batch_part(model, inputs, num_items_in_batch, num_first)

    def _is_exact(self, generators: GeneratorState) -> bool:
        """Whether a row's loss in the pass just made is what it would be in a smaller batch."""
        trainer: Any = self
        return (
            trainer.args.device.type in ("cpu", "cuda")  # whose generators are known
            and not (trainer.args.bf16 or trainer.args.fp16)
            and all(p.dtype in (torch.float32, torch.float64) for p in trainer.model.parameters())
            and generators.is_current()
            and not trainer.hybrid_optimizer.evaluates_with_graph
        )

    def _loss_of(
        self, model: nn.Module, inputs: Mapping[str, Any], num_items_in_batch: Any
    ) -> Tensor:
        """The loss of a micro-batch, scaled as Trainer scales it."""
        trainer: Any = self
        batch = trainer._prepare_inputs(dict(inputs))
        with trainer.compute_loss_context_manager():
            loss = trainer.compute_loss(model, batch, num_items_in_batch=num_items_in_batch)
        return loss / self._loss_divisor(num_items_in_batch)

    def _loss_divisor(self, num_items_in_batch: Any) -> int:
        scaled = _is_scaled(self, num_items_in_batch)
        return 1 if scaled else self.current_gradient_accumulation_steps  # type: ignore[attr-defined]


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
