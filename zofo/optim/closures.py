"""Checks of the closure in the first step, before anything moves.

A loss difference is meaningful only if the closure gives the same loss at the same weights. So the
first step evaluates it again at the unperturbed point, which costs one forward once.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from typing import Any, Final

import torch
from torch import Tensor

from zofo.errors import UserError
from zofo.optim.estimator import unperturbed
from zofo.optim.generators import GeneratorState

SCALED: Final = (
    "HybridOptimizer needs the loss itself: multiplied by the scale of a GradScaler, it would move "
    "the zeroth-order block as many times too far. Use bfloat16, which needs no scaler. Or run the "
    "scaled pass yourself, scaler.scale(loss).backward(), and pass the loss without the scale to "
    "optimizer.measure(closure, loss, generators) before scaler.step(optimizer)"
)


def check_repeats(
    closure: Callable[[], Tensor | float],
    known: Tensor | None,
    generators: GeneratorState,
    weights: Collection[Tensor],
    *,
    with_graph: bool,
) -> None:
    """Check that another evaluation gives the same loss, without which differences are noise.

    Args:
        closure: returns the loss, shape [] or [rows].
        known: the loss at the unperturbed point; None: it is evaluated first.
        generators: the state before `known` was computed.
        weights: the perturbed weights, whose dtype and device limit how well a loss repeats.
        with_graph: whether to evaluate in gradient mode, as `known` was.

    Raises:
        UserError: if the losses differ by more than rounding.
    """
    known = unperturbed(closure, generators, with_graph=with_graph) if known is None else known
    again = unperturbed(closure, generators, with_graph=with_graph).sum()
    loss = known.detach().sum()
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


@contextmanager
def refusing_scalers() -> Iterator[None]:
    """A context in which `GradScaler.scale` raises UserError, unless the scaler is disabled.

    A loss does not tell whether it was scaled, because any factor may be meant.
    """
    kinds = [torch.amp.GradScaler]
    for kind in kinds:  # The loop also reaches the classes that it adds.
        kinds += kind.__subclasses__()
    own = {kind: vars(kind)["scale"] for kind in dict.fromkeys(kinds) if "scale" in vars(kind)}
    try:
        for kind, scale in own.items():
            kind.scale = _refused(scale)  # type: ignore[method-assign]
        yield
    finally:
        for kind, scale in own.items():
            kind.scale = scale  # type: ignore[method-assign]


def _refused(scale: Callable[..., Any]) -> Callable[..., Any]:
    def refuse(scaler: torch.amp.GradScaler, *args: Any, **kwargs: Any) -> Any:
        if scaler.is_enabled():
            raise UserError(SCALED)
        return scale(scaler, *args, **kwargs)

    return refuse
