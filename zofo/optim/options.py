"""The options of a hybrid step: type, default, range and help of each, written once.

`RunConfig`, `HybridOptions` and the settings of the advisor and of the convergence study inherit
`StepOptions`; `HybridOptimizer` holds one. An option that is added here appears in all of them.
"""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from dataclasses import dataclass, fields
from functools import lru_cache
from types import MappingProxyType
from typing import Annotated, Any, Final, get_type_hints

import torch
from pydantic import Field, TypeAdapter, ValidationError
from torch.optim import Optimizer

from zofo.errors import UserError, problem_in_words
from zofo.noise.combine import Distribution
from zofo.optim.estimator import Estimator

Radius = Annotated[
    float, Field(gt=0, allow_inf_nan=False, description="smoothing radius (as in MeZO)")
]


@dataclass(kw_only=True)
class StepOptions:
    """How a step estimates the gradient of the zeroth-order block, and when."""

    eps: Radius = 1e-3
    estimator: Annotated[
        Estimator, Field(description="forward (paper): 1 extra forward; central: 2")
    ] = "forward"
    num_directions: Annotated[int, Field(ge=1, description="directions a step (paper: 1)")] = 1
    # Rademacher is a choice: unbiased as the normal distribution is, and faster to draw.
    distribution: Annotated[
        Distribution, Field(description="of the directions (paper: gaussian)")
    ] = "rademacher"
    base_every: Annotated[
        int, Field(ge=1, description="steps from one move of the base to the next (paper: 1)")
    ] = 1
    replay_dropout: Annotated[
        bool, Field(description="same masks for all evaluations of a step")
    ] = True
    self_check: Annotated[bool, Field(description="watch the first perturbed forward")] = True
    # Off by default: it has not been timed on a GPU, and it needs the scratch of one more layer.
    overlap: Annotated[
        bool,
        Field(description="on CUDA, perturb a layer while the one before it runs; same bits"),
    ] = False


STEP_KEYS: Final = tuple(field.name for field in fields(StepOptions))
for _field in fields(StepOptions):
    # `transformers.HfArgumentParser` reads a field's help from its metadata.
    _hint = get_type_hints(StepOptions, include_extras=True)[_field.name]
    _field.metadata = MappingProxyType({"help": _hint.__metadata__[0].description})


def step_values(options: StepOptions) -> dict[str, Any]:
    """The values of the step's options in an object that may carry further ones."""
    return {key: getattr(options, key) for key in STEP_KEYS}


@lru_cache
def _checker() -> TypeAdapter[StepOptions]:
    return TypeAdapter(StepOptions)


def checked_options(options: StepOptions, other_problems: Sequence[str] = ()) -> StepOptions:
    """A copy of the step's options with values of their types.

    Args:
        options: a `StepOptions`, or what inherits from it; left as it is.
        other_problems: what is wrong with the rest of the user's input.

    Raises:
        UserError: for values outside their ranges, all of them at once.
    """
    problems = list(other_problems)
    try:
        checked = _checker().validate_python(step_values(options))
    except ValidationError as error:
        problems = [problem_in_words(str(e["loc"][0]), e) for e in error.errors()] + problems
    if problems:
        raise UserError("; ".join(problems))
    return checked


def _known_optimizers() -> dict[str, type[Optimizer]]:
    """The optimizers of `torch.optim` by their names in lower case."""
    return {
        name.lower(): value
        for name, value in vars(torch.optim).items()
        if isinstance(value, type) and issubclass(value, Optimizer) and value is not Optimizer
    }


def optimizer_class(optimizer: str | type[Optimizer]) -> type[Optimizer]:
    """The class, or the one of `torch.optim` with this name; case does not matter."""
    return _known_optimizers()[optimizer.lower()] if isinstance(optimizer, str) else optimizer


def optimizer_problems(
    optimizer: str | type[Optimizer], seed: int, max_grad_norm: float | None
) -> list[str]:
    """What is wrong with the arguments of `HybridOptimizer` beside `StepOptions`, in words."""
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
