"""The cost of a run in forward-equivalents, before it is run."""

from __future__ import annotations

from zofo.config.schema import RunConfig, has_own_rows, share_of
from zofo.models.layers import ALL, share_by_config
from zofo.optim import cost
from zofo.optim.methods import METHODS


def forward_equivalents(
    config: RunConfig, steps: int, *, part_again: bool = False, cost_of_answers: float = 1.0
) -> float:
    """The cost of training and of choosing modules before it, counted by `zofo.optim.cost`.

    Args:
        config: resolved.
        steps: number of optimizer steps with full batches.
        part_again: whether the unperturbed loss of a part of the batch needs a second forward pass,
            as with dropout or in half precision.
        cost_of_answers: cost of generating the answers of a micro-batch, or of evaluating its
            preference pairs for a move, in its forward passes.

    Raises:
        UserError: if the adapter is in some layers only, and the model's `config.json` cannot be
            read or has fewer layers.
    """
    method, share, before = METHODS[config.method], share_of(config), cost_of_budget(config)
    if has_own_rows(config):
        moves = cost.num_moves(steps, config.base_every)
        return before + cost.forward_equivalents(
            config.accumulation * steps if method.first else 0,
            method.forwards_per_gradient,
            config.accumulation * moves * cost_of_answers,
            backward_share_of(config),
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
    return before + cost.forward_equivalents(
        config.accumulation * steps,
        method.forwards_per_gradient,
        config.accumulation * moves * a_move,
        backward_share_of(config),
    )


def cost_of_budget(config: RunConfig) -> float:
    """The cost of choosing the adapter's modules within `adapter.budget`; 0 without one.

    It is that of the gradient of the wide adapter on `adapter.budget_batches` micro-batches, also
    if the modules are already known.
    """
    if config.adapter.budget is None:
        return 0
    forwards = METHODS["fo-peft"].forwards_per_gradient
    return cost.forward_equivalents(
        config.adapter.budget_batches, forwards, 0, backward_share_of(config)
    )


def backward_share_of(config: RunConfig) -> float:
    """The share of the layers that the backward pass of the adapter reaches."""
    layers, model = config.adapter.layers, config.model
    # Gradient checkpointing of transformers asks for the gradient of the embeddings' output.
    reaches_all = layers == ALL or config.gradient_checkpointing
    if reaches_all or METHODS[config.method].first != "adapter":
        return 1.0
    given = layers if isinstance(layers, str) else tuple(layers)
    return share_by_config(given, model.name, model.revision, model.trust_remote_code)
