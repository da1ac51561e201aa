"""The hybrid options that go with `transformers.TrainingArguments`."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from transformers import TrainingArguments

from zofo.disk.files import parse_json
from zofo.errors import UserError
from zofo.optim.methods import methods_that
from zofo.optim.options import StepOptions


@dataclass
class HybridOptions(StepOptions):
    """The hybrid options, which go with any subclass of `TrainingArguments`.

    They include the fields of `StepOptions`. Trainer's own arguments configure the adapter:
    `learning_rate`, `optim` and `max_grad_norm` are its learning rate, optimizer and clipping.
    """

    method: str = field(default="hybrid", metadata={"help": methods_that(lambda _: True)})
    base_lr: dict[str, float] | float | str = field(
        default=1e-5,
        metadata={
            "help": "learning rate of the base, or a map from name patterns to learning rates"
        },
    )
    base_batch_fraction: float = field(
        default=1.0,
        metadata={"help": "share of each batch on which the loss difference is computed"},
    )
    base_weight_decay: float = field(
        default=0.0, metadata={"help": "decoupled weight decay of the base"}
    )
    base_anchor: float = field(
        default=0.0,
        metadata={
            "help": "pull of a zeroth-order base to its original weights: each update goes the "
            "share base_lr · base_anchor of the way back"
        },
    )
    zo_seed: int | None = field(
        default=None, metadata={"help": "seed of the directions; default: seed"}
    )
    sampling: str = field(
        default="reshuffle",
        metadata={"help": "reshuffle (paper), shuffle-once or with-replacement"},
    )
    on_non_finite: str = field(
        default="stop",
        metadata={"help": "if a loss or scalar is not finite: stop (with a checkpoint) or skip"},
    )
    snapshot_every: int | None = field(
        default=None,
        metadata={"help": "steps between copies of the base, which shorten the replay at resume"},
    )


@dataclass
class HybridArguments(HybridOptions, TrainingArguments):
    """`transformers.TrainingArguments` and the hybrid options."""


def read_rates(base_lr: Any) -> Any:
    """Parse `base_lr`, because YAML reads 1e-5 as text and the command line gives maps as JSON."""
    if not isinstance(base_lr, str):
        return base_lr
    try:
        return parse_json(base_lr)
    except ValueError as error:
        raise UserError(
            f"base_lr is {base_lr!r}; it must be a number, or a map from name patterns to numbers"
        ) from error
