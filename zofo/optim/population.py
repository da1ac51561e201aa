"""Rewards in place of a loss: each answer to a prompt is written under a direction of its own.

    r_ij = r(answer j to prompt i, written at x + eps v_ij)         i < prompts, j < answers
    forward:  A_ij = r_ij − mean of the prompt's other rewards
    central:  A_ij = (r(x + eps v_ij) − r(x − eps v_ij)) / 2        antithetic pairs
    s_ij = −A_ij / (n · eps · spread)                               n: answers that have a reward

Σ s_ij v_ij is an unbiased estimate of the gradient of −E r(x + eps v), the smoothed reward, if the
spread is 1. A reward needs no gradient, and may be random. The directions are rank-one, so all
answers are written in the passes of one batch. What has no rank-one direction, such as a norm, has
one direction for the batch: only the central form moves it, as Σ A_ij is 0 in the other.

References:
    Salimans et al., "Evolution Strategies as a Scalable Alternative to Reinforcement Learning",
    2017 (antithetic pairs); "Evolution Strategies at the Hyperscale", arXiv 2511.16652 (rank-one).
    The names of `scale` are those of TRL's GRPO.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from zofo.errors import UserError
from zofo.noise.philox import MAX_DIRECTIONS
from zofo.optim.estimator import Estimator
from zofo.optim.generators import untouched
from zofo.perturb.side_path import NotByRows, RowDirections
from zofo.perturb.view import Perturbation

Scale = Literal["group", "batch", "none"]


@dataclass(frozen=True)
class Population:
    """What `HybridOptimizer` evaluates in place of a loss.

    Row i · num_answers + j is answer j to prompt i.

    Attributes:
        respond: writes the answers of some rows, whose numbers it is given. The rows of the model's
            input must be these, in this order. It is called at the perturbed weights.
        score: the rewards of the answers of all rows, float64 [rows]; NaN: not scored.
        num_prompts: prompts.
        num_answers: answers, and so directions, for each prompt.
        batches: numbers of the rows that are answered together; None: all at once.
        scale: divide by the spread of the rewards within a prompt ("group") or within all prompts
            ("batch"), or not ("none").
        weight: factor of the estimate, 1 / n with n micro-batches per step.
        cost: the cost of all answers so far in forward-equivalents of the micro-batch.
    """

    respond: Callable[[Sequence[int]], Sequence[Any]]
    score: Callable[[Sequence[Any]], Tensor]
    num_prompts: int
    num_answers: int
    batches: Sequence[Sequence[int]] | None = None
    scale: Scale = "group"
    weight: float = 1.0
    cost: Callable[[], float] = lambda: 0.0

    @property
    def num_rows(self) -> int:
        """Number of answers."""
        return self.num_prompts * self.num_answers


@torch.no_grad()
def population_gradients(
    population: Population,
    perturbation: Perturbation,
    *,
    eps: float,
    step: int,
    first: int,
    estimator: Estimator,
    self_check: bool,
    has_moved: bool,
) -> tuple[Tensor, Tensor]:
    """Compute the scalars of the directions of a population.

    Args:
        population: the answers and their rewards.
        perturbation: evaluates the model at w + eps v, under the distribution "rank-one".
        eps: smoothing radius.
        step: address of the directions.
        first: the first direction's number.
        estimator: "forward" or "central".
        self_check: check the first evaluation for weights that are read unperturbed.
        has_moved: whether the base has moved. Its weights then keep their kinds of direction.

    Returns:
        s, float64 [rows], and the number of answers left out, shape []. If no answer has a reward,
        all are NaN.

    Raises:
        UserError: if there are too many directions, or a layer newly cannot tell the rows apart.
    """
    num = population.num_rows
    if first + num >= MAX_DIRECTIONS:
        raise UserError(
            f"a step has {first + num} answers, each with a direction; give fewer than "
            f"{MAX_DIRECTIONS}"
        )
    if not perturbation.rank_one:
        raise UserError(
            "no weight that moves can have a rank-one direction for each answer, which rewards "
            "need; compiled layers cannot"
        )
    evaluated = functools.partial(_rewards, population, perturbation, step=step, first=first)
    while True:
        try:
            ahead = evaluated(eps, self_check=self_check)
            behind = evaluated(-eps) if estimator == "central" else None
            break
        except NotByRows as error:
            if has_moved:
                raise UserError(
                    f"{error}: the rows of this layer's input cannot be told, though those of the "
                    "first step could; begin with several answers"
                ) from error
            perturbation.only_rank_one(perturbation.rank_one - error.found.keys())
    shape = population.num_prompts, population.num_answers
    if population.num_answers == 1 and behind is None:
        shape = 1, population.num_prompts  # the other prompts' rewards are all there is to compare
    both = None if behind is None else behind.view(shape)
    found = advantages(ahead.view(shape), both, population.scale).flatten()
    is_scored = torch.isfinite(found)
    scalars = found * (-population.weight / (eps * is_scored.sum()))
    kept = torch.where(is_scored | ~is_scored.any(), scalars, 0.0)
    return kept, (~is_scored).sum()


def _rewards(
    population: Population,
    perturbation: Perturbation,
    scale: float,
    *,
    step: int,
    first: int,
    self_check: bool = False,
) -> Tensor:
    """The rewards of all rows at w + scale · v, float64 [rows]."""
    num = population.num_rows
    answers: list[Any] = [None] * num
    for rows in population.batches or [range(num)]:
        directions = RowDirections(first, num, torch.tensor(list(rows)) + first)

        def respond(
            rows: Sequence[int] = rows,
            directions: RowDirections = directions,
            is_checked: bool = self_check,
        ) -> Sequence[Any]:
            seen = perturbation.at(scale, step=step, self_check=is_checked, directions=directions)
            with untouched(), seen:
                return population.respond(rows)

        written = perturbation.checked(respond) if self_check else respond()
        self_check = False
        for row, answer in zip(rows, written, strict=True):
            answers[row] = answer
    return population.score(answers).detach().double().cpu()


def advantages(ahead: Tensor, behind: Tensor | None, scale: Scale) -> Tensor:
    """How much better each answer is than others, or each pair's half difference.

    Args:
        ahead: rewards at x + eps v, [prompts, answers]; NaN: none.
        behind: those at x − eps v; None: there are none.
        scale: as for `Population`.

    Returns:
        The advantages, NaN where a reward is NaN.
    """
    means, counts = ahead.nanmean(1, keepdim=True), (~ahead.isnan()).sum(1, keepdim=True)
    if behind is None:
        # The mean of the others does not depend on the answer's own direction, so no bias.
        found = (ahead - means) * counts / (counts - 1).clamp(min=1)
        seen = ahead
    else:
        found, seen = (ahead - behind) / 2, torch.cat((ahead, behind), 1)
    if scale == "none":
        return found
    squares = (seen - seen.nanmean(1, keepdim=True)).square().nansum(1, keepdim=True)
    free = ((~seen.isnan()).sum(1, keepdim=True) - 1).clamp(min=0)
    if scale == "batch":
        squares, free = squares.sum(), free.sum()
    spread = (squares / free.clamp(min=1)).sqrt()
    # Equal rewards differ by rounding at most, which would be divided by itself.
    is_same = spread <= 1e-12 * seen.abs().nan_to_num().max()
    return torch.where(is_same & ~found.isnan(), 0.0, found / spread)
