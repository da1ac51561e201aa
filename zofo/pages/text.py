"""Names on a page, where none can change how the text around it reads.

Browsers order the signs of a line by their direction. A name with signs for that would reorder the
words beside it, and even plain Hebrew or Arabic pulls the numbers after it to its other side.
"""

from __future__ import annotations

import re
from typing import Any, Final

from zofo.console import printable

_RIGHT_TO_LEFT: Final = (
    "\u0590-\u08ff\ufb1d-\ufdff\ufe70-\ufefe\U00010800-\U00010fff\U0001e800-\U0001efff"
)
# From the first to the last sign of the direction, with the blanks, marks and numbers between them.
_RUN: Final = re.compile(f"[{_RIGHT_TO_LEFT}](?:(?:[^\\w\\n]|\\d)*[{_RIGHT_TO_LEFT}])*")
_FIRST_STRONG_ISOLATE, _POP_ISOLATE = "\u2068", "\u2069"


def isolated(value: Any) -> Any:
    """The value with all its texts made safe for a page.

    Args:
        value: a text, or lists and maps of texts, whose keys are texts too; others stay as they
            are, and so does text that is HTML already.

    Returns:
        The value with � in place of signs that control direction or terminals, and an isolate
        around each run of text that is read from right to left.
    """
    if isinstance(value, dict):
        return {isolated(key): isolated(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [isolated(inner) for inner in value]
    if type(value) is not str or (value.isascii() and value.isprintable()):
        return value
    return _RUN.sub(rf"{_FIRST_STRONG_ISOLATE}\g<0>{_POP_ISOLATE}", printable(value))
