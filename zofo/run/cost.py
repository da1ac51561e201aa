"""The cost of a run in forward-equivalents."""

from __future__ import annotations

from zofo.config.schema import RunConfig, share_of
from zofo.optim.methods import METHODS


def forward_equivalents(
    config: RunConfig, steps: int, *, part_again: bool = False, cost_of_answers: float = 1.0
) -> float:
    """Cost of training in forwards of one micro-batch without gradients, evaluations apart.

    Args:
        config: resolved.
        steps: optimiser steps, of full batches.
        part_again: whether the unperturbed loss of a part of the batch is evaluated a second time,
            as with dropout or in half precision.
        cost_of_answers: of writing an answer to every row of a micro-batch, in forwards of it.
    """
    orders = METHODS[config.method]
    gradient = orders.forwards_per_gradient
    per_direction = 1 if config.estimator == "forward" else 2
    moves = "zeroth" in (orders.base, orders.adapter)
    differences = config.num_directions * per_direction if moves else 0
    share = share_of(config) if moves else 1
    again = config.zo_objective == "f1" or (share < 1 and part_again)
    if moves and again and config.estimator == "forward":
        differences += 1
    if config.zo_objective == "f1":
        share *= cost_of_answers
    measured_steps = -(-steps // config.base_every)
    cost = config.accumulation * (steps * max(gradient, 1) + measured_steps * differences * share)
    return int(cost) if cost == int(cost) else round(cost, 3)
