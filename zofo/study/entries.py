"""The entries of a study's axes: names or sections with labels, and `each` for several at once.

An entry with `each` stands for one entry for every combination of the values of its options.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from typing import Any, Final

from zofo.errors import shown

Entry = str | dict[str, Any]
SECTIONS: Final = {"model": "name", "task": "name", "adapter": "type"}
"""Sections of a run's configuration that are axes -> the key that an entry given as text sets."""
_EACH: Final = "each"
"""Key of an entry: option -> list of values."""


def expand_each(given: dict[str, Any]) -> list[str]:
    """Replace each entry that has `each` by the entries that it stands for; return problems."""
    problems: list[str] = []
    for section, key in SECTIONS.items():
        axis = f"{section}s"
        entries = given.get(axis)
        if not isinstance(entries, list):
            continue
        found: list[Any] = []
        given[axis] = found
        for entry in entries:
            if not isinstance(entry, dict) or _EACH not in entry:
                found.append(entry)
                continue
            rest, values = {k: v for k, v in entry.items() if k != _EACH}, entry[_EACH]
            if not _is_grid(values):
                problems.append(
                    f"{axis} has each: {shown(values)}; it takes options with a list of values "
                    "each, such as {layers: [all, last 4]}"
                )
            elif doubled := [option for option in values if option in rest or option == "label"]:
                problems.append(
                    f"{axis} has {', '.join(doubled)} in each and beside it, or a label in each; "
                    "give every option once, and the label beside each"
                )
            else:
                found += _combinations(rest, values, label_of(rest, key))
    return problems


def _is_grid(values: Any) -> bool:
    return (
        isinstance(values, dict)
        and len(values) > 0
        and all(isinstance(listed, list) and listed for listed in values.values())
    )


def _combinations(
    entry: dict[str, Any], values: Mapping[str, list[Any]], label: str
) -> list[dict[str, Any]]:
    """An entry for every combination of values, which its label tells after that of the entry."""
    found = []
    for chosen in itertools.product(*values.values()):
        own = dict(zip(values, chosen, strict=True))
        parts = [label]
        for key, value in own.items():
            parts += [key, *map(str, value if isinstance(value, list) else [value])]
        found.append({**entry, **own, "label": "-".join(parts).replace(" ", "-")})
    return found


def label_of(entry: Entry, key: str) -> str:
    """The name of an entry in cells and runs: its label, or the last part of its value.

    A quantised model without a label has the name of its quantisation too.
    """
    values: Mapping[str, Any] = {key: entry} if isinstance(entry, str) else entry
    text = str(values.get("label") or values.get(key) or "").rstrip("/").split("/")[-1]
    if key == "name" and values.get("quantization") and not values.get("label"):
        text += f"-{values['quantization']}"
    # Run names are file names, so only these characters are left in them.
    return "".join(c if c.isalnum() or c in ".-" else "-" for c in text)
