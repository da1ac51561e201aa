"""The options of a hybrid step: type, default, range and help text of each, written once.

`RunConfig`, `HybridOptions` and the settings of the advisor and of the convergence study inherit
from `StepOptions`, and `HybridOptimizer` holds one. A new option here appears in all of them.
"""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from dataclasses import dataclass, fields
from functools import lru_cache
from types import MappingProxyType
from typing import Annotated, Any, Final, get_type_hints

import torch
from pydantic import AfterValidator, Field, TypeAdapter, ValidationError
from torch.optim import Optimizer

from zofo.errors import UserError, problem_in_words
from zofo.noise.combine import Distribution
from zofo.noise.philox import MAX_DIRECTIONS
from zofo.optim.estimator import Estimator

Radius = Annotated[
    float, Field(gt=0, allow_inf_nan=False, description="smoothing radius (as in MeZO)")
]


def _directions_of_rows(value: int | str) -> int | str:
    if value == "rows":
        return value
    if isinstance(value, str) and value.isdecimal():  # from a command line
        value = int(value)
    if isinstance(value, str) or not 1 <= value < MAX_DIRECTIONS:
        raise ValueError(f"must be a number from 1 to {MAX_DIRECTIONS - 1}, or rows")
    return value


@dataclass(kw_only=True)
class StepOptions:
    """How a step estimates the gradient of the zeroth-order block, and in which steps."""

    eps: Radius = 1e-3
    estimator: Annotated[
        Estimator, Field(description="forward (paper): 1 extra forward; central: 2")
    ] = "forward"
    num_directions: Annotated[
        int, Field(ge=1, lt=MAX_DIRECTIONS, description="directions per step (paper: 1)")
    ] = 1
    directions_per_step: Annotated[
        int | str,
        Field(
            description="rank-one directions that the rows of a batch share in turn, at the price "
            "of one forward: a number, or rows for one each"
        ),
        AfterValidator(_directions_of_rows),
    ] = 1
    # Rademacher is our choice: it is unbiased, as the Gaussian is, and faster to draw.
    distribution: Annotated[
        Distribution,
        Field(description="rademacher, gaussian (paper) or rank-one: distribution of directions"),
    ] = "rademacher"
    base_every: Annotated[
        int, Field(ge=1, description="steps from one update of the base to the next (paper: 1)")
    ] = 1
    replay_dropout: Annotated[
        bool, Field(description="same dropout masks in all evaluations of a step")
    ] = True
    self_check: Annotated[
        bool,
        Field(
            description="check in the first step that the loss repeats, and each read of a weight"
        ),
    ] = True
    # Off by default: it has no timing on a GPU yet, and it needs the scratch of one more layer.
    overlap: Annotated[
        bool,
        Field(description="on CUDA, perturb a layer while the previous one runs; same bits"),
    ] = False


STEP_KEYS: Final = tuple(field.name for field in fields(StepOptions))
for _field in fields(StepOptions):
    # `transformers.HfArgumentParser` reads a field's help from its metadata.
    _hint = get_type_hints(StepOptions, include_extras=True)[_field.name]
    _field.metadata = MappingProxyType({"help": _hint.__metadata__[0].description})


def step_values(options: StepOptions) -> dict[str, Any]:
    """The step options of an object, which may have further ones, as a dict."""
    return {key: getattr(options, key) for key in STEP_KEYS}


def rank_one_problems(options: StepOptions) -> list[str]:
    """Describe options of rank-one directions that contradict each other."""
    if options.distribution == "rank-one":
        if options.num_directions == 1:
            return []
        return [
            f"num_directions is {options.num_directions}, and each costs a forward; with the "
            "distribution rank-one set directions_per_step instead, whose directions cost none"
        ]
    if options.directions_per_step == 1:
        return []
    return [
        f"directions_per_step is {options.directions_per_step!r}, which needs the distribution "
        f"rank-one, not {options.distribution}; set distribution=rank-one or directions_per_step=1"
    ]


@lru_cache
def _checker() -> TypeAdapter[StepOptions]:
    return TypeAdapter(StepOptions)


def checked_options(options: StepOptions, other_problems: Sequence[str] = ()) -> StepOptions:
    """Return a copy of the step options, converted to their types.

    Args:
        options: a `StepOptions` or an instance of a subclass; it is not changed.
        other_problems: problems in the rest of the user's input, for the same message.

    Raises:
        UserError: for values outside their ranges; it lists all of them.
    """
    problems = list(other_problems)
    try:
        checked = _checker().validate_python(step_values(options))
        problems = rank_one_problems(checked) + problems
    except ValidationError as error:
        problems = [problem_in_words(str(e["loc"][0]), e) for e in error.errors()] + problems
    if problems:
        raise UserError("; ".join(problems))
    return checked


def _known_optimizers() -> dict[str, type[Optimizer]]:
    """The optimizer classes of `torch.optim` by their names in lower case."""
    return {
        name.lower(): value
        for name, value in vars(torch.optim).items()
        if isinstance(value, type) and issubclass(value, Optimizer) and value is not Optimizer
    }


def optimizer_class(optimizer: str | type[Optimizer]) -> type[Optimizer]:
    """Return the class, or look it up in `torch.optim` by its name; case is ignored."""
    return _known_optimizers()[optimizer.lower()] if isinstance(optimizer, str) else optimizer


def optimizer_problems(
    optimizer: str | type[Optimizer], seed: int, max_grad_norm: float | None
) -> list[str]:
    """Describe invalid arguments of `HybridOptimizer` other than its `StepOptions`."""
    known = _known_optimizers()
    asked = optimizer.lower() if isinstance(optimizer, str) else None
    near = difflib.get_close_matches(asked, known, n=1) if asked else []
    hint = f"; did you mean {known[near[0]].__name__!r}?" if near else ""
    checks = (
        (
            asked is None or asked in known,
            f"optimizer is {optimizer!r}, which torch.optim does not have{hint}",
        ),
        (0 <= seed < 2**64, f"seed is {seed}; it must lie in [0, 2^64)"),
        (
            max_grad_norm is None or max_grad_norm > 0,
            f"max_grad_norm is {max_grad_norm}; it must be positive, or None for no clipping",
        ),
    )
    return [message for holds, message in checks if not holds]
