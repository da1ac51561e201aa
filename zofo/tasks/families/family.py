"""The definition of a built-in task, and the conversion of its rows to examples.

values      the columns of the row, and the values that the task derives from them
prompt      the template, filled with the values
candidates  the words of the classes; in choice tasks, option templates filled with the values
gold        index of the label of the row among the classes
text        one or two filled templates; encoders read it, and duplicates are found by it
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from zofo.errors import UserError
from zofo.tasks.answers import Measure
from zofo.tasks.classify import candidates_of, fill, template_columns
from zofo.tasks.labels import label_in
from zofo.tasks.rows import Table, convert_rows, require_columns, text_in
from zofo.tasks.spec import Example, Kind, Sizes

Row = Mapping[str, Any]


@dataclass(frozen=True)
class Hub:
    """The rows of a task on the hub.

    Attributes:
        dataset: id of the dataset.
        subset: name of its configuration.
        test: the split to report on; if the labels of "test" are secret, it is "validation".
    """

    dataset: str
    subset: str | None = None
    test: str = "validation"

    def __str__(self) -> str:
        return f"hub {self.dataset}" + (f" ({self.subset})" if self.subset else "")


@dataclass(frozen=True)
class Embedded:
    """The rows of a task in an installed package.

    Attributes:
        package: name on the package index.
        read: reads the training rows and the test rows (None: carved), with the hub's columns.
    """

    package: str
    read: Callable[[], tuple[Table, Table | None]]


@dataclass(frozen=True)
class BuiltinTask:
    """A task with a fixed prompt and fixed sizes.

    Attributes:
        description: one line.
        hub: the dataset that defines the columns of the rows.
        columns: columns that the task reads, without the label.
        template: the prompt.
        texts: templates of the one or two sequences that an encoder reads.
        classes: names of the label's values, in the hub's order.
        sizes: most rows of train, dev and test; None: all rows. Default: MeZO's.
        words: text that the model should write for each class; empty: not a classification task.
        options: templates of the candidates of a choice task.
        ending: template of a text after every candidate, which is scored instead of the candidate.
        labels: possible names of the label column.
        derive: computes further values of a row.
        group: template; rows with the same filled text stay in one part of the data.
        embedded: rows that need no access to the hub.
        measure: scores the answers that the model writes; None: the model chooses a candidate.
    """

    description: str
    hub: Hub
    columns: tuple[str, ...]
    template: str
    texts: tuple[str, ...]
    classes: tuple[str, ...] = ()
    sizes: Sizes = (1000, 500, 1000)
    words: tuple[str, ...] = ()
    options: tuple[str, ...] = ()
    ending: str = ""
    labels: tuple[str, ...] = ("label",)
    derive: Callable[[Row], dict[str, str]] | None = None
    group: str = ""
    embedded: Embedded | None = None
    measure: Measure | None = None

    @property
    def kind(self) -> Kind:
        """Whether rows share classes, have their own candidates, or need a generated answer."""
        if self.measure is not None:
            return "generation"
        return "classification" if self.words else "choice"

    @property
    def origin(self) -> str:
        """The source of the rows without task.data_dir, in words."""
        return f"package {self.embedded.package}" if self.embedded else str(self.hub)

    def values(self, row: Row) -> dict[str, str]:
        """The values that templates may name; raises ValueError for a bad row."""
        found = {column: _value_in(row, column) for column in self.columns}
        return found | self.derive(row) if self.derive else found


def examples(
    task: BuiltinTask,
    table: Table,
    *,
    template: str | None = None,
    verbalizers: Mapping[str, str] | None = None,
    is_labelled: bool = True,
) -> list[Example]:
    """One example per row.

    Args:
        task: the task.
        table: rows with the hub's columns.
        template: replaces the task's prompt.
        verbalizers: label -> word; replaces the task's words.
        is_labelled: whether to read the labels; otherwise the first candidate is gold.

    Raises:
        UserError: for missing columns, or with the problems of all bad rows.
    """
    template = task.template if template is None else template
    remedy = f"These rows must have the columns of {task.hub}"
    require_columns(table, task.columns, remedy)
    label = next((c for c in task.labels if c in table.rows[0][1]), task.labels[0])
    if is_labelled:
        require_columns(table, [label], remedy)
    words = words_of(task, verbalizers)
    named = template_columns(template)

    def convert(number: int, row: dict[str, Any]) -> Example:
        values = task.values(row)
        unknown = [name for name in named if name not in values]
        if unknown:
            raise ValueError(
                f"task.template names {', '.join(unknown)}; a row has {', '.join(values)}"
            )
        texts = tuple(fill(text, values) for text in task.texts)
        return Example(
            prompt=fill(template, values),
            candidates=words or tuple(fill(option, values) for option in task.options),
            gold=class_index(label_in(row, label), task.classes, label) if is_labelled else 0,
            text=texts[0] if len(texts) == 1 else (texts[0], texts[1]),
            row=number,
            ending=fill(task.ending, values),
            group=fill(task.group, values),
        )

    return convert_rows(table, convert)


def words_of(task: BuiltinTask, verbalizers: Mapping[str, str] | None) -> tuple[str, ...]:
    """The candidates of a classification task; raises UserError for unsuitable verbalizers."""
    if verbalizers is None or not task.words:
        return task.words
    named = {}
    for key, word in verbalizers.items():
        try:
            named[task.classes[class_index(key, task.classes, "task.verbalizers")]] = word
        except ValueError as error:
            raise UserError(str(error)) from error
    return candidates_of(task.classes, named)


def class_index(label: str, classes: tuple[str, ...], where: str) -> int:
    """Index of a label: the name of a class, its number, or true and false for 1 and 0.

    Raises:
        ValueError: if it is none of these.
    """
    if label in classes:
        return classes.index(label)
    if len(classes) == 2 and label.lower() in ("false", "true"):
        return int(label.lower() == "true")
    if label.isdecimal() and int(label) < len(classes):
        return int(label)
    numbers = ", ".join(f"{i} ({name})" for i, name in enumerate(classes))
    if label == "-1":
        raise ValueError(
            f"{where!r} is -1: the row has no label, as in the hub's unlabelled test splits; use "
            "rows with labels"
        )
    raise ValueError(f"{where!r} is {label!r}, not one of {numbers}")


def _value_in(row: Row, column: str) -> str:
    value: Any = row.get(column)
    if hasattr(value, "item"):  # parquet gives numpy scalars
        value = value.item()
    is_number = isinstance(value, int) and not isinstance(value, bool)
    return str(value) if is_number else text_in(row, column)
