"""The cost of training in forward-equivalents.

    cost = num_passes · max(1 + (forwards_per_gradient − 1) · backward_share, 1) + num_forwards

One unit is one forward pass of one micro-batch without gradients. A first-order pass costs
`Method.forwards_per_gradient` units: 2 for the gradient of an adapter, 3 for that of all weights.
A backward that ends above the lowest layer costs only the share of the layers that it passes.
A pass without a gradient evaluates the unperturbed loss and costs 1. A loss difference on a subset
of a micro-batch costs that subset's share. Evaluations on dev and test rows do not count, nor
does the one that checks in the first step whether the loss repeats.
"""

from __future__ import annotations

from zofo.optim.estimator import Estimator, forwards_per_direction


def num_moves(num_steps: int, base_every: int) -> int:
    """Number of the first `num_steps` steps that move the zeroth-order block: 0, k, 2k, ..."""
    return -(-num_steps // base_every)


def forwards_of_a_move(
    estimator: Estimator, num_directions: int, share: float = 1.0, *, again: bool = False
) -> float:
    """Forward passes that the loss differences add to one micro-batch.

    Args:
        estimator: "forward" or "central".
        num_directions: K.
        share: cost of one evaluation in forward passes of the micro-batch.
        again: whether the unperturbed loss is evaluated a second time.
    """
    return share * (num_directions * forwards_per_direction(estimator) + again)


def forward_equivalents(
    num_passes: int,
    forwards_per_gradient: int,
    num_forwards: float,
    backward_share: float = 1.0,
) -> float:
    """Cost of training, rounded to thousandths.

    Args:
        num_passes: unperturbed passes, one for each micro-batch of each step.
        forwards_per_gradient: as in `Method`; 0 where the pass has no gradient.
        num_forwards: forward passes of all loss differences.
        backward_share: share of the layers that a backward pass reaches, from 0 to 1.
    """
    cost = num_passes * max(1 + (forwards_per_gradient - 1) * backward_share, 1)
    cost += num_forwards
    return int(cost) if cost == int(cost) else round(cost, 3)
