"""The error for wrong input, whose message says how to correct it."""

from __future__ import annotations

import difflib
import re
import reprlib
from typing import Any


class TrainingStoppedError(RuntimeError):
    """Training ended before its last step."""


class UserError(ValueError):
    """Wrong input. The message gives the value, the constraint and the remedy.

    The command line prints its message without a traceback and exits with code 2.
    """


def problem_in_words(key: str, error: Any) -> str:
    """Describe one of pydantic's errors: the value, the constraint and the nearest choice."""
    message = re.sub(
        r"^(Input|List|String|Value) should (.+?)( after validation, not \d+)?$",
        r"must \2",
        error["msg"],
    )
    message = re.sub(r", unable to parse string as an? \w+$", "", message)
    message = re.sub(r"^Value error, ", "", message)
    text = f"{key} is {shown(error['input'])}; it {message}"
    if error["type"] == "string_type" and isinstance(error["input"], int | float):
        text += "; put it in quotes"
    if error["type"] == "literal_error" and isinstance(error["input"], str):
        choices = re.findall(r"'([^']+)'", error["ctx"]["expected"])
        near = difflib.get_close_matches(error["input"], choices, n=1)
        text += f" (did you mean {near[0]}?)" if near else ""
    return text


def shown(value: Any) -> str:
    """A value as the user gave it; a very long one is shortened."""
    short = reprlib.Repr()
    short.maxstring = short.maxother = short.maxlong = 100
    return short.repr(value)
