"""Reward functions by name: `package.module:function`, `file.py:function`, or a checker.

A reward function has the signature of TRL's `reward_funcs`:

    def reward(prompts, completions, **columns) -> list[float | None]     or async def

`columns` holds the other columns of the rows, a list each. None means: not scored. A name of a
function is code, which is loaded only if the caller of this very call allows it.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from zofo.disk.files import problem_of_name, require_regular
from zofo.errors import UserError, shown
from zofo.rewards.checkers import as_reward, checker

_OWN: Final = {"reasoning-gym": ("zofo.tasks.reasoning", "reward")}
"""Rewards of zofo that need no permission: name -> module, which stands in a higher room."""
RewardFunction = Callable[..., Any]
Given = str | RewardFunction | Sequence[str | RewardFunction] | Mapping[str, float]
"""One or several rewards, or a map from names to weights."""


@dataclass(frozen=True)
class Reward:
    """A reward function, its name and its weight in the sum."""

    name: str
    function: RewardFunction
    weight: float = 1.0


def names_of(given: Given) -> list[str]:
    """The names among the rewards."""
    parts = [given] if isinstance(given, str) or callable(given) else list(given)
    return [part for part in parts if isinstance(part, str)]


def is_code(name: str) -> bool:
    """Whether a name stands for code, because it names no built-in checker."""
    return name not in _OWN and checker(name) is None


def with_absolute_paths(given: Any) -> Any:
    """The same rewards; the existing files that they name have absolute paths."""
    if isinstance(given, Mapping):
        return {with_absolute_paths(name): weight for name, weight in given.items()}
    if isinstance(given, list):
        return [with_absolute_paths(name) for name in given]
    if not isinstance(given, str):
        return given  # which the configuration refuses
    kind, _, schema = given.partition(":")
    code, _, function = given.rpartition(":")
    if kind == "json" and _is_file(schema):
        return f"json:{Path(schema).expanduser().absolute()}"
    if code.endswith(".py") and _is_file(code):
        return f"{Path(code).expanduser().absolute()}:{function}"
    return given


def _is_file(name: str) -> bool:
    path = Path(name)
    return problem_of_name(path) is None and path.expanduser().is_file()


def problem_of(given: str | Sequence[str] | Mapping[str, float]) -> str | None:
    """What is wrong with the names or the weights, without loading any code; None if nothing is."""
    try:
        for name in names_of(given):
            if is_code(name):
                _split(name)
        _weights(given, None)
    except UserError as error:
        return str(error)
    return None


def load_rewards(
    given: Given, weights: Sequence[float] | None = None, *, is_allowed: bool
) -> list[Reward]:
    """Load reward functions.

    Args:
        given: functions or names, or a map from names to weights.
        weights: one for each reward; None: those of the map, or 1 each.
        is_allowed: whether the caller of this very call names or allows the code.

    Raises:
        UserError: if a name is wrong, its code fails while it is imported, or it is not allowed.
    """
    parts: list[Any] = [given] if isinstance(given, str) or callable(given) else list(given)
    found: dict[str, Reward] = {}
    for part, weight in zip(parts, _weights(given, weights), strict=True):
        name = _name(part)
        while name in found:
            name += "'"
        function = _load(part, is_allowed) if isinstance(part, str) else part
        found[name] = Reward(name, function, weight)
    return list(found.values())


def _weights(given: Given, weights: Sequence[float] | None) -> list[float]:
    """The weight of each reward; raises UserError for a wrong one."""
    num = 1 if isinstance(given, str) or callable(given) else len(given)
    if not num:
        raise UserError("there is no reward; name one, such as 'regex:[0-9]+'")
    if weights is None:
        weights = list(given.values()) if isinstance(given, Mapping) else [1.0] * num
    if len(weights) != num:
        raise UserError(f"there are {len(weights)} weights for {num} rewards; give one each")
    for weight in weights:
        if not 0 < abs(weight) < float("inf"):
            raise UserError(f"the weight of a reward is {weight}; give a number other than 0")
    return list(map(float, weights))


def _split(name: str) -> tuple[str, str]:
    """The module or file and the function that a name of code gives; raises UserError."""
    where, mark, attribute = name.rpartition(":")
    if not mark or not where or not attribute.isidentifier():
        raise UserError(
            f"the reward is {shown(name)}; name package.module:function, file.py:function, json, "
            "json:SCHEMA.json, regex:PATTERN, length:LOW-HIGH, words:A,B or reasoning-gym"
        )
    return where, attribute


def _name(part: Any) -> str:
    return part if isinstance(part, str) else getattr(part, "__name__", type(part).__name__)


def _load(name: str, is_allowed: bool) -> RewardFunction:
    if name in _OWN:
        home, function_name = _OWN[name]
        own: RewardFunction = getattr(importlib.import_module(home), function_name)
        return own
    check = checker(name)
    if check is not None:
        return as_reward(check)
    where, attribute = _split(name)
    if not is_allowed:
        raise UserError(
            f"the reward {name} is code, and no file can allow it to run: name it on the command "
            "line, reward.functions=..., or pass the function itself in Python"
        )
    try:
        is_file = where.endswith(".py")
        found = _from_file(Path(where)) if is_file else importlib.import_module(where)
    except UserError:
        raise
    except (Exception, SystemExit) as error:  # whatever the module raises while it is imported
        said = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
        raise UserError(
            f"the reward {name} cannot be imported ({said}); correct the name or the code"
        ) from error
    function = getattr(found, attribute, None)
    if not callable(function):
        raise UserError(f"{where} has no function {attribute!r}, which the reward {name} names")
    return function


def _from_file(path: Path) -> Any:
    path = path.expanduser().resolve()
    require_regular(path)
    name = f"zofo_reward_{path.stem}"
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # where dataclasses look for the types of their fields
    spec.loader.exec_module(module)
    return module
