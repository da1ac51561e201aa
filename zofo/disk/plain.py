"""Checks of what JSON and YAML hold, so that every later step can handle it."""

from __future__ import annotations

from typing import Any, Final

from zofo.errors import shown

MAX_DEPTH: Final = 64  # of nested lists and objects; zofo's own files have at most 6
_INTEGERS: Final = range(-(1 << 63), 1 << 64)


def unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object from its keys and values; raises ValueError if a key appears twice."""
    found = dict(pairs)
    if len(found) < len(pairs):
        keys = [key for key, _ in pairs]
        twice = next(key for key in keys if keys.count(key) > 1)
        raise ValueError(f"the key {shown(twice)} appears twice in an object, remove one")
    return found


def check_plain(value: Any) -> None:
    """Refuse values that are valid JSON or YAML but that no later step could handle.

    Raises:
        ValueError: for deep nesting, an integer beyond 64 bits, and half a surrogate pair in a
            text, which cannot be written.
    """
    level = [value]
    for _ in range(MAX_DEPTH):
        inner: list[Any] = []
        for entry in level:
            if isinstance(entry, str):
                if not entry.isascii() and any("\ud800" <= sign <= "\udfff" for sign in entry):
                    raise ValueError(f"the text {shown(entry)} holds half a surrogate pair")
            elif isinstance(entry, dict):
                inner += (*entry.keys(), *entry.values())
            elif isinstance(entry, list | tuple):
                inner += entry
            elif isinstance(entry, int) and entry not in _INTEGERS:
                raise ValueError(f"the number {shown(entry)} does not fit in 64 bits")
        if not inner:
            return
        level = inner
    raise ValueError(f"lists and objects are nested more than {MAX_DEPTH} deep")
