"""The hybrid options beside `transformers.TrainingArguments`."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import Any

from transformers import TrainingArguments

from zofo.errors import UserError
from zofo.optim.methods import methods_that
from zofo.optim.options import StepOptions


@dataclass
class HybridOptions(StepOptions):
    """The hybrid options beside `TrainingArguments`; usable with any subclass of it.

    The fields of `StepOptions` are among them.
    The adapter's learning rate is `learning_rate`, its optimizer `optim`, its clipping
    `max_grad_norm`, all Trainer's own.
    """

    method: str = field(default="hybrid", metadata={"help": methods_that(lambda _: True)})
    base_lr: dict[str, float] | float | str = field(
        default=1e-5,
        metadata={"help": "learning rate of the base, or a map from name patterns to rates"},
    )
    base_batch_fraction: float = field(
        default=1.0, metadata={"help": "part of each batch that the loss difference is taken on"}
    )
    base_weight_decay: float = field(default=0.0, metadata={"help": "decoupled, of the base"})
    zo_seed: int | None = field(
        default=None, metadata={"help": "seed of the directions; default: seed"}
    )
    sampling: str = field(
        default="reshuffle",
        metadata={"help": "reshuffle (paper), shuffle-once or with-replacement"},
    )
    on_non_finite: str = field(
        default="stop",
        metadata={"help": "at a loss or scalar that is not finite: stop (checkpointed), or skip"},
    )
    snapshot_every: int | None = field(
        default=None,
        metadata={"help": "steps between copies of the base, so that resuming replays less"},
    )


@dataclass
class HybridArguments(HybridOptions, TrainingArguments):
    """`transformers.TrainingArguments` and the hybrid options."""


def read_rates(base_lr: Any) -> Any:
    """YAML reads 1e-5 as text, and a command line a map as JSON."""
    if not isinstance(base_lr, str):
        return base_lr
    try:
        return json.loads(base_lr)
    except json.JSONDecodeError as error:
        raise UserError(
            f"base_lr is {base_lr!r}; it must be a number, or a map from name patterns to numbers"
        ) from error
