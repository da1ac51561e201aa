"""Which modules hold an adapter whose number of parameters is limited.

A wide adapter is first attached to every module that the options name. The importance of a module
is the squared norm of the gradient of its part θ of the adapter,

    importance = ‖∂L/∂θ‖²,    L = mean training loss of n batches,

at the initial values. It is the first-order fall of L by a gradient step of this part alone, over
the learning rate. The modules with the highest importance per parameter are kept. This is the idea
of PrunePEFT (arXiv 2506.07587), to start wide and to prune by measured importance. It prunes in
rounds while it trains; here, one measurement before training decides, so no weight moves and the
choice depends on no learning rate.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from zofo.errors import UserError, shown
from zofo.models.adapter_kinds import KINDS


@dataclass(frozen=True)
class Place:
    """A module that can hold a part of the adapter."""

    module: str  # whole name in the base
    num_parameters: int  # of the part
    importance: float
    is_kept: bool


@dataclass(frozen=True)
class Choice:
    """The modules that hold an adapter within a budget."""

    places: tuple[Place, ...]  # all that were measured, in the order of the model
    num_batches: int  # batches behind the gradient
    forward_equivalents: float  # cost of the measurement

    @property
    def modules(self) -> list[str]:
        """The kept modules, in the order of the model."""
        return [place.module for place in self.places if place.is_kept]

    @property
    def num_parameters(self) -> int:
        """Parameters of the adapter in the kept modules."""
        return sum(place.num_parameters for place in self.places if place.is_kept)

    def as_json(self) -> dict[str, Any]:
        """All values, for JSON."""
        return {**asdict(self), "num_parameters": self.num_parameters}

    def lines(self) -> list[tuple[str, str, str, str]]:
        """A line for each kind of module: its name, the layers, the parameters, the importance.

        The layers are those that hold the adapter, and the importance is the share of the sum over
        all modules that the kept ones have.
        """
        kinds: dict[str, list[Place]] = {}
        for place in self.places:
            kinds.setdefault(place.module.rpartition(".")[2], []).append(place)
        total = sum(place.importance for place in self.places) or 1.0
        found = []
        for kind, places in kinds.items():
            kept = [place for place in places if place.is_kept]
            numbers = [re.search(r"\.(\d+)\.", f".{place.module}.") for place in kept]
            layers = ", ".join(number[1] for number in numbers if number is not None)
            found.append(
                (
                    kind,
                    f"{len(kept)} of {len(places)}" + (f": {layers}" if layers else ""),
                    f"{sum(place.num_parameters for place in kept):,}",
                    f"{sum(place.importance for place in kept) / total:.0%}",
                )
            )
        return found


def problem_of_budget(
    budget: int | None, modules: list[str] | None, type: str, *, in_file: bool = False
) -> str | None:
    """Why an adapter cannot have this budget of parameters; None if it can.

    Args:
        budget: the most parameters; None for no limit.
        modules: the modules that were chosen for it.
        type: a name in `zofo.models.adapter_kinds.KINDS`.
        in_file: whether a configuration file of peft describes the adapter instead.
    """
    if budget is None and modules is None:
        return None
    if budget is None:
        return (
            f"adapter.modules is {shown(modules)} without adapter.budget, whose choice it holds; "
            "name modules in adapter.targets"
        )
    given = f"adapter.budget is {budget}"
    if in_file:
        return (
            f"{given}, and a configuration file describes the adapter; leave budget out, or "
            "describe the adapter by adapter.type"
        )
    if type in KINDS and "budget" not in KINDS[type].options:
        fitting = [name for name, kind in KINDS.items() if "budget" in kind.options]
        return (
            f"{given}, and a {type} sits in no modules to choose from; leave budget out and set "
            f"num_virtual_tokens, or choose adapter {', '.join(fitting[:-1])} or {fitting[-1]}"
        )
    return None


def adapter_parts(model: nn.Module) -> dict[str, list[nn.Parameter]]:
    """Whole name of a module of the base -> parameters of the adapter that it holds.

    A new head is trained with the adapter and is none of its parts.
    """
    from peft.tuners.tuners_utils import BaseTunerLayer

    base: Any = model.get_base_model()  # type: ignore[operator]
    return {
        name: [p for p in module.parameters() if p.requires_grad]
        for name, module in base.named_modules()
        if isinstance(module, BaseTunerLayer)
    }


def check_sizes(sizes: Mapping[str, int], budget: int) -> None:
    """Check that at least one module is within the budget.

    Args:
        sizes: module -> number of parameters.
        budget: the most parameters.

    Raises:
        UserError: otherwise.
    """
    smallest = min(sizes.values())
    if smallest > budget:
        raise UserError(
            f"adapter.budget is {budget}, and the smallest of the {len(sizes)} modules that the "
            f"adapter can sit in needs {smallest:,} parameters; raise it to at least {smallest}, "
            "or choose a lower rank or other targets"
        )


def importances(
    model: nn.Module, loss: Callable[[Any], Tensor], batches: Iterable[Any]
) -> dict[str, float]:
    """Module -> squared norm of the gradient of its part of the adapter.

    Args:
        model: a `PeftModel`. It is evaluated without dropout, and nothing in it changes.
        loss: the mean loss of a batch under the model.
        batches: the batches, whose mean loss is differentiated.

    Raises:
        UserError: if a loss or a gradient is not finite.
    """
    parts = adapter_parts(model)
    parameters = [p for part in parts.values() for p in part]
    sums = [torch.zeros_like(p, dtype=torch.float32) for p in parameters]
    was_training, count = model.training, 0
    model.eval()
    try:
        for batch in batches:
            count += 1
            found = torch.autograd.grad(loss(batch), parameters, allow_unused=True)
            for total, gradient in zip(sums, found, strict=True):
                if gradient is not None:
                    total += gradient
    finally:
        model.train(was_training)
    norms = iter([float((total.double() / count).square().sum()) for total in sums])
    scores = {name: sum(next(norms) for _ in part) for name, part in parts.items()}
    if not all(score < float("inf") for score in scores.values()):
        raise UserError(
            "adapter.budget measures the gradient of the training loss, which is not finite; try "
            "model.dtype=float32, or name modules in adapter.targets"
        )
    return scores


def places_within(
    sizes: Mapping[str, int], scores: Mapping[str, float], budget: int
) -> tuple[Place, ...]:
    """Keep the modules with the highest importance per parameter that fit into the budget.

    Args:
        sizes: module -> number of parameters.
        scores: module -> importance. Of equal modules, the first is kept.
        budget: the most parameters of all kept modules together.
    """
    kept, left = set(), budget
    for name in sorted(sizes, key=lambda name: -scores[name] / sizes[name]):
        if sizes[name] <= left:
            kept.add(name)
            left -= sizes[name]
    return tuple(Place(name, size, scores[name], name in kept) for name, size in sizes.items())
