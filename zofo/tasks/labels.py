"""The rule for labels: what a label is, which labels are equal, and the order of the classes.

    label     A text, an integer or a truth value. Blanks at its ends do not count.
    integer   1, 1.0, "1" and "1.0" are one label. A text such as "01" stays a text.
    truth     true and false are truth values in any case. If all labels are truth values or 0 and
              1, then true is 1 and false is 0.
    order     Integers are ordered by value, and texts by code point. A hub dataset that declares
              its classes keeps their order.

The rule applies to all files of a task together, whatever their format. Refused are missing, blank
and NaN labels, lists, objects, numbers that are no integers, labels that differ only in case,
blanks or leading zeros, and more classes than half the rows. A trained model keeps its classes:
labels of other rows are matched with them by name.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from decimal import Decimal
from typing import Any, Final

from zofo.errors import UserError, shown
from zofo.tasks.rows import Table, convert_rows

MAX_CLASSES: Final = 200
"""Choice: more labels than this are more likely a wrong column."""
_INTEGER: Final = re.compile(r"[+-]?(?:0|[1-9][0-9]*)(?:\.0*)?")
_FRACTION: Final = re.compile(
    r"[+-]?(?:(?:[0-9]+\.[0-9]*|\.[0-9]+)(?:e[+-]?[0-9]+)?|[0-9]+e[+-]?[0-9]+)"
)
_TRUTH: Final = {"false": "0", "true": "1"}
_MOST_NAMED: Final = 20


class Classes:
    """The classes of a task or of a trained model, by which labels are matched.

    Args:
        names: the labels, in their order.
    """

    def __init__(self, names: Sequence[str]) -> None:
        self.names = tuple(names)
        self._places: dict[str, int] = {}
        for i, name in enumerate(names):
            self._places.setdefault(_label_or_name(name), i)
        if _are_truth(self._places):
            for word, number in _TRUTH.items():
                for one, other in ((word, number), (number, word)):
                    if one in self._places:
                        self._places.setdefault(other, self._places[one])

    def __contains__(self, label: str) -> bool:
        return label in self._places

    def index(self, label: str) -> int:
        """The index of a label in the form of `label_of`; raises ValueError if it is no class."""
        if label not in self._places:
            raise ValueError(f"{label!r} is not one of {listed(self.names)}")
        return self._places[label]


def label_of(value: Any) -> str:
    """The label that a value means, as text; raises ValueError if the value is no label."""
    if getattr(value, "ndim", None) == 0:  # parquet gives numpy scalars
        value = value.item()
    if isinstance(value, bool | int):
        return str(value).lower()
    is_number = isinstance(value, float | Decimal)
    if is_number:
        is_integer = math.isfinite(value) and value == int(value)
        text = str(int(value)) if is_integer else str(value)
    elif isinstance(value, str):
        text = value.strip()
    elif value is None or type(value).__name__ in ("NAType", "NaTType"):  # pandas' missing values
        text = ""
    else:
        raise ValueError(
            f"is {shown(value)}; a label is one text, one integer, true or false: write it so, or "
            "name another column in task.label"
        )
    if text.lower() in ("", "nan"):
        raise ValueError("is empty; fill it or remove the row")
    if _INTEGER.fullmatch(text):
        return str(int(text.partition(".")[0]))
    if is_number or _FRACTION.fullmatch(text.lower()):
        raise ValueError(
            f"is {text}, which is no integer; classification needs classes: write each one as a "
            "text, such as low or high"
        )
    return text.lower() if text.lower() in _TRUTH else text


def label_in(row: Mapping[str, Any], column: str, names: Sequence[str] | None = None) -> str:
    """The label of a row; raises ValueError.

    Args:
        row: the row.
        column: the column of the label.
        names: names of the classes, of which the row holds the number, as on the hub.
    """
    try:
        label = label_of(row.get(column))
    except ValueError as error:
        raise ValueError(f"{column!r} {error}") from None
    if names is None:
        return label
    if label.isdecimal() and int(label) < len(names):
        return _label_or_name(names[int(label)])
    raise ValueError(f"{column!r} is {label}: the row has no label; drop it")


def class_names(tables: Sequence[Table], column: str, known: Sequence[str] = ()) -> tuple[str, ...]:
    """The classes of all tables together.

    Args:
        tables: the rows.
        column: the column of the label.
        known: the classes of a trained model; empty: the hub's declared classes, or those found.

    Raises:
        UserError: for rows without a label, for labels that are not known, or for labels that
            cannot be classes.
    """
    places: dict[str, str] = {}  # label -> where it stands first
    for table in tables:
        names = table.label_names.get(column)
        rows = convert_rows(table, lambda n, row, names=names: (n, label_in(row, column, names)))  # type: ignore[misc]
        for number, label in rows:
            places.setdefault(label, f"{table.source}, row {number}")
    declared = next((t.label_names[column] for t in tables if column in t.label_names), ())
    if known or declared:
        require_known(places, known or declared, "the model" if known else "the dataset")
        return tuple(known or declared)
    _require_different(places)
    found = set(places)
    if _are_truth(found) and found & set(_TRUTH.values()):
        found = {_TRUTH.get(label, label) for label in found}
    _require_classes(found, column, tables)
    if all(_INTEGER.fullmatch(label) for label in found):
        return tuple(sorted(found, key=int))
    return tuple(sorted(found))


def listed(names: Sequence[str]) -> str:
    """Names in a message; many are cut."""
    more = len(names) - _MOST_NAMED
    return ", ".join(names[:_MOST_NAMED]) + (f" and {more} more" if more > 0 else "")


def _label_or_name(name: str) -> str:
    # Older versions had classes that the rule refuses now, such as fractions.
    try:
        return label_of(name)
    except ValueError:
        return name


def _are_truth(labels: Any) -> bool:
    return set(labels) <= {*_TRUTH, *_TRUTH.values()}


def require_known(
    places: Mapping[str, str], names: Sequence[str], owner: str = "the model"
) -> None:
    """Raise UserError for labels that are no classes.

    Args:
        places: label -> where it stands.
        names: the classes.
        owner: what has these classes, in words.
    """
    classes = Classes(names)
    strange = [f"{label!r} ({place})" for label, place in places.items() if label not in classes]
    if strange:
        raise UserError(
            f"{owner} does not know these labels: {listed(strange)}; its classes are "
            f"{listed(names)}. Rename the labels, or remove their rows"
        )


def _require_different(places: Mapping[str, str]) -> None:
    alike: dict[str, str] = {}
    for label, place in places.items():
        key = " ".join(label.casefold().split())
        key = str(int(key)) if key.isascii() and key.isdecimal() else key
        other = alike.setdefault(key, label)
        if other != label:
            raise UserError(
                f"the labels {other!r} ({places[other]}) and {label!r} ({place}) differ only in "
                "case, blanks or leading zeros; write both in one way"
            )


def _require_classes(found: set[str], column: str, tables: Sequence[Table]) -> None:
    source, num_rows = tables[0].source, sum(len(table.rows) for table in tables)
    if len(found) < 2:
        raise UserError(
            f"the column {column!r} of {source} holds one label only, {found.pop()!r}; "
            "classification needs two or more"
        )
    if len(found) > MAX_CLASSES:
        limit = f"at most {MAX_CLASSES} classes can be scored"
    elif len(found) > max(2, num_rows / 2):
        limit = "a class needs two rows or more"
    else:
        return
    raise UserError(
        f"the column {column!r} of {source} holds {len(found)} different labels in {num_rows} "
        f"rows; {limit}: is it the right column? Name another with task.label, put numbers into "
        "a few classes, or use task completion"
    )
