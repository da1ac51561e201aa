"""Replace `adapter.budget` by the modules that it chooses, on the training rows of a run.

`run.yaml` holds the modules as `adapter.modules`, so that resuming and repeating measure nothing.
`modules.json` holds the measurement behind them.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import chain, islice, repeat
from typing import Any

import torch
from torch import Tensor, nn

from zofo.config.schema import RunConfig
from zofo.environment import resolve_device
from zofo.errors import UserError
from zofo.models.budget import Choice, adapter_parts, check_sizes, importances, places_within
from zofo.run.cost import cost_of_budget
from zofo.tasks.encode import Collator, Encoded
from zofo.tasks.losses import losses_and_errors


def sizes_of(config: RunConfig, model: nn.Module) -> dict[str, int]:
    """Module -> number of parameters of the adapter; empty without `adapter.budget`.

    Raises:
        UserError: if the budget is less than the smallest, or than the sum of modules that are
            chosen already.
    """
    adapter = config.adapter
    if adapter.budget is None:
        return {}
    sizes = {m: sum(p.numel() for p in part) for m, part in adapter_parts(model).items()}
    check_sizes(sizes, adapter.budget)
    if adapter.modules is not None and sum(sizes.values()) > adapter.budget:
        raise UserError(
            f"adapter.budget is {adapter.budget}, and adapter.modules need {sum(sizes.values()):,} "
            "parameters with these options; leave adapter.modules out to choose them anew"
        )
    return sizes


def choose(
    config: RunConfig, model: nn.Module, rows: Sequence[Encoded], collator: Collator
) -> Choice:
    """Measure the importance of all modules, and choose those within `adapter.budget`.

    Args:
        config: a configuration with `adapter.budget`.
        model: the model with the wide adapter. It moves to the run's device.
        rows: the training rows.
        collator: makes batches of them.

    Raises:
        UserError: if the budget is too small, or the gradient is not finite.
    """
    adapter, device = config.adapter, resolve_device(config.device)
    sizes = sizes_of(config, model)
    model.to(device)

    def loss(indices: Sequence[int]) -> Tensor:
        batch = collator([rows[i] for i in indices])
        values = {name: tensor.to(device) for name, tensor in batch.items()}
        return losses_and_errors(model, values, config.task.objective)[0]

    num = adapter.budget_batches
    scores = importances(model, loss, _batches(len(rows), config.batch_size, num, config.seed))
    places = places_within(sizes, scores, adapter.budget or 0)
    return Choice(places, num, cost_of_budget(config))


def _batches(num_rows: int, size: int, num: int, seed: int) -> Iterator[list[int]]:
    """Rows of each batch: all rows in a random order, again from the first if there are too few."""
    order = torch.randperm(num_rows, generator=torch.Generator().manual_seed(seed)).tolist()
    rows = chain.from_iterable(repeat(order))
    return (list(islice(rows, size)) for _ in range(num))


def largest(config: RunConfig, model: Any) -> list[str]:
    """Modules that stand for the choice in a plan: the first that fit, where activations are most.

    Raises:
        UserError: if the budget is too small.
    """
    sizes = sizes_of(config, model)
    places = places_within(sizes, sizes, config.adapter.budget or 0)
    return [place.module for place in places if place.is_kept]
