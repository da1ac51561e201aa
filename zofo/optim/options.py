"""Whether the options and parameter groups of `HybridOptimizer` make sense."""

from __future__ import annotations

import difflib
import math

import torch
from torch.optim import Optimizer

from zofo.errors import UserError
from zofo.noise.combine import DISTRIBUTIONS
from zofo.optim.estimator import ESTIMATORS


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


def check_options(
    optimizer: str | type[Optimizer],
    eps: float,
    estimator: str,
    num_directions: int,
    distribution: str,
    base_every: int,
    seed: int,
    max_grad_norm: float | None,
) -> None:
    """Raises UserError for values outside their ranges, all of them at once."""
    known = _known_optimizers()
    asked = optimizer.lower() if isinstance(optimizer, str) else None
    near = difflib.get_close_matches(asked, known, n=1) if asked else []
    hint = f"; did you mean {known[near[0]].__name__!r}?" if near else ""
    checks = (
        (
            asked is None or asked in known,
            f"optimizer is {optimizer!r}, which torch.optim does not have{hint}",
        ),
        (0 < eps < math.inf, f"eps is {eps}; it must be a positive number, 1e-3 is usual"),
        (
            estimator in ESTIMATORS,
            f"estimator is {estimator!r}; choose one of {', '.join(ESTIMATORS)}",
        ),
        (num_directions >= 1, f"num_directions is {num_directions}; it must be at least 1"),
        (
            distribution in DISTRIBUTIONS,
            f"distribution is {distribution!r}; choose one of {', '.join(DISTRIBUTIONS)}",
        ),
        (
            isinstance(base_every, int) and base_every >= 1,
            f"base_every is {base_every}; it must be a whole number of steps, at least 1",
        ),
        (0 <= seed < 2**64, f"seed is {seed}; it must lie in [0, 2^64)"),
        (
            max_grad_norm is None or max_grad_norm > 0,
            f"max_grad_norm is {max_grad_norm}; it must be positive, or None for no clipping",
        ),
    )
    wrong = [message for holds, message in checks if not holds]
    if wrong:
        raise UserError("; ".join(wrong))
