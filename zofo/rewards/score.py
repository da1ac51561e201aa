"""Scores answers by reward functions, whatever these do.

    score of an answer = Σ weight · reward        over the rewards that are not None

A reward that raises, takes too long, or returns a wrong number of values is called once more for
each answer alone, so only the answers that it fails on are left out. So is an answer whose reward
is no finite number. What a reward prints is not shown.
"""

from __future__ import annotations

import asyncio
import inspect
import math
import time
from collections import Counter
from collections.abc import Awaitable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from zofo.errors import UserError
from zofo.rewards.functions import Reward
from zofo.rewards.time_limit import Printed, in_thread, run_limited

TIME_LIMIT_S: Final = 60.0
_PATIENCE: Final = 4  # Time limits that all answers alone may take together.


@dataclass(frozen=True)
class Scores:
    """The scores of a batch of answers.

    Attributes:
        total: weighted sum of each answer; NaN if it is left out.
        by_reward: name of the reward -> its values; NaN where it gave none.
        problems: what went wrong, in words -> number of answers.
        printed: name of the reward -> characters that it printed, and the first of them.
    """

    total: tuple[float, ...]
    by_reward: Mapping[str, tuple[float, ...]]
    problems: Mapping[str, int]
    printed: Mapping[str, tuple[int, str]]

    @property
    def num_left_out(self) -> int:
        """Number of answers without a score."""
        return sum(map(math.isnan, self.total))


class Scorer:
    """Scores answers.

    Args:
        rewards: the reward functions.
        time_limit_s: seconds that one call of a reward may take.

    Raises:
        UserError: for a time limit that is not positive.
    """

    def __init__(self, rewards: Sequence[Reward], time_limit_s: float = TIME_LIMIT_S) -> None:
        if not 0 < time_limit_s < float("inf"):
            raise UserError(f"the time limit of a reward is {time_limit_s} s; give more than 0")
        self.rewards, self.time_limit_s = tuple(rewards), time_limit_s

    def __call__(
        self,
        prompts: Sequence[Any],
        completions: Sequence[Any],
        columns: Mapping[str, Sequence[Any]] | None = None,
    ) -> Scores:
        """Score answers.

        Args:
            prompts: the prompt of each answer, a text or a list of messages.
            completions: the answers, texts or lists of messages.
            columns: name -> the value of each answer's row.
        """
        given = {**(columns or {}), "prompts": prompts, "completions": completions}
        table = {name: list(values) for name, values in given.items()}
        totals = [0.0] * len(completions)
        is_scored = [False] * len(completions)
        problems: Counter[str] = Counter()
        by_reward, printed = {}, {}
        for reward in self.rewards:
            said = Printed()
            values, failed = self._values(reward, table, len(completions), said)
            problems.update(failed.values())
            for i, value in enumerate(values):
                if i in failed:
                    totals[i] = math.nan
                elif value is not None:
                    totals[i] += reward.weight * value
                    is_scored[i] = True
            numbers = (math.nan if value is None else value for value in values)
            by_reward[reward.name] = tuple(numbers)
            if said.num_characters:
                printed[reward.name] = said.num_characters, said.beginning
        for i, total in enumerate(totals):
            if not math.isfinite(total) or not is_scored[i]:
                totals[i] = math.nan
        return Scores(tuple(totals), by_reward, dict(problems), printed)

    def _values(
        self, reward: Reward, table: Mapping[str, list[Any]], num: int, said: Printed
    ) -> tuple[list[float | None], dict[int, str]]:
        """The values of a reward, and what is wrong with those that it fails on."""
        failed: dict[int, str] = {}
        try:
            given = self._call(reward, table, num, self.time_limit_s, said)
        except Exception as error:
            given = [None] * num
            deadline = time.monotonic() + _PATIENCE * self.time_limit_s
            for i in range(num):
                alone = {name: values[i : i + 1] for name, values in table.items()}
                left_s = min(self.time_limit_s, deadline - time.monotonic())
                try:
                    if num == 1 or left_s <= 0:
                        raise error
                    given[i] = self._call(reward, alone, 1, left_s, said)[0]
                except Exception as own:
                    failed[i] = f"{reward.name} {_in_words(own)}"
        values: list[float | None] = [None] * num
        for i, value in enumerate(given):
            try:
                values[i] = None if value is None else float(value)
            except Exception:
                failed[i] = f"{reward.name} gave a {type(value).__name__} in place of a number"
            number = values[i]
            if number is not None and not math.isfinite(number):
                values[i], failed[i] = None, f"{reward.name} gave {number}"
        return values, failed

    def _call(
        self,
        reward: Reward,
        table: Mapping[str, list[Any]],
        num: int,
        limit_s: float,
        said: Printed,
    ) -> list[Any]:
        arguments = _accepted(reward.function, table)

        def call() -> list[Any]:
            value = reward.function(**arguments)
            if inspect.isawaitable(value):
                value = _finished(value, limit_s)
            if isinstance(value, str | Mapping):
                raise _WrongShapeError(f"gave a {type(value).__name__} in place of a list")
            found = list(value)
            if len(found) != num:
                raise _WrongShapeError(f"gave {len(found)} values for {num} answers")
            return found

        found: list[Any] = run_limited(call, limit_s, said)
        return found


class _WrongShapeError(Exception):
    """A reward returned something else than one value for each answer."""


def _accepted(function: Any, table: Mapping[str, list[Any]]) -> dict[str, list[Any]]:
    """The arguments that the function takes; copies, because it may change them."""
    try:
        parameters = inspect.signature(function).parameters
    except (TypeError, ValueError):  # some functions in C have no signature
        return {name: list(values) for name, values in table.items()}
    takes_all = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
    return {name: list(v) for name, v in table.items() if takes_all or name in parameters}


def _finished(value: Awaitable[Any], limit_s: float) -> Any:
    async def awaited() -> Any:
        return await asyncio.wait_for(value, limit_s)

    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return asyncio.run(awaited())
    # A notebook runs a loop in this thread, which can have no second one.
    return in_thread(lambda: asyncio.run(awaited()), limit_s)


def _in_words(error: Exception) -> str:
    if isinstance(error, _WrongShapeError):
        return str(error)
    if isinstance(error, TimeoutError):
        return "took too long"
    return f"raised {type(error).__name__}: {' '.join(str(error).split())[:200]}"
