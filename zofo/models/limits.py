"""Limits on what a configuration from a file may ask for, checked before anything is built.

A few bytes can ask for terabytes, for a million layers, or for a regular expression that matches
for years. `limited_memory` counts every tensor before it is made. `check_adapter_values` and
`check_model_config` bound what costs time.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from itertools import pairwise
from typing import Any, Final

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from zofo.errors import UserError, shown

_FLOOR_BYTES: Final = 1 << 28
_TIMES_THE_BASE: Final = 4
_MOST: Final = {  # pattern of keys in a model's configuration -> limit of the value
    r"n(um)?_(\w+_)?(layer|expert|block)s?|\w+_layers|depth": 10_000,  # models have some hundred
    r"\w*(size|dim|heads|hidden|vocab|embd|inner)\w*": 1 << 24,
}
_MAX_ENTRIES: Final = 1024
_MAX_PATTERN: Final = 4096  # characters
_NAME_LENGTH: Final = 64  # of a module's name
_MAX_WAYS: Final = 10**7
_REPEATS: Final = ("MAX_REPEAT", "MIN_REPEAT", "POSSESSIVE_REPEAT")


class _Counter(TorchDispatchMode):
    """Adds up the bytes of new tensors, and raises before one exceeds the limit."""

    def __init__(self, limit: int, problem: str) -> None:
        super().__init__()
        self.left, self.problem = limit, problem

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        makes = any(argument.name == "device" for argument in func._schema.arguments)
        # A copy of a tensor is no larger than what is there already.
        if makes and not any(isinstance(value, torch.Tensor) for value in args):
            # On torch's meta device, tensors have a size, but no memory and no generator.
            plain = {k: v for k, v in kwargs.items() if k != "pin_memory"}
            plain |= {"generator": None} if "generator" in kwargs else {}
            made = func(*args, **{**plain, "device": torch.device("meta")})
            self.left -= made.numel() * made.element_size()
            if self.left < 0:
                raise UserError(self.problem)
        return func(*args, **kwargs)


@contextmanager
def limited_memory(model: nn.Module, what: str) -> Iterator[None]:
    """Refuse an adapter that needs far more memory than its base.

    Args:
        model: the base.
        what: the adapter, for the message.

    Raises:
        UserError: before a tensor is made that exceeds four times the bytes of the base and 256
            MiB.
    """
    base = sum(p.numel() * p.element_size() for p in model.parameters())
    limit = max(_FLOOR_BYTES, _TIMES_THE_BASE * base)
    problem = (
        f"{what} needs more than {limit / 2**20:,.0f} MiB and the base takes "
        f"{base / 2**20:,.0f} MiB; lower its rank, its number of tokens or its other sizes"
    )
    with _Counter(limit, problem):
        yield


def check_adapter_values(values: Mapping[str, Any], model: nn.Module) -> None:
    """Check the values of a peft configuration that could cost endless time.

    Raises:
        ValueError: for a number that is not finite, a list or map that is longer than the model has
            modules, or a regular expression that could match for too long.
    """
    most = max(_MAX_ENTRIES, sum(1 for _ in model.modules()))
    for key, value in values.items():
        if isinstance(value, float) and not math.isfinite(value):
            raise ValueError(f"{key} is {value}; it must be finite")
        # The shares of a learned rank are lists of a rank's length, one for each module.
        if isinstance(value, list | dict) and len(value) > most:
            raise ValueError(f"{key} has {len(value)} entries; a base of this size has {most}")
        if key.endswith("_pattern"):  # regular expressions, by their meaning in peft
            patterns = [value] if isinstance(value, str) else list(value or ())
        elif key.endswith("_modules") and isinstance(value, str):
            patterns = [value]
        else:
            continue
        for pattern in patterns:
            check_pattern(key, str(pattern))


def check_pattern(key: str, pattern: str) -> None:
    """Check that a regular expression is valid and that no module name keeps it busy for long.

    Raises:
        ValueError: if it is not.
    """
    try:
        if len(pattern) > _MAX_PATTERN:
            raise ValueError("it is too long")
        ways = _ways(re._parser.parse(pattern))  # type: ignore[attr-defined]
    except (re.error, RecursionError, OverflowError, ValueError) as error:
        raise ValueError(f"{key} {shown(pattern)} is no regular expression: {error}") from None
    if ways > _MAX_WAYS:
        raise ValueError(
            f"the regular expression {shown(pattern)} of {key} could take too long; repeat nothing "
            "inside a repetition, such as (a+)+, and use fewer of '.*'"
        )


def _ways(parsed: Any, **options: bool) -> float:
    """An upper bound of the ways in which a parsed expression can match parts of a name."""
    num, factor = _choices(parsed, **options)
    return math.comb(_NAME_LENGTH + num, num) * factor


def _choices(parsed: Any, *, is_repeated: bool = False) -> tuple[int, float]:
    """The number of repetitions in a sequence, and the factor of all its other choices.

    A backtracking matcher tries the choices one by one. Alternatives add up, and a sequence
    multiplies. Repetitions in a row share the letters of the name. A repetition of n times has the
    nth power of the ways of its body.
    """
    num, factor = 0, 1.0
    for kind, argument in parsed:
        name = str(kind)
        inner: list[Any] = []
        if name in _REPEATS:
            low, high, body = argument
            most = min(int(high), max(_NAME_LENGTH, int(low)))
            ways = _ways(body, is_repeated=True)
            if ways > 1:
                factor *= 2 * min(ways, 1e9) ** min(most, 30)
            elif most - int(low) > 1:
                num += 1
            elif most > int(low):
                factor *= 2
        elif name == "BRANCH":
            inner = argument[1]
            # At most one of several words matches, unless another begins with it.
            if not is_repeated and _are_words(inner):
                inner = []
        elif name == "GROUPREF_EXISTS":
            inner = [argument[1], argument[2] or []]
        elif name in ("SUBPATTERN", "ASSERT", "ASSERT_NOT"):
            inner = [argument[-1]]
        elif name == "ATOMIC_GROUP":
            inner = [argument]
        if inner:
            found = [_choices(part, is_repeated=is_repeated) for part in inner]
            num += max(n for n, _ in found)
            factor *= sum(f for _, f in found)
    return num, factor


def _are_words(alternatives: Any) -> bool:
    """Whether each alternative is a plain text, and none begins with another."""
    if not all(str(kind) == "LITERAL" for part in alternatives for kind, _ in part):
        return False
    words = sorted("".join(chr(code) for _, code in part) for part in alternatives)
    return not any(b.startswith(a) for a, b in pairwise(words))


def check_model_config(config: Any, name: str) -> None:
    """Refuse a model configuration whose sizes no model has.

    Raises:
        UserError: for more than 10,000 layers or experts, or a width or vocabulary beyond 2^24.
    """
    values = config.to_dict() if hasattr(config, "to_dict") else vars(config)
    parts = [values, *(v for v in values.values() if isinstance(v, dict))]
    for part in parts:
        for key, value in part.items():
            limits = [most for pattern, most in _MOST.items() if re.fullmatch(pattern, str(key))]
            if type(value) is int and value > min(limits, default=value):
                raise UserError(
                    f"the model {name} has {key} {shown(value)} in its config.json, and at most "
                    f"{min(limits)} can be built; correct the file, or copy the model again"
                )
