"""The cost of a run in forward-equivalents, before it is run."""

from __future__ import annotations

from zofo.config.schema import RunConfig, share_of
from zofo.optim import cost
from zofo.optim.methods import METHODS


def forward_equivalents(
    config: RunConfig, steps: int, *, part_again: bool = False, cost_of_answers: float = 1.0
) -> float:
    """The cost of training, counted by `zofo.optim.cost`.

    Args:
        config: resolved.
        steps: number of optimizer steps with full batches.
        part_again: whether the unperturbed loss of a part of the batch needs a second forward pass,
            as with dropout or in half precision.
        cost_of_answers: cost of generating the answers of a micro-batch, in its forward passes.
    """
    method, share = METHODS[config.method], share_of(config)
    if config.zo_objective == "reward":
        moves = cost.num_moves(steps, config.base_every)
        return cost.forward_equivalents(
            config.accumulation * steps if method.first else 0,
            method.forwards_per_gradient,
            config.accumulation * moves * cost_of_answers,
        )
    writes = config.zo_objective == "f1"
    again = writes or (share < 1 and part_again)
    # A central difference of the whole batch needs no unperturbed loss.
    is_needed = config.estimator == "forward" or config.directions_per_step != 1
    a_move = cost.forwards_of_a_move(
        config.estimator,
        config.num_directions,
        share * (cost_of_answers if writes else 1),
        again=again and is_needed,
    )
    moves = cost.num_moves(steps, config.base_every) if method.zeroth else 0
    return cost.forward_equivalents(
        config.accumulation * steps,
        method.forwards_per_gradient,
        config.accumulation * moves * a_move,
    )
