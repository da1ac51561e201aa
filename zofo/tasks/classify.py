"""Classification examples: a text, a label, and a verbalizer for each label.

A verbalizer is the text that stands for a label. Encoders with a classification head read the text
alone. Decoders read the filled template and score each verbalizer.
"""

from __future__ import annotations

import string
from collections.abc import Mapping, Sequence
from typing import Any, Final

from zofo.errors import UserError
from zofo.tasks.rows import Table, convert_rows, label_in, require_columns, text_in
from zofo.tasks.spec import Example

DEFAULT_TEMPLATE: Final = "{text}\nLabel:"
_MAX_CLASSES: Final = 200
"""Choice: more labels than this are more likely a wrong column."""


def template_columns(template: str) -> tuple[str, ...]:
    """The columns that a template names; raises UserError if it names none or is malformed."""
    try:
        names = [name for _, name, _, _ in string.Formatter().parse(template) if name is not None]
    except ValueError as error:
        raise UserError(f"the template {template!r} is malformed: {error}") from error
    if not names or not all(names):
        raise UserError(
            f"the template {template!r} must name columns in braces, such as '{{text}} It was'"
        )
    return tuple(dict.fromkeys(names))


def fill(template: str, row: Mapping[str, Any]) -> str:
    """Put the row's values into the template; braces inside the values stay as they are."""
    # str.format would also evaluate attributes, indices and format specifications.
    parts = string.Formatter().parse(template)
    return "".join(
        literal + ("" if name is None else str(row[name])) for literal, name, _, _ in parts
    )


def class_names(tables: Sequence[Table], column: str) -> tuple[str, ...]:
    """The labels of all tables, in the declared order, else sorted (as numbers if all are numbers).

    Raises:
        UserError: for fewer than two labels, or for more than 200.
    """
    for table in tables:
        if column in table.label_names:
            return tuple(table.label_names[column])
    found: set[str] = set()
    for table in tables:
        found |= set(convert_rows(table, lambda _, row: label_in(row, column)))
    if len(found) < 2:
        raise UserError(
            f"the column {column!r} of {tables[0].source} holds one label only, {found.pop()!r}; "
            "classification needs two or more"
        )
    if len(found) > _MAX_CLASSES:
        raise UserError(
            f"the column {column!r} of {tables[0].source} holds {len(found)} different labels; at "
            f"most {_MAX_CLASSES} classes can be scored: is it the right column?"
        )
    try:
        return tuple(sorted(found, key=float))
    except ValueError:
        return tuple(sorted(found))


def examples(
    table: Table,
    *,
    text_column: str,
    label_column: str,
    labels: Sequence[str],
    template: str | None,
    verbalizers: Mapping[str, str] | None,
) -> list[Example]:
    """One example per row.

    Args:
        table: the rows.
        text_column: column of the text; a template may name other columns.
        label_column: column of the label.
        labels: the classes, in the order of the candidates.
        template: the prompt. None: the text and "Label:".
        verbalizers: label -> verbalizer. None: a blank and the label.

    Raises:
        UserError: for missing columns or labels, and with all bad rows.
    """
    template = DEFAULT_TEMPLATE.replace("text", text_column) if template is None else template
    columns = template_columns(template)
    require_columns(
        table,
        [*columns, label_column],
        "Name yours with task.text and task.label, or in task.template",
    )
    candidates = candidates_of(labels, verbalizers)
    names = table.label_names.get(label_column)

    def convert(number: int, row: dict[str, Any]) -> Example:
        texts = [text_in(row, column) for column in columns]
        label = label_in(row, label_column)
        if names is not None:  # the hub stores classes as numbers, and -1 if the label is secret
            index = int(label)
            if not 0 <= index < len(names):
                raise ValueError(f"{label_column!r} is {label}: the row has no label; drop it")
        elif label not in labels:
            raise ValueError(f"{label_column!r} is {label!r}, not one of {', '.join(labels)}")
        else:
            index = labels.index(label)
        return Example(fill(template, row), candidates, index, "\n".join(texts), number)

    return convert_rows(table, convert)


def candidates_of(labels: Sequence[str], verbalizers: Mapping[str, str] | None) -> tuple[str, ...]:
    """The verbalizer of each label; without verbalizers, a blank and the label.

    Raises:
        UserError: if the verbalizers miss a label, name an unknown one, or are equal.
    """
    if verbalizers is None:
        return tuple(f" {label}" for label in labels)
    missing = [label for label in labels if label not in verbalizers]
    unknown = [label for label in verbalizers if label not in labels]
    if missing or unknown:
        raise UserError(
            f"task.verbalizers must name each label once; missing: {', '.join(missing) or 'none'}; "
            f"unknown: {', '.join(unknown) or 'none'}; the labels are {', '.join(labels)}"
        )
    candidates = tuple(verbalizers[label] for label in labels)
    if len(set(candidates)) < len(candidates):
        raise UserError(f"task.verbalizers must differ, found {', '.join(map(repr, candidates))}")
    return candidates
