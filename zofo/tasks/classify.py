"""Classification examples: a text, a label, and a verbalizer for each label.

A verbalizer is the text that stands for a label. Encoders with a classification head read the text
alone. Decoders read the filled template and score each verbalizer.
"""

from __future__ import annotations

import string
from collections.abc import Mapping, Sequence
from typing import Any, Final

from zofo.errors import UserError
from zofo.tasks.labels import Classes, label_in, label_of, listed
from zofo.tasks.rows import Table, convert_rows, require_columns, text_in, value_in
from zofo.tasks.spec import Example

DEFAULT_TEMPLATE: Final = "{text}\nLabel:"


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
    """Put the row's texts into the template; braces inside them stay as they are.

    Raises:
        ValueError: if a column is missing or is no text.
    """
    # str.format would also evaluate attributes, indices and format specifications.
    parts = string.Formatter().parse(template)
    return "".join(
        literal + ("" if name is None else value_in(row, name)) for literal, name, _, _ in parts
    )


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
    candidates, classes = candidates_of(labels, verbalizers), Classes(labels)
    names = table.label_names.get(label_column)

    def convert(number: int, row: dict[str, Any]) -> Example:
        texts = [text_in(row, column) for column in columns]
        index = classes.index(label_in(row, label_column, names))
        return Example(fill(template, row), candidates, index, "\n".join(texts), number)

    return convert_rows(table, convert)


def candidates_of(labels: Sequence[str], verbalizers: Mapping[str, str] | None) -> tuple[str, ...]:
    """The verbalizer of each label; without verbalizers, a blank and the label.

    Raises:
        UserError: if the verbalizers miss a label, name an unknown one, or are equal.
    """
    if verbalizers is None:
        return tuple(f" {label}" for label in labels)
    classes, words, unknown = Classes(labels), dict[str, str](), []
    for key, word in verbalizers.items():
        try:
            label = labels[classes.index(label_of(key))]
        except ValueError:
            unknown.append(key)
            continue
        if words.setdefault(label, word) != word:
            raise UserError(f"task.verbalizers names the label {label!r} twice; keep one")
    missing = [label for label in labels if label not in words]
    if missing or unknown:
        raise UserError(
            f"task.verbalizers must name each label once; missing: {listed(missing) or 'none'}; "
            f"unknown: {listed(unknown) or 'none'}; the labels are {listed(labels)}"
        )
    candidates = tuple(words[label] for label in labels)
    if len(set(candidates)) < len(candidates):
        raise UserError(f"task.verbalizers must differ, found {', '.join(map(repr, candidates))}")
    return candidates
