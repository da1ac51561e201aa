"""Checks of the closure in the first step, before anything moves.

A loss difference is meaningful only if the closure gives the same loss at the same weights. So the
first step evaluates it again at the unperturbed point, which costs one forward once.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Final

import torch
from torch import Tensor

from zofo.errors import UserError

_USUAL_SCALE: Final = 2.0**16
"""The scale that `torch.amp.GradScaler` begins with. Smaller factors may be numbers of tokens."""
SCALED: Final = (
    "HybridOptimizer needs the loss itself: multiplied by the scale of a GradScaler, it would move "
    "the zeroth-order block as many times too far. Use bfloat16, which needs no scaler. Or run the "
    "scaled pass yourself, scaler.scale(loss).backward(), and pass the loss without the scale to "
    "optimizer.measure(closure, loss, generators) before scaler.step(optimizer)"
)


def check_repeats(loss: Tensor, again: Tensor, weights: Iterable[Tensor]) -> None:
    """Check that a second evaluation gives the same loss, without which differences are noise.

    Args:
        loss: the loss at the unperturbed point.
        again: the loss of the second evaluation at the same point.
        weights: the perturbed weights, whose dtype and device limit how well a loss repeats.

    Raises:
        UserError: if the losses differ by more than rounding.
    """
    # A pass with gradients may use other kernels than one without, which round differently.
    is_exact = all(w.dtype.itemsize >= 4 and w.device.type == "cpu" for w in weights)
    rounding = torch.finfo(loss.dtype).eps if loss.is_floating_point() else 0.0
    rtol = max(1e-4 if is_exact else 1e-3, 2 * rounding)
    first, second = float(loss), float(again)
    # A loss that is not finite has a report of its own.
    if math.isfinite(first - second) and not math.isclose(
        first, second, rel_tol=rtol, abs_tol=1e-6
    ):
        raise UserError(
            f"the loss is {first:.6g}, and {second:.6g} when it is computed again at the same "
            "weights, so a loss difference would be noise. A closure, compute_loss or "
            "compute_zeroth_loss must have no side effects, and no randomness beyond torch's, "
            "numpy's and Python's global generators: draw the batch before the step, not in it"
        )


def check_unscaled(loss: Tensor) -> None:
    """Check that a loss does not end in a multiplication by the scale of a GradScaler.

    Raises:
        UserError: if it does.
    """
    node = loss.grad_fn
    while node is not None and type(node).__name__ in ("MulBackward0", "DivBackward0"):
        saved = (getattr(node, name, None) for name in ("_saved_self", "_saved_other"))
        if any(_is_scale(factor) for factor in saved):
            raise UserError(SCALED)
        inputs = [function for function, _ in node.next_functions if function is not None]
        node = inputs[0] if len(inputs) == 1 else None


def _is_scale(factor: object) -> bool:
    # Python's numbers are saved as float64.
    if not isinstance(factor, Tensor) or factor.numel() != 1 or factor.dtype != torch.float32:
        return False
    value = abs(float(factor))
    return value >= _USUAL_SCALE and math.frexp(value)[0] == 0.5  # a power of 2
