"""Each row's share of the loss that a transformers model and Trainer compute from logits."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers.models.auto import modeling_auto

from zofo.errors import UserError
from zofo.optim.blocks import is_peft

_IGNORED = -100  # label of a position that has no loss


def row_shares(
    model: nn.Module,
    outputs: Any,
    labels: Any,
    loss: Tensor | None = None,
    num_items_in_batch: Any = None,
    smoothing: float = 0.0,
) -> Tensor:
    """Compute the shares for a causal or sequence-to-sequence model or a classifier.

    Args:
        model: the model.
        outputs: its outputs, with `logits`: [rows, places, vocabulary] or [rows, classes].
        labels: int64, [rows, places] or [rows].
        loss: the loss, shape [], which tells by what the model divides; None: by the number of
            labels in the micro-batch.
        num_items_in_batch: number of labels in all micro-batches of the step, by which some models
            divide, or None.
        smoothing: Trainer's `label_smoothing_factor`.

    Returns:
        The shares, float32 [rows], whose sum is the loss.

    Raises:
        UserError: if the outputs or the labels have another form.
    """
    logits: Any = outputs.get("logits") if isinstance(outputs, dict) else None
    is_known = isinstance(labels, Tensor) and isinstance(logits, Tensor)
    if not is_known or labels.ndim != logits.ndim - 1 or labels.is_floating_point():
        raise UserError(
            "each row's share of the loss is computed from logits and integer labels, which this "
            "batch or model does not have; override row_losses of the trainer, or set "
            "directions_per_step=1"
        )
    labels = labels.to(logits.device)
    if labels.ndim == 2:
        # Virtual tokens stand before the input's places, and the last one predicts the first label.
        num_virtual = logits.shape[1] - labels.shape[1]
        labels = functional.pad(labels, (num_virtual, 0), value=_IGNORED)
        if _is_causal(model):
            # The labels are shifted, because a slice of the logits would be copied.
            labels = functional.pad(labels[:, 1:], (0, 1), value=_IGNORED)
    losses = functional.cross_entropy(
        logits.float().flatten(0, -2),
        labels.flatten(),
        ignore_index=_IGNORED,
        label_smoothing=smoothing,
        reduction="none",
    ).view(labels.shape)
    sums = losses.view(len(labels), -1).sum(1)  # [rows]
    shares = sums / (labels != _IGNORED).sum()
    if num_items_in_batch is None or loss is None:
        return shares
    counted = sums / torch.as_tensor(num_items_in_batch, device=sums.device)
    is_counted = (counted.sum() - loss).abs() < (shares.sum() - loss).abs()
    return torch.where(is_counted, counted, shares)


def _is_causal(model: nn.Module) -> bool:
    inner: Any = getattr(model, "module", model)
    name = type(inner.get_base_model() if is_peft(inner) else inner).__name__
    return name in modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values()


def check_shares(shares: Tensor, loss: Tensor, trainer: type) -> None:
    """Check that the shares of the rows add up to the loss.

    Raises:
        UserError: if they do not.
    """
    rounding = max(1e-3, 4 * torch.finfo(loss.dtype).eps)
    found, wanted = float(shares.sum()), float(loss)
    if shares.ndim != 1 or abs(found - wanted) > rounding * abs(wanted) + 1e-6:
        raise UserError(
            f"the rows' shares of the loss have shape {list(shares.shape)} and sum {found:.6g}, "
            f"but the loss of {trainer.__name__} is {wanted:.6g}; override row_losses to return "
            "shares [rows] whose sum is the loss, or set directions_per_step=1"
        )
