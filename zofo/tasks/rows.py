"""Reads rows from files and from the hub, and reports bad rows by their numbers."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, TypeVar

from zofo.errors import UserError

SUFFIXES: Final = (".jsonl", ".ndjson", ".json", ".csv", ".tsv", ".parquet")
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


def read_table(source: str, *, subset: str | None = None, split: str = "train") -> Table:
    """Read a file by its suffix, or a split of a hub dataset.

    Raises:
        UserError: if the source is missing, cannot be read, or a file has no rows.
    """
    path = Path(source).expanduser()
    suffix = path.suffix.lower()
    if suffix in SUFFIXES:
        if not path.is_file():
            raise UserError(f"the data file {source} does not exist")
        try:
            rows = _READERS[suffix](path)
        except UserError:  # a ValueError, too, that already names the file
            raise
        except (OSError, ValueError) as error:
            raise UserError(f"the data file {source} cannot be read: {error}") from error
        if not rows:
            raise UserError(f"the data file {source} has no rows")
        return Table(rows, source, {})
    if path.exists():
        raise UserError(
            f"the data {source} must be a file that ends in one of {', '.join(SUFFIXES)}"
        )
    return _hub_table(source, subset, split)


def _read_jsonl(path: Path) -> list[tuple[int, dict[str, Any]]]:
    rows = []
    with path.open(encoding="utf-8") as file:
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except json.JSONDecodeError as error:
                raise UserError(
                    f"{path}, row {number}: not valid JSON ({error}); a jsonl file has one object "
                    "a line"
                ) from error
            if not isinstance(row, dict):
                raise UserError(f"{path}, row {number}: must be an object such as {{'text': ...}}")
            rows.append((number, row))
    return rows


def _read_json(path: Path) -> list[tuple[int, dict[str, Any]]]:
    value = json.loads(path.read_text(encoding="utf-8"))
    if not isinstance(value, list) or not all(isinstance(row, dict) for row in value):
        raise UserError(f"{path} must be a list of objects; for one object a line use .jsonl")
    return list(enumerate(value, start=1))


def _read_separated(path: Path) -> list[tuple[int, dict[str, Any]]]:
    import pandas as pd

    separator = "\t" if path.suffix.lower() == ".tsv" else ","
    try:
        # Everything is read as text, so that a label such as 01 or NA keeps its form.
        frame = pd.read_csv(path, sep=separator, dtype=str, keep_default_na=False)
    except pd.errors.ParserError as error:
        raise UserError(
            f"{path}: {str(error).strip()}; quote values that hold the separator"
        ) from error
    return _numbered(frame.to_dict("records"))


def _read_parquet(path: Path) -> list[tuple[int, dict[str, Any]]]:
    import pandas as pd

    return _numbered(pd.read_parquet(path).to_dict("records"))


def _numbered(records: Iterable[dict[Any, Any]]) -> list[tuple[int, dict[str, Any]]]:
    return [(i, {str(k): v for k, v in row.items()}) for i, row in enumerate(records, start=1)]


_READERS: Final[dict[str, Callable[[Path], list[tuple[int, dict[str, Any]]]]]] = {
    ".jsonl": _read_jsonl,
    ".ndjson": _read_jsonl,
    ".json": _read_json,
    ".csv": _read_separated,
    ".tsv": _read_separated,
    ".parquet": _read_parquet,
}


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
    if column not in row:
        raise ValueError(f"the column {column!r} is missing; every row needs it")
    value = row[column]
    if not isinstance(value, str):
        raise ValueError(f"{column!r} is {value!r}, not a text; write it in quotes")
    if not value.strip():
        raise ValueError(f"{column!r} is empty; fill it or remove the row")
    return value


def label_in(row: Mapping[str, Any], column: str) -> str:
    """The label of a row as text; raises ValueError."""
    value = row.get(column)
    if isinstance(value, bool):
        return "true" if value else "false"
    # pandas reads integers with missing values as floats, so 1.0 and 1 are the same label.
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    if value is None or (isinstance(value, float) and math.isnan(value)) or str(value) == "":
        raise ValueError(f"{column!r} is empty; fill it or remove the row")
    if hasattr(value, "item"):  # numpy scalars of parquet
        value = value.item()
    return str(value)
