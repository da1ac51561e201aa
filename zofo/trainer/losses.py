"""The losses of a micro-batch for the first-order block and for the zeroth-order block.

Both are the same unless a subclass overrides `compute_zeroth_loss`. If `base_batch_fraction` is
below 1, the zeroth-order loss is that of the first rows.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from zofo.errors import UserError
from zofo.optim.batch_part import batch_rows, num_rows_of, split_rows
from zofo.optim.estimator import unperturbed
from zofo.optim.generators import GeneratorState
from zofo.optim.population import Population
from zofo.optim.processes import Processes
from zofo.optim.zeroth_loss import ZerothLoss
from zofo.trainer.row_losses import check_shares, row_shares
from zofo.trainer.sources import SourceMixin


class BatchLossMixin(SourceMixin):
    """Evaluates the losses of `HybridMixin`."""

    _shares_are_checked = False
    _deals_evenly = False  # whether processes have equal parts of a batch within an epoch
    _row_weight = 1.0  # of this process's mean over rows, in the mean of all processes

    def compute_zeroth_loss(
        self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Any = None
    ) -> Tensor | float:
        """Compute the loss of the zeroth-order block. Override it for a loss without a gradient.

        It is called without gradients, at the current weights and at perturbed ones. All calls of a
        step run in training mode with the same dropout masks, unless it sets a mode itself. The
        first-order block still follows `compute_loss`.

        Args:
            model: the model.
            inputs: the micro-batch on the device; with `base_batch_fraction` its first rows.
            num_items_in_batch: as for `compute_loss`.

        Returns:
            A scalar that depends only on the model and the inputs; lower is better. It must be a
            mean over rows, such as 1 − accuracy. zofo averages the micro-batches of a step.
        """
        loss: Any = self.compute_loss(model, inputs, num_items_in_batch=num_items_in_batch)
        return loss

    @property
    def has_zeroth_loss(self) -> bool:
        """Whether the zeroth-order block follows another loss than the first-order one."""
        own = type(self).compute_zeroth_loss
        return self.has_source or own is not BatchLossMixin.compute_zeroth_loss

    def whole_batch(
        self, model: nn.Module, inputs: Mapping[str, Any], num_items_in_batch: Any
    ) -> ZerothLoss:
        """The loss of the zeroth-order block on a whole micro-batch."""
        return ZerothLoss(lambda: self._zeroth_loss_of(model, inputs, num_items_in_batch))

    def batch_part(
        self, model: nn.Module, inputs: Mapping[str, Any], num_items_in_batch: Any, num_first: int
    ) -> tuple[ZerothLoss, ZerothLoss | None]:
        """Split a micro-batch into its first rows and the others, after a pass over all rows.

        Override it for batches that cannot be split along the first dimension of their tensors, or
        to supply the unperturbed loss of the first rows.

        Args:
            model: the model.
            inputs: the micro-batch, as for `training_step`.
            num_items_in_batch: likewise.
            num_first: number of first rows, less than the micro-batch has.

        Returns:
            The loss on the first rows, and the loss on the others for the check in the first step.
            If the second is None, the check is skipped.

        Raises:
            UserError: if the batch cannot be split.
        """
        num_rows = batch_rows(inputs)

        def taken(rows: Mapping[str, Any], num: int) -> ZerothLoss:
            share = num / num_rows
            # compute_loss divides a sum over tokens by their number. With the share of that number,
            # the taken rows estimate the loss of the whole batch.
            items = None if num_items_in_batch is None else num_items_in_batch * share
            return ZerothLoss(lambda: self._zeroth_loss_of(model, rows, items), share)

        first, rest = split_rows(inputs, num_first)
        return taken(first, num_first), taken(rest, num_rows - num_first)

    def row_losses(
        self, model: nn.Module, outputs: Any, labels: Any, loss: Tensor, num_items_in_batch: Any
    ) -> Tensor:
        """Compute each row's share of the loss, for directions of rows.

        Override it if `compute_loss` is not the cross-entropy of the model's logits. zofo checks in
        the first step that the sum of the shares is the loss.

        Args:
            model: the model.
            outputs: the outputs that `compute_loss` returned.
            labels: `labels` of the micro-batch, or None.
            loss: the loss that `compute_loss` returned, shape [].
            num_items_in_batch: as for `compute_loss`.

        Returns:
            The shares, [rows].

        Raises:
            UserError: if the outputs have no logits, or the labels another form.
        """
        smoothing = self.args.label_smoothing_factor
        if num_items_in_batch is not None and self.args.average_tokens_across_devices:
            # Trainer multiplies the loss, because the processes' gradients are averaged.
            num_items_in_batch = num_items_in_batch / self.args.world_size
        return row_shares(model, outputs, labels, loss, num_items_in_batch, smoothing)

    def examples_of(self, inputs: Mapping[str, Any]) -> Tensor | None:
        """The share in `row_losses` that each row of the model's input belongs to.

        Returns:
            int64 [rows of the input]; None: there is one share for each row.
        """
        return None

    @property
    def is_by_rows(self) -> bool:
        """Whether the rows of a batch of examples have directions of their own."""
        return not self.has_source and self.hybrid_optimizer.options.directions_per_step != 1

    @contextmanager
    def noting_row_losses(self) -> Iterator[list[Tensor]]:
        """Note the rows' shares of every loss that `compute_loss` computes in the context.

        The shares are detached, and divided as the loss of a micro-batch is.
        """
        noted: list[Tensor] = []
        compute_loss = self.compute_loss

        def noting(
            model: nn.Module,
            inputs: dict[str, Any],
            return_outputs: bool = False,
            num_items_in_batch: Any = None,
        ) -> Any:
            labels = inputs.get("labels")
            loss, outputs = compute_loss(
                model, inputs, return_outputs=True, num_items_in_batch=num_items_in_batch
            )
            with torch.no_grad():
                shares = self.row_losses(model, outputs, labels, loss, num_items_in_batch)
                if not self._shares_are_checked:
                    check_shares(shares.detach(), loss.detach(), type(self))
                    self._shares_are_checked = True
            noted.append(shares.detach() / self._loss_divisor(num_items_in_batch))
            return (loss, outputs) if return_outputs else loss

        # An attribute of the instance, because a subclass may override the method.
        vars(self)["compute_loss"] = noting
        try:
            yield noted
        finally:
            del vars(self)["compute_loss"]

    def weigh_rows(self, inputs: Mapping[str, Any], processes: Processes) -> None:
        """Find the weight of this process's rows, of which another one may have more or fewer."""
        # `RankBatches` deals equal parts of every batch but the last of an epoch. If a collator
        # leaves out rows, the mean of each process counts the same.
        is_last = self.accelerator.gradient_state.end_of_dataloader
        processes.has_even_rows = self._deals_evenly and not is_last
        self._row_weight = 1.0
        if not processes.has_even_rows:
            counts = processes.counts(self.num_batch_rows(inputs))
            self._row_weight = counts[processes.rank] * processes.size / sum(counts)

    def _weight(self, num_items_in_batch: Any) -> float:
        """The factor of this process's loss: 1 if it is divided by the items of all processes."""
        is_divided = self._is_divided(num_items_in_batch)
        return 1.0 if is_divided and self.args.average_tokens_across_devices else self._row_weight

    @contextmanager
    def weighing_loss(self, num_items_in_batch: Any) -> Iterator[None]:
        """Multiply the losses that Trainer computes in the context by the weight of the rows."""
        weight, own = self._weight(num_items_in_batch), vars(self).get("compute_loss")
        if weight == 1.0:
            yield
            return
        compute_loss = self.compute_loss

        def weighed(*args: Any, **kwargs: Any) -> Any:
            found: Any = compute_loss(*args, **kwargs)
            if isinstance(found, tuple):
                return found[0] * weight, *found[1:]
            return found * weight

        vars(self)["compute_loss"] = weighed
        try:
            yield
        finally:
            del vars(self)["compute_loss"]
            if own is not None:
                vars(self)["compute_loss"] = own

    def num_batch_rows(self, inputs: Mapping[str, Any]) -> int:
        """Number of rows in a micro-batch that `batch_part` can split."""
        return batch_rows(inputs)

    def _differenced(
        self,
        model: nn.Module,
        inputs: Mapping[str, Any],
        num_items_in_batch: Any,
        generators: GeneratorState,
    ) -> tuple[ZerothLoss | Population | None, ZerothLoss | None]:
        """The loss that is differenced (None for the training loss), and that of the other rows."""
        if self.has_source:
            return self._of_source(model, inputs), None
        fraction = self.hybrid_options.base_batch_fraction
        num_rows = self.num_batch_rows(inputs) if fraction < 1 else 0
        num_first = num_rows_of(fraction, num_rows)
        if num_first == num_rows:
            if not self.has_zeroth_loss:
                return None, None
            return self.whole_batch(model, inputs, num_items_in_batch), None
        part, rest = self.batch_part(model, inputs, num_items_in_batch, num_first)
        # A value from another pass is used only if it would be equal in a pass of its own. Else the
        # difference would also hold the rounding or the dropout by which the passes differ.
        return (part, rest) if self._is_exact(generators) else (replace(part, loss=None), None)

    def _check_parts(
        self,
        loss: Tensor | None,
        whole: ZerothLoss,
        first: ZerothLoss,
        rest: ZerothLoss,
        generators: GeneratorState,
    ) -> None:
        """Check that the batch loss (None: not known) is a mean over rows."""
        optimizer = self.hybrid_optimizer

        def evaluate(part: ZerothLoss) -> Tensor:
            closure = optimizer.unchanged_by(part.closure)
            graph = optimizer.evaluates_with_graph
            return unperturbed(closure, generators, with_graph=graph).sum()

        known = evaluate(whole) if loss is None else loss
        check_part(known, evaluate(first), evaluate(rest), type(self))

    def _is_exact(self, generators: GeneratorState) -> bool:
        """Whether each row's loss in the last pass equals its loss in a smaller batch."""
        return (
            self.args.device.type in ("cpu", "cuda")  # `GeneratorState` covers only these.
            and not (self.args.bf16 or self.args.fp16)
            and all(p.dtype in (torch.float32, torch.float64) for p in self.model.parameters())
            and generators.is_current()
            and not self.hybrid_optimizer.evaluates_with_graph
        )

    def _loss_of(
        self, model: nn.Module, inputs: Mapping[str, Any], num_items_in_batch: Any
    ) -> Tensor:
        """The loss of a micro-batch as Trainer scales it: shape []."""
        batch = self._prepare_inputs(dict(inputs))
        with self.compute_loss_context_manager():
            loss: Any = self.compute_loss(model, batch, num_items_in_batch=num_items_in_batch)
        return loss / self._loss_divisor(num_items_in_batch)

    def _row_losses_of(
        self, model: nn.Module, inputs: Mapping[str, Any], num_items_in_batch: Any
    ) -> Tensor:
        """The rows' shares of the loss of a micro-batch, [rows]."""
        with self.noting_row_losses() as noted:
            self._loss_of(model, inputs, num_items_in_batch)
        return noted[-1]

    def _zeroth_loss_of(
        self, model: nn.Module, inputs: Mapping[str, Any], num_items_in_batch: Any
    ) -> Tensor | float:
        if not self.has_zeroth_loss:
            evaluate = self._row_losses_of if self.is_by_rows else self._loss_of
            return evaluate(model, inputs, num_items_in_batch)
        batch = self._prepare_inputs(dict(inputs))
        with self.compute_loss_context_manager():
            loss = self.compute_zeroth_loss(model, batch, num_items_in_batch)
        return loss * self._row_weight / self.current_gradient_accumulation_steps

    def _is_divided(self, num_items_in_batch: Any) -> bool:
        """Whether `compute_loss` divides by the number of items of the step itself."""
        counted = self.model_accepts_loss_kwargs and num_items_in_batch is not None
        return counted or self.compute_loss_func is not None

    def _loss_divisor(self, num_items_in_batch: Any) -> float:
        """By what to divide the loss of a micro-batch, by the rule of Trainer.

        It contains the accumulation steps unless `compute_loss` divides by them itself.
        """
        is_scaled = getattr(self, "loss_is_scaled_for_ga", None)
        if is_scaled is None:
            is_scaled = self._is_divided(num_items_in_batch)
        steps = 1 if is_scaled else self.current_gradient_accumulation_steps
        return steps / self._weight(num_items_in_batch)


@contextmanager
def metrics_set_aside(trainer: Any) -> Iterator[None]:
    """Discard the metrics that trl's trainers collect in compute_loss during re-evaluations."""
    names = ("_metrics", "_stored_metrics", "_total_train_tokens")
    kept = {name: vars(trainer)[name] for name in names if name in vars(trainer)}
    vars(trainer).update(copy.deepcopy(kept))
    try:
        yield
    finally:
        vars(trainer).update(kept)


def check_part(loss: Tensor, first: Tensor, rest: Tensor, trainer: type) -> None:
    """Check that the batch loss lies between those of its two parts, as a mean must."""
    low, high = sorted((float(first), float(rest)))
    # The passes have different shapes, so their sums round differently.
    slack = 1e-3 * max(abs(low), abs(high)) + 1e-6
    if not low - slack <= float(loss) <= high + slack:
        raise UserError(
            f"the loss of {trainer.__name__} is {loss:.6g} on a batch, {first:.6g} on its first "
            f"rows and {rest:.6g} on the others, so it is no mean over rows; set "
            "base_batch_fraction to 1"
        )
