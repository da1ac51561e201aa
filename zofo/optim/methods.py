"""A method assigns an order to each of the two blocks of a model.

    block     parameters                                              orders
    base      every weight of the pretrained model                    first, zeroth or frozen
    adapter   the weights of the PEFT adapter and of a new head       first, zeroth or frozen

    order     update
    first     along the exact gradient
    zeroth    along an estimate from loss differences in random directions
    frozen    none

The five methods that the paper compares are the five rows of `METHODS`.
"""

from __future__ import annotations

import difflib
import fnmatch
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, Literal

from torch import nn

from zofo.errors import UserError
from zofo.optim.blocks import (
    Blocks,
    check_adapter_kinds,
    check_can_move,
    keep_unpacked,
    remember_frozen,
    split_parameters,
)
from zofo.perturb.compiled import WRAPPED_NAME

Order = Literal["first", "zeroth", "frozen"]
Block = Literal["base", "adapter"]
MethodName = Literal["hybrid", "fo-peft", "zo-peft", "fo-ft", "zo-ft"]


@dataclass(frozen=True)
class Method:
    """The orders of the two blocks."""

    base: Order
    adapter: Order
    description: str

    @property
    def forwards_per_gradient(self) -> int:
        """Cost of a first-order pass in forward passes; 0 where the method has none.

        A backward pass costs about one forward for an adapter's gradient, two for all weights.
        """
        return 3 if self.base == "first" else 2 if self.adapter == "first" else 0

    @property
    def needs_adapter(self) -> bool:
        """Whether the method updates an adapter."""
        return self.adapter != "frozen"

    @property
    def first(self) -> Block | None:
        """The block that follows its exact gradient."""
        return self._block_of("first")

    @property
    def zeroth(self) -> Block | None:
        """The block that follows loss differences."""
        return self._block_of("zeroth")

    def _block_of(self, order: Order) -> Block | None:
        return "base" if self.base == order else "adapter" if self.adapter == order else None


METHODS: Final[Mapping[str, Method]] = {
    "hybrid": Method("zeroth", "first", "base by loss differences, adapter by its gradient"),
    "fo-peft": Method("frozen", "first", "the usual PEFT: adapter by its gradient, base frozen"),
    "zo-peft": Method("frozen", "zeroth", "adapter by loss differences, base frozen"),
    "fo-ft": Method("first", "frozen", "full fine-tuning by the gradient, no adapter"),
    "zo-ft": Method("zeroth", "frozen", "full fine-tuning by loss differences (MeZO), no adapter"),
}


def methods_that(fit: Callable[[Method], bool], *, joined_by: str = "or") -> str:
    """The names of the methods that satisfy `fit`, as a list in a sentence: "a, b or c"."""
    names = [name for name, method in METHODS.items() if fit(method)]
    return f" {joined_by} ".join([*filter(None, [", ".join(names[:-1])]), *names[-1:]])


def get_method(name: str) -> Method:
    """Look up a method by its name.

    Raises:
        UserError: if there is none; the message names the nearest.
    """
    if name not in METHODS:
        near = difflib.get_close_matches(name.lower(), METHODS, n=1)
        hint = f"did you mean {near[0]!r}? " if near else ""
        raise UserError(f"method {name!r} does not exist; {hint}choose one of {', '.join(METHODS)}")
    return METHODS[name]


def apply_method(model: nn.Module, method: str) -> Blocks:
    """Set `requires_grad` to what the method's orders need, and return the blocks.

    Raises:
        UserError: if the method needs an adapter and the model has none, or the reverse; if the
            weights of the adapter and the base cannot be distinguished; if the method would update
            quantized weights; or if weights are packed so that their gradients are wrong.
    """
    chosen = get_method(method)
    check_adapter_kinds(model, moves_base=chosen.base != "frozen")
    blocks = split_parameters(model)
    if chosen.needs_adapter and not blocks.adapter:
        raise UserError(
            f"method {method!r} moves an adapter and the model has none; wrap it with "
            f"peft.get_peft_model, or choose {methods_that(lambda m: not m.needs_adapter)}"
        )
    if not chosen.needs_adapter and blocks.adapter:
        raise UserError(
            f"method {method!r} moves no adapter and the model has one; pass the model without "
            f"adapter, or choose {methods_that(lambda m: m.needs_adapter)}"
        )
    remember_frozen(model, blocks)
    if chosen.base != "frozen":
        check_can_move(model, method, by_gradient=chosen.base == "first")
        blocks = split_parameters(model)  # with scales that can move
    keep_unpacked(model)
    for parameter in blocks.base.values():
        parameter.requires_grad_(chosen.base == "first")
    for parameter in blocks.adapter.values():
        parameter.requires_grad_(chosen.adapter == "first")
    return blocks


def anchor_problem(anchor: float, method: str, rates: Iterable[float]) -> str | None:
    """Why a base with these learning rates cannot have an anchor; None if it can, or is frozen."""
    order, highest = get_method(method).base, max(rates, default=0)
    if not 0 <= anchor < math.inf:
        return f"base_anchor is {anchor}; it must be a number of at least 0"
    if anchor and order == "first":
        return (
            f"base_anchor is {anchor}, and method {method} moves the base by its gradient; leave "
            f"it at 0, or choose {methods_that(lambda m: m.base == 'zeroth')}"
        )
    if anchor * highest > 1 and order == "zeroth":
        return (
            f"base_anchor is {anchor} and base_lr {highest}, and their product is the share of the "
            f"way back that an update goes; lower base_anchor to at most {1 / highest:g}"
        )
    return None


def param_groups(
    model: nn.Module,
    method: str = "hybrid",
    *,
    base_lr: float | Mapping[str, float] = 1e-5,
    adapter_lr: float = 1e-3,
    base_weight_decay: float = 0.0,
    base_anchor: float = 0.0,
    adapter_weight_decay: float = 0.0,
    no_decay: Iterable[str] = (),
) -> list[dict[str, Any]]:
    """Build the parameter groups for `HybridOptimizer`; those of the adapter come first.

    Args:
        model: the model with its adapter. The method sets its `requires_grad` flags.
        method: a name in `METHODS`.
        base_lr: learning rate of the base, or a map from shell-style patterns of base parameter
            names to learning rates. The first pattern that matches a name decides. A parameter
            that no pattern matches stays frozen.
        adapter_lr: learning rate of the adapter.
        base_weight_decay: decoupled weight decay of the base.
        base_anchor: λ of a zeroth-order base; each update moves a weight the share base_lr · λ of
            the way back to its original value. A frozen base has none.
        adapter_weight_decay: weight decay, passed to the adapter's optimizer.
        no_decay: names of first-order parameters that have no weight decay.

    Returns:
        Dicts with `params`, `names`, `tensors` (tensor indices of the directions), `order`,
        `block`, `lr`, `weight_decay`, and `anchor` if there is one.

    Raises:
        UserError: for a pattern that matches no parameter, a negative learning rate, or an anchor
            that the method or the rates do not allow.
    """
    blocks, chosen = apply_method(model, method), get_method(method)
    no_decay = [name.replace(WRAPPED_NAME, "") for name in no_decay]
    rates = dict(base_lr) if isinstance(base_lr, Mapping) else {"*": base_lr}
    _check_rates({**{f"base_lr[{k!r}]": v for k, v in rates.items()}, "adapter_lr": adapter_lr})
    if problem := anchor_problem(base_anchor, method, rates.values()):
        raise UserError(problem)
    groups: list[dict[str, Any]] = []

    def add(names: list[str], block: str, order: Order, lr: float, weight_decay: float) -> None:
        is_base = block == "base"
        source = blocks.movable if is_base else blocks.adapter
        index = blocks.base_index if is_base else blocks.adapter_index
        spared = set(no_decay) if order == "first" else set()
        has_anchor = base_anchor > 0
        for part, decay in (
            ([n for n in names if n not in spared], weight_decay),
            ([n for n in names if n in spared], 0.0),
        ):
            if part:
                groups.append(
                    {
                        "params": [source[n] for n in part],
                        "names": part,
                        "tensors": [index[n] for n in part],
                        "order": order,
                        "block": block,
                        "lr": lr,
                        "weight_decay": decay,
                        **({"anchor": base_anchor} if has_anchor and is_base else {}),
                    }
                )

    if chosen.adapter != "frozen":
        add(list(blocks.adapter), "adapter", chosen.adapter, adapter_lr, adapter_weight_decay)
    if chosen.base != "frozen":
        for pattern, names in _match(rates, list(blocks.movable)).items():
            add(names, "base", chosen.base, rates[pattern], base_weight_decay)
        # Base parameters that no pattern matches need no gradient.
        moved = {name for group in groups if group["block"] == "base" for name in group["names"]}
        for name in blocks.base.keys() - moved:
            blocks.base[name].requires_grad_(False)
    return groups


def _match(rates: Mapping[str, float], names: list[str]) -> dict[str, list[str]]:
    matched: dict[str, list[str]] = {pattern: [] for pattern in rates}
    for name in names:
        for pattern in rates:
            if fnmatch.fnmatchcase(name, pattern):
                matched[pattern].append(name)
                break
    unused = [pattern for pattern, found in matched.items() if not found]
    if unused:
        raise UserError(
            f"base_lr pattern {', '.join(map(repr, unused))} matches no base parameter, or only "
            "parameters that an earlier pattern matches; patterns are shell-style, names look like "
            f"{names[0]!r} and {names[len(names) // 2]!r}"
        )
    return matched


def _check_rates(rates: Mapping[str, float]) -> None:
    wrong = [f"{name} is {lr}" for name, lr in rates.items() if not 0 <= lr < float("inf")]
    if wrong:
        raise UserError("; ".join(wrong) + "; a learning rate is a finite number of at least 0")


def check_groups(groups: Sequence[Mapping[str, Any]], base_every: int) -> None:
    """Raise UserError if a group lacks something that `HybridOptimizer` needs."""
    for i, group in enumerate(groups):
        if group.get("order") not in ("first", "zeroth"):
            raise UserError(
                f"parameter group {i} has order {group.get('order')!r}; it must be 'first' or "
                "'zeroth' (zofo.optim.methods.param_groups builds the groups)"
            )
        if "lr" not in group:
            raise UserError(f"parameter group {i} has no lr")
        if group["order"] == "zeroth":
            lengths = {len(group.get(key, ())) for key in ("params", "names", "tensors")}
            if len(lengths) != 1:
                raise UserError(
                    f"parameter group {i} is of zeroth order and needs one name and one tensor "
                    "index for each parameter (zofo.optim.methods.param_groups builds the groups)"
                )
    orders = {group["order"] for group in groups}
    if base_every > 1 and orders == {"zeroth"}:
        raise UserError(
            f"base_every is {base_every}, but no first-order group would move in the steps "
            "between; set it to 1, or choose method hybrid"
        )
