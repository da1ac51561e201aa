"""What a built-in task is made of, and how rows in the hub's columns become examples.

Of every row:

    values      the row's columns, and what the task derives from them
    prompt      the template, filled with the values
    candidates  the classes' words; or, in choice tasks, templates filled with the values
    gold        the place of the row's label among the classes
    text        one or two templates: what an encoder reads, and how duplicates are found
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from zofo.errors import UserError
from zofo.tasks.answers import Measure
from zofo.tasks.classify import candidates_of, fill, template_columns
from zofo.tasks.rows import Table, convert_rows, label_in, require_columns, text_in
from zofo.tasks.spec import Example, Kind

Row = Mapping[str, Any]
Sizes = tuple[int | None, int | None, int | None]


@dataclass(frozen=True)
class Hub:
    """Where the hub keeps a task's rows.

    Attributes:
        dataset: its id.
        subset: its configuration.
        test: the split to report on, the last one whose labels are public.
    """

    dataset: str
    subset: str | None = None
    test: str = "validation"

    def __str__(self) -> str:
        return f"hub {self.dataset}" + (f" ({self.subset})" if self.subset else "")


@dataclass(frozen=True)
class Embedded:
    """Rows that an installed package carries.

    Attributes:
        package: name on the package index.
        read: rows to train on, and test rows or None to carve them too; in the hub's columns.
    """

    package: str
    read: Callable[[], tuple[Table, Table | None]]


@dataclass(frozen=True)
class BuiltinTask:
    """A task whose prompt and sizes are fixed.

    Attributes:
        description: one line.
        hub: whose columns its rows have.
        columns: the hub's columns that it reads, the label aside.
        classes: names of the label's values, in the hub's order.
        template: the prompt.
        texts: templates of an encoder's one or two sequences.
        sizes: rows of train, dev and test, at most; None: all there are.
        words: what the model should write for each class; empty: a choice task.
        options: templates of a choice task's candidates.
        ending: template of what stands after every candidate, and is scored instead of it.
        labels: names that the label's column may have.
        derive: further values of a row.
        group: template; rows that agree in it stay in one part.
        embedded: rows to be had without the hub.
        measure: how answers are scored that the model writes; None: it chooses among candidates.
    """

    description: str
    hub: Hub
    columns: tuple[str, ...]
    classes: tuple[str, ...]
    template: str
    texts: tuple[str, ...]
    sizes: Sizes
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
        """Whether every row has the same classes, or candidates of its own, or wants an answer."""
        if self.measure is not None:
            return "generation"
        return "classification" if self.words else "choice"

    @property
    def origin(self) -> str:
        """Where the rows come from unless task.data_dir is given, in words."""
        return f"package {self.embedded.package}" if self.embedded else str(self.hub)

    def values(self, row: Row) -> dict[str, str]:
        """What templates may name; raises ValueError for a bad row."""
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
    """One example a row.

    Args:
        task: the task.
        table: rows in the hub's columns.
        template: prompt instead of the task's.
        verbalizers: label -> word instead of the task's.
        is_labelled: whether to read the labels; otherwise the first candidate is gold.

    Raises:
        UserError: for missing columns, or bad rows (all of them named).
    """
    template = task.template if template is None else template
    require_columns(table, task.columns, f"These rows must have the columns of {task.hub}")
    label = next((c for c in task.labels if c in table.rows[0][1]), task.labels[0])
    if is_labelled:
        require_columns(table, [label], f"These rows must have the columns of {task.hub}")
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
    """The candidates of a task with classes; empty for a choice task.

    Raises:
        UserError: for verbalizers that do not name each class once.
    """
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
    """Place of a label: a class's name, its number, or true and false for 1 and 0.

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
    """A text, or a number as text; raises ValueError."""
    value: Any = row.get(column)
    if hasattr(value, "item"):  # numpy scalars of parquet
        value = value.item()
    is_number = isinstance(value, int) and not isinstance(value, bool)
    return str(value) if is_number else text_in(dict(row), column)
