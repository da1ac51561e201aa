"""Built-in checkers of an answer's form, each named by a text such as `regex:[0-9]+`.

    json             1 if the answer is JSON
    json:FILE        1 if it is JSON that the schema in the file allows (package jsonschema)
    regex:PATTERN    1 if the whole answer matches
    length:LOW-HIGH  1 within these numbers of words; less, the further it is from them
    words:A,B,C      1 if the answer is one of these words

All ignore blanks around the answer. Otherwise the score is 0.
"""

from __future__ import annotations

import json
import re
import string
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Final

from zofo.disk.files import read_json_object
from zofo.errors import UserError, shown

Check = Callable[[str], float]
"""The score of one answer."""


def checker(text: str) -> Check | None:
    """The checker that a text names, or None if it names none.

    Raises:
        UserError: if it names one with a wrong argument.
    """
    kind, _, argument = text.partition(":")
    return _KINDS[kind](argument) if kind in _KINDS else None


def text_of(completion: Any) -> str:
    """The text of an answer, which may be a list of chat messages."""
    if isinstance(completion, str):
        return completion
    return str(completion[-1]["content"]) if completion else ""


def as_reward(check: Check) -> Callable[..., list[float]]:
    """A reward function that scores each answer by a checker."""

    def reward(completions: Sequence[Any], **_: Any) -> list[float]:
        return [check(text_of(completion).strip()) for completion in completions]

    return reward


def _json(argument: str) -> Check:
    is_allowed = _schema(argument) if argument else lambda _: True

    def check(answer: str) -> float:
        try:
            value = json.loads(answer, parse_constant=_refuse)
        except (ValueError, RecursionError):
            return 0.0
        return float(is_allowed(value))

    return check


def _refuse(constant: str) -> None:
    raise ValueError(f"{constant} is not JSON")


def _schema(path: str) -> Callable[[Any], bool]:
    schema = read_json_object(Path(path).expanduser())
    try:
        from jsonschema.exceptions import SchemaError
        from jsonschema.validators import validator_for
        from referencing import Registry
    except ImportError as error:
        raise UserError(
            f"the reward json:{path} needs the package jsonschema; install it: "
            "pip install 'zofo[rewards]'"
        ) from error
    kind: Any = validator_for(schema)
    try:
        kind.check_schema(schema)
    except SchemaError as error:
        raise UserError(
            f"the reward json:{path} names no valid JSON schema ({error.message[:200]}); correct it"
        ) from error
    # The empty registry keeps references to other addresses from being fetched.
    valid: Callable[[Any], bool] = kind(schema, registry=Registry()).is_valid
    return valid


def _regex(argument: str) -> Check:
    try:
        pattern = re.compile(argument)
    except re.error as error:
        raise UserError(
            f"the reward regex:{argument} is no regular expression ({error}); correct it"
        ) from error
    return lambda answer: float(pattern.fullmatch(answer) is not None)


def _length(argument: str) -> Check:
    found = re.fullmatch(r"(\d{1,9})-(\d{1,9})", argument)
    low, high = map(int, found.groups()) if found else (1, 0)
    if low > high:
        raise UserError(
            f"the reward is {shown(f'length:{argument}')}; give the fewest and the most words, "
            "such as length:1-20"
        )

    def check(answer: str) -> float:
        num = len(answer.split())
        if num < low:
            return num / low
        return 1.0 if num <= high else high / num

    return check


def _words(argument: str) -> Check:
    known = {_bare(word) for word in argument.split(",")} - {""}
    if not known:
        raise UserError("the reward words: names no words; give some, such as words:yes,no")
    return lambda answer: float(_bare(answer) in known)


def _bare(word: str) -> str:
    return word.strip().strip(string.punctuation).casefold()


_KINDS: Final[dict[str, Callable[[str], Check]]] = {
    "json": _json,
    "regex": _regex,
    "length": _length,
    "words": _words,
}
