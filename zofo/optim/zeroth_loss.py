"""The loss of the zeroth-order block, where it differs from the first-order loss.

    s = (h(x + eps v) − h(x)) / eps        h: the loss of some rows, 1 − accuracy, 1 − F1, a reward

A difference needs no gradient, so h may be a step function or may generate text. The first-order
block still follows the gradient of its own loss. Both values of h use the same batch and the same
dropout masks, or no dropout.

References:
    Malladi et al., "Fine-Tuning Language Models with Just Forward Passes", 2023, section 3.3.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class ZerothLoss:
    """The loss h that `HybridOptimizer` evaluates instead of the loss of the micro-batch.

    Attributes:
        closure: returns the loss, a scalar, or the shares of its rows. With n micro-batches per
            step, it divides by n.
        cost: cost of one evaluation in forward-equivalents of the micro-batch, such as the share of
            rows; or a function that returns the cost of all evaluations so far.
        loss: h(x), if a pass over the same rows under the same masks gave it; None: evaluate it.
        examples: the number of the share that each row of the model's input belongs to, int64
            [rows of the input], where they are other rows than those of the micro-batch.
    """

    closure: Callable[[], Tensor | float]
    cost: float | Callable[[], float] = 1.0
    loss: Tensor | None = None
    examples: Tensor | None = None

    def cost_so_far(self) -> float:
        """The cost of all evaluations so far if `cost` is a function, else 0."""
        return self.cost() if callable(self.cost) else 0.0

    def cost_since(self, before: float, num_evaluations: float) -> float:
        """The cost of the last `num_evaluations`; `before` is `cost_so_far` before them."""
        if callable(self.cost):
            return self.cost() - before
        return num_evaluations if self.cost == 1 else num_evaluations * self.cost
