"""The same runs with `zofo.HybridOptimizer` and zofo's sampler, one seed and one rate at a time.

It is slow and shares no code with the compiled engine. The tests compare the two.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch

from zofo.convergence.engine import DIVERGED, Setting, Traces
from zofo.convergence.problems.base import Problem, ProblemModule
from zofo.optim.methods import param_groups
from zofo.optim.optimizer import HybridOptimizer
from zofo.optim.reshuffle import ReshufflingSampler


def run(
    problem: Problem,
    setting: Setting,
    rates: Sequence[tuple[float, float]],
    seeds: Sequence[int],
    checkpoints: Sequence[int],
    *,
    on_epoch: Callable[[int], None] | None = None,
) -> Traces:
    """Run every rate with every seed, like `engine.run`."""
    shape = (len(checkpoints), len(rates), len(seeds))
    rows = {name: np.full(shape, np.inf) for name in ("mean_x", "mean_y", "last")}
    ends = np.zeros((len(rates), len(seeds), problem.d_x + problem.d_y))
    num_done = 0
    for i, rate in enumerate(rates):
        for j, seed in enumerate(seeds):
            model = ProblemModule(problem)
            for row, found in _one(problem, model, setting, rate, seed, checkpoints):
                for name, value in found.items():
                    rows[name][row, i, j] = value
            ends[i, j] = model.point().detach().numpy()
            num_done += 1
            if on_epoch is not None:
                on_epoch(checkpoints[-1] * num_done // (len(rates) * len(seeds)))
    return Traces(tuple(checkpoints), w=ends, **rows)


def optimizer_of(
    model: ProblemModule, setting: Setting, rate: tuple[float, float], seed: int
) -> HybridOptimizer:
    """The optimizer that a setting describes."""
    groups: list[dict[str, Any]]
    if setting.base_order == "zeroth":
        groups = param_groups(model, "hybrid", base_lr=rate[0], adapter_lr=rate[1])
    else:  # no method of zofo has exact gradients in two groups, so they are made by hand
        model.x.requires_grad_(True)
        groups = [
            {"params": [model.x], "order": "first", "block": "base", "lr": rate[0]},
            {"params": [model.y], "order": "first", "block": "adapter", "lr": rate[1]},
        ]
    return HybridOptimizer(groups, model, optimizer="SGD", seed=seed, options=setting)


def _one(
    problem: Problem,
    model: ProblemModule,
    setting: Setting,
    rate: tuple[float, float],
    seed: int,
    checkpoints: Sequence[int],
) -> list[tuple[int, dict[str, float]]]:
    """Rows of one run, until it diverges."""
    optimizer = optimizer_of(model, setting, rate, seed)
    sampler = ReshufflingSampler(problem.num_samples, seed=seed, sampling=setting.sampling)
    sums, found, limit = [0.0, 0.0], [], None
    for epoch in range(checkpoints[-1] + 1):
        square = problem.gradient(model.point().detach()).square()
        now = [float(part.sum()) for part in problem.split(square)]
        limit = DIVERGED * max(sum(now), 1e-12) if limit is None else limit
        if not sum(now) < limit:  # true for NaN as well
            break
        if epoch in checkpoints:
            num = max(epoch, 1)
            row = {"mean_x": sums[0] / num, "mean_y": sums[1] / num, "last": sum(now)}
            found.append((list(checkpoints).index(epoch), row))
        sums = [total + part for total, part in zip(sums, now, strict=True)]
        if epoch < checkpoints[-1]:
            for index in sampler:
                sample = torch.tensor(index)
                optimizer.step(partial(model, sample))
    return found
