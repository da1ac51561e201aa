"""The loss whose differences move the zeroth-order block, where it is not the first-order loss.

    s = (h(x + eps v) − h(x)) / eps        h: a part of the batch, 1 − accuracy, 1 − F1, a reward

A difference asks for no gradient, so h may be a step function, or need text to be written. The
first-order block follows the gradient of its own loss all the same. Both values of h come from one
batch under the same dropout masks, or none.

References:
    Malladi et al., "Fine-Tuning Language Models with Just Forward Passes", 2023, section 3.3.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class ZerothLoss:
    """What `HybridOptimizer` evaluates instead of the micro-batch's loss.

    Attributes:
        closure: returns the loss, a scalar; with n micro-batches a step, divided by n.
        cost: of one evaluation in forward-equivalents of the micro-batch, such as a part's share of
            its rows; or a function that says what all evaluations so far have cost.
        loss: its unperturbed value, if that is known from a pass over the same rows under the same
            masks; None: evaluate it.
    """

    closure: Callable[[], Tensor | float]
    cost: float | Callable[[], float] = 1.0
    loss: Tensor | None = None

    def cost_so_far(self) -> float:
        """What its evaluations have cost, if it keeps account of that; else 0."""
        return self.cost() if callable(self.cost) else 0.0

    def cost_since(self, before: float, num_evaluations: int) -> float:
        """What evaluations cost: by its own account since `before`, else their number's worth."""
        if callable(self.cost):
            return self.cost() - before
        return num_evaluations if self.cost == 1 else num_evaluations * self.cost
