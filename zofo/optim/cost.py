"""What training costs, in forward-equivalents.

The unit is one forward of one micro-batch without gradients. A first-order pass counts as
`Method.forwards_per_gradient` of them: 2 for an adapter's gradient, 3 for that of every weight. A
step without a gradient evaluates the unperturbed loss, which counts as 1. Loss differences count as
the share of a micro-batch that they are taken on. Evaluations on dev and test rows do not count.
"""

from __future__ import annotations

from zofo.optim.estimator import Estimator, forwards_per_direction


def num_moves(num_steps: int, base_every: int) -> int:
    """Steps among the first `num_steps` in which the zeroth-order block moves: 0, k, 2k, ..."""
    return -(-num_steps // base_every)


def forwards_of_a_move(
    estimator: Estimator, num_directions: int, share: float = 1.0, *, again: bool = False
) -> float:
    """Forwards that the loss differences of one micro-batch add to its first-order pass.

    Args:
        estimator: "forward" or "central".
        num_directions: K.
        share: part of a forward that one evaluation costs.
        again: whether the forward difference evaluates the unperturbed loss a second time.
    """
    return share * (
        num_directions * forwards_per_direction(estimator) + (again and estimator == "forward")
    )


def forward_equivalents(num_passes: int, forwards_per_gradient: int, num_forwards: float) -> float:
    """Cost of training, rounded to thousandths.

    Args:
        num_passes: micro-batches of all steps: each has one unperturbed pass.
        forwards_per_gradient: of the method; 0 where the pass has no gradient.
        num_forwards: forwards of all loss differences.
    """
    cost = num_passes * max(forwards_per_gradient, 1) + num_forwards
    return int(cost) if cost == int(cost) else round(cost, 3)
