"""Rows from files and from the hub. Bad rows are reported by their numbers.

`zofo.tasks.files` reads the formats. Text must be Unicode that can be written again, so half of a
surrogate pair is refused wherever it stands in a row. So are very long texts and deep nesting.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, TypeVar

from zofo.disk.files import refusing, require_regular
from zofo.disk.plain import MAX_DEPTH
from zofo.errors import UserError, shown
from zofo.tasks.files import READERS, SUFFIXES
from zofo.tasks.reasoning import generated_rows, is_generated

MAX_TEXT: Final = 1 << 22
"""Choice: characters of one text of a row; no model reads a tenth of it."""
_MAX_REPORTED: Final = 5
T = TypeVar("T")


@dataclass(frozen=True)
class Table:
    """Rows and where they came from.

    Attributes:
        rows: (number from 1, column -> value).
        source: name of the source, for messages.
        label_names: column -> names of its classes, if the source declares them.
    """

    rows: list[tuple[int, dict[str, Any]]]
    source: str
    label_names: dict[str, list[str]]

    def __post_init__(self) -> None:
        """Raises UserError if a row holds what no later step could handle."""
        convert_rows(self, lambda _, row: _check_value(row))


def read_table(source: str, *, subset: str | None = None, split: str = "train") -> Table:
    """Read a file by its suffix, a generator of reasoning-gym, or a split of a hub dataset.

    Raises:
        UserError: if the source is missing, cannot be read, or a file has no rows.
    """
    if is_generated(source):
        return Table(generated_rows(source), source, {})
    path = Path(source).expanduser()
    suffix = path.suffix.lower()
    if suffix in SUFFIXES:
        try:
            require_regular(path)
        except UserError as error:
            raise UserError(f"the data file {error}") from None
        with refusing(f"the data file {source} cannot be read", "write it again"):
            table = Table(READERS[suffix](path), source, {})
        if not table.rows:
            raise UserError(f"the data file {source} has no rows")
        return table
    if path.exists():
        raise UserError(
            f"the data {source} must be a file that ends in one of {', '.join(SUFFIXES)}"
        )
    return _hub_table(source, subset, split)


def _hub_table(source: str, subset: str | None, split: str) -> Table:
    import datasets

    try:
        data = _load_hub(source, subset, split)
    except Exception as error:  # datasets raises errors of its own and of every transport
        first = str(error).strip().splitlines()[0] if str(error).strip() else repr(error)
        raise UserError(
            f"the dataset {source!r} (split {split}) cannot be loaded: {first}. Give a file that "
            f"ends in one of {', '.join(SUFFIXES)} (for a built-in task task.data_dir, a folder of "
            "such files), or a hub dataset id that this machine reaches"
        ) from error
    names = {
        column: list(feature.names)
        for column, feature in data.features.items()
        if isinstance(feature, datasets.ClassLabel)
    }
    return Table(list(enumerate(data, start=1)), f"{source} ({split})", names)


def _load_hub(source: str, subset: str | None, split: str) -> Any:
    """Load a split; for a script dataset, which `datasets` refuses, load the hub's parquet copy."""
    import datasets

    try:
        return datasets.load_dataset(source, subset, split=split)
    except RuntimeError as error:
        if "scripts are no longer supported" not in str(error):
            raise
    folder = f"hf://datasets/{source}@refs/convert/parquet/{subset or 'default'}/{split}"
    return datasets.load_dataset("parquet", data_files=f"{folder}/*.parquet", split="train")


def require_columns(table: Table, columns: Sequence[str], remedy: str) -> None:
    """Raises UserError if the first row lacks a column."""
    present = table.rows[0][1]
    missing = [column for column in columns if column not in present]
    if missing:
        raise UserError(
            f"{table.source} has no column {', '.join(map(repr, missing))}; its columns are "
            f"{', '.join(map(repr, present))}. {remedy}"
        )


def convert_rows(table: Table, convert: Callable[[int, dict[str, Any]], T]) -> list[T]:
    """Convert every row; all rows that fail are reported together.

    Args:
        table: the rows.
        convert: (row number, row) -> anything; raises ValueError with a remedy.

    Raises:
        UserError: naming the first few rows and how many there are.
    """
    converted, problems = [], []
    for number, row in table.rows:
        try:
            converted.append(convert(number, row))
        except ValueError as error:
            problems.append(f"row {number}: {error}")
    if problems:
        shown = "\n  ".join(problems[:_MAX_REPORTED])
        more = len(problems) - _MAX_REPORTED
        rest = f"\n  and {more} more rows" if more > 0 else ""
        raise UserError(f"{table.source}:\n  {shown}{rest}")
    return converted


def text_in(row: Mapping[str, Any], column: str) -> str:
    """The non-empty text of a column; raises ValueError."""
    value = value_in(row, column)
    if not value.strip():
        raise ValueError(f"{column!r} is empty; fill it or remove the row")
    return value


def value_in(row: Mapping[str, Any], column: str) -> str:
    """The text of a column, which may be empty; raises ValueError."""
    if column not in row:
        raise ValueError(f"the column {column!r} is missing; every row needs it")
    value = row[column]
    if not isinstance(value, str):
        is_list = isinstance(value, list)
        remedy = "choose task chat for messages" if is_list else "write one text in quotes"
        raise ValueError(f"{column!r} is {shown(value)}, not a text; {remedy}")
    return value


def _check_value(value: Any, column: str = "", depth: int = 0) -> None:
    """Raises ValueError for a text that is too long or cannot be encoded, and for deep nesting."""
    if isinstance(value, str):
        if len(value) > MAX_TEXT:
            raise ValueError(
                f"{column!r} holds a text of {len(value)} characters; {MAX_TEXT} are the limit, so "
                "shorten it or remove the row"
            )
        try:
            value.encode()
        except UnicodeEncodeError as error:
            raise ValueError(
                f"{column!r} holds {value[error.start]!r}, half of a surrogate pair, which no text "
                "can be written with; write the whole character or remove it"
            ) from None
    elif depth > MAX_DEPTH:
        raise ValueError(
            f"{column!r} is nested more than {MAX_DEPTH} deep; flatten it or remove the row"
        )
    elif isinstance(value, Mapping):
        for key, inner in value.items():
            _check_value(key, column or ascii(key))
            _check_value(inner, column or str(key), depth + 1)
    elif isinstance(value, list | tuple):
        for inner in value:
            _check_value(inner, column, depth + 1)
