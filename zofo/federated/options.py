"""The options of a federated run. The server holds them, and sends them to the parties."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

from zofo.errors import UserError
from zofo.optim.options import StepOptions, checked_options, optimizer_problems, step_values


@dataclass(kw_only=True)
class FederatedOptions(StepOptions):
    """How the parties of a federated run train, beside the options of a step.

    Attributes:
        num_steps: local steps of a party in a round.
        base_lr: learning rate of the base, or a map from patterns of names to rates, as for
            `param_groups`. 0: the base stays, and only the adapter is trained.
        adapter_lr: learning rate of the adapter.
        optimizer: the adapter's optimizer, a name in `torch.optim`. It begins anew in each round.
        base_weight_decay: decoupled weight decay of the base.
        adapter_weight_decay: weight decay, passed to the adapter's optimizer.
        max_grad_norm: clip the adapter's gradient to this norm; None: do not clip.
        seed: seed of the directions and of the local order of rows.
    """

    num_steps: int = 10
    base_lr: float | Mapping[str, float] = 1e-5
    adapter_lr: float = 1e-3
    optimizer: str = "AdamW"
    base_weight_decay: float = 0.0
    adapter_weight_decay: float = 0.0
    max_grad_norm: float | None = None
    seed: int = 0

    @property
    def base_rates(self) -> dict[str, float]:
        """Pattern -> rate; empty if all rates are 0."""
        given = self.base_lr if isinstance(self.base_lr, Mapping) else {"*": self.base_lr}
        return dict(given) if any(given.values()) else {}

    @property
    def method(self) -> str:
        """The method of the local steps."""
        return "hybrid" if self.base_rates else "fo-peft"

    def to_json(self) -> str:
        """All options as text, which is the same for equal options."""
        return json.dumps(asdict(self))  # not sorted: the first pattern that matches decides

    @classmethod
    def from_json(cls, text: str) -> FederatedOptions:
        """Read what `to_json` wrote.

        Raises:
            UserError: if the text has unknown options or values outside their ranges.
        """
        values = json.loads(text)
        known = {field.name for field in fields(cls)}
        if not isinstance(values, dict) or not values.keys() <= known:
            raise UserError(
                "the server sends options that this version of zofo does not know; install the "
                "server's version on every party"
            )
        return checked(cls(**values))


def checked(options: FederatedOptions) -> FederatedOptions:
    """Return a copy of the options with values of the right types.

    Raises:
        UserError: for values outside their ranges; it lists all of them.
    """
    problems = optimizer_problems(options.optimizer, options.seed, options.max_grad_norm)
    if type(options.num_steps) is not int or options.num_steps < 1:
        problems.append(f"num_steps is {options.num_steps!r}; it must be at least 1")
    if options.base_every != 1:
        problems.append(
            f"base_every is {options.base_every}; in a federated run every local step measures the "
            "base, so set it to 1"
        )
    step = step_values(checked_options(options, problems))
    rest: dict[str, Any] = {k: v for k, v in vars(options).items() if k not in step}
    return FederatedOptions(**step, **rest)
