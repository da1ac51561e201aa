"""Reads the rows of a data file. A file that could be read in two ways is refused.

    text      UTF-8 or UTF-16, told by the mark at the beginning; without a mark UTF-8
    csv       quotes as in RFC 4180; every row has as many fields as the header
    tsv       one row a line. Quotes are part of the text, as in GLUE's files, unless every field
              that holds a quote is quoted as a whole, as spreadsheets write it.
    json      jsonl and ndjson: one object a line; json: one list of objects
    parquet   as pandas reads it

A file may have 2 GiB, and parquet as much after decompression.

A row is a pair of its number and its values. The number is the line of jsonl files, and otherwise
counts the rows from 1. Messages on csv and tsv name the line.
"""

from __future__ import annotations

import codecs
import csv
import io
import json
import re
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, Final

from zofo.disk.files import read_bytes, require_regular
from zofo.disk.plain import unique_keys
from zofo.errors import UserError

MAX_BYTES: Final = 1 << 31
"""Choice: the rows of a larger file would fill the memory of most machines."""
MAX_ROWS: Final = 1 << 26
"""Choice: a parquet file of a few bytes can repeat one row endlessly."""
Rows = list[tuple[int, dict[str, Any]]]

_MARKS: Final = {
    codecs.BOM_UTF8: "utf-8-sig",
    codecs.BOM_UTF16_LE: "utf-16",
    codecs.BOM_UTF16_BE: "utf-16",
}
_SEPARATORS: Final = {",": "commas", "\t": "tabs", ";": "semicolons", "|": "vertical bars"}
_QUOTED_LINE: Final = re.compile(r'(?:"(?:[^"]|"")*"|[^"\t]*)(?:\t(?:"(?:[^"]|"")*"|[^"\t]*))*')


def _text_of(path: Path) -> str:
    """The text of a file; raises UserError for another encoding than UTF-8 and UTF-16."""
    data = read_bytes(path, max_bytes=MAX_BYTES)
    encoding = next((name for mark, name in _MARKS.items() if data.startswith(mark)), "utf-8")
    try:
        text = data.decode(encoding)
    except UnicodeDecodeError as error:
        before = error.object[: error.start].decode(encoding, "replace")
        problem = f"the byte 0x{error.object[error.start]:02x}, which is not {encoding}"
        guess = "WINDOWS-1252"
    else:
        before, mark, _ = text.partition("\0")
        if not mark:
            return text
        problem, guess = "a zero byte, which no text holds", "UTF-16LE"
    raise UserError(
        f"{path}, line {before.count(chr(10)) + 1}: holds {problem}; save the file as UTF-8. If it "
        f"is {guess}, this does it: iconv -f {guess} -t UTF-8 {path.name} > utf8-{path.name}"
    )


def _read_jsonl(path: Path) -> Rows:
    rows = []
    # Only line feeds end a line: splitlines() also splits at characters that JSON texts may hold.
    for number, line in enumerate(_text_of(path).split("\n"), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line, object_pairs_hook=unique_keys)
        except (ValueError, RecursionError) as error:
            raise UserError(
                f"{path}, row {number}: not valid JSON ({error}); a jsonl file has one object a "
                "line, and a list of objects belongs into a .json file"
            ) from error
        if not isinstance(row, dict):
            raise UserError(
                f"{path}, row {number}: must be an object such as {{'text': ...}}; a list of "
                "objects belongs into a .json file"
            )
        rows.append((number, row))
    return rows


def _read_json(path: Path) -> Rows:
    remedy = "must be a list of objects; for one object a line name the file .jsonl"
    text = _text_of(path)
    try:
        value = json.loads(text, object_pairs_hook=unique_keys)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: not valid JSON ({error}); it {remedy}") from error
    if not isinstance(value, list) or not all(isinstance(row, dict) for row in value):
        raise UserError(f"{path} {remedy}")
    return list(enumerate(value, start=1))


def _read_csv(path: Path) -> Rows:
    text = _text_of(path)
    _allow_long_fields(text)
    reader = csv.reader(io.StringIO(text, newline=""), strict=True)

    def lines() -> Iterator[tuple[int, list[str]]]:
        while True:
            number = reader.line_num + 1
            try:
                yield number, next(reader)
            except StopIteration:
                return
            except csv.Error as error:
                raise UserError(
                    f"{path}, the row at line {number}: {error}; quote a whole field that holds a "
                    "quotation mark, and double each mark inside it"
                ) from error

    rows = _with_header(path, lines(), ",", "quote a field that holds a comma")
    _refuse_swallowed(path, rows)
    return rows


def _refuse_swallowed(path: Path, rows: Rows) -> None:
    """Raise UserError if a quotation that was never meant to be one holds whole rows.

    That is sure if each line in it would be a row with a label of the other rows: a text with line
    breaks has none.
    """
    broken = [(n, row) for n, row in rows if any("\n" in value for value in row.values())]
    if not broken:
        return
    numbers = {number for number, _ in broken}
    known = {column: {row[column] for n, row in rows if n not in numbers} for column in rows[0][1]}
    for number, row in broken:
        fields = list(row.values())
        at = next(i for i, value in enumerate(fields) if "\n" in value)
        lines = [line.split(",") for line in fields[at].splitlines()]
        lines[0], lines[-1] = fields[:at] + lines[0], lines[-1] + fields[at + 1 :]
        are_rows = all(len(line) == len(row) for line in lines)
        others = [i for i in range(len(row)) if i != at]
        columns = list(known.values())
        if are_rows and any(all(line[i] in columns[i] for line in lines) for i in others):
            raise UserError(
                f"{path}, row {number}: a quotation mark opens a text of {len(lines)} lines, and "
                "each of them looks like a row; double each quotation mark inside a text and "
                "quote the whole text, or save the file as .tsv or .jsonl"
            )


def _read_tsv(path: Path) -> Rows:
    text = _text_of(path)
    lines = re.split("\r\n|\n|\r", text)
    with_quotes = [line for line in lines if '"' in line]
    if all(map(_QUOTED_LINE.fullmatch, with_quotes)):
        _allow_long_fields(text)
        fields: Iterable[list[str]] = csv.reader(lines, delimiter="\t", strict=True)
    else:
        fields = (line.split("\t") if line else [] for line in lines)
    remedy = "a row is one line, so write tabs and line breaks in a text as blanks, or use jsonl"
    return _with_header(path, enumerate(fields, start=1), "\t", remedy)


def _allow_long_fields(text: str) -> None:
    # The limit of the module guards streams. This text is in memory already.
    csv.field_size_limit(max(csv.field_size_limit(), len(text)))


def _with_header(
    path: Path, lines: Iterator[tuple[int, list[str]]], separator: str, remedy: str
) -> Rows:
    """The rows below the header; raises UserError if a row has not as many fields as the header."""
    filled = ((number, line) for number, line in lines if line)
    start, header = next(filled, (1, []))
    other = next((s for s in _SEPARATORS if len(header) == 1 and s in header[0]), None)
    if other is not None:
        raise UserError(
            f"{path}, line {start}: the fields seem to be separated by {_SEPARATORS[other]}; a "
            f"{path.suffix} file has {_SEPARATORS[separator]} there, so save it with these"
        )
    twice = {name for name in header if name and header.count(name) > 1}
    if twice:
        raise UserError(
            f"{path}, line {start}: {min(twice)!r} names two columns; rename or remove one"
        )
    rows: Rows = []
    for number, line in filled:
        if len(line) != len(header):
            raise UserError(
                f"{path}, the row at line {number}: the number of its fields is {len(line)}, and "
                f"that of the header {len(header)}; {remedy}"
            )
        rows.append((len(rows) + 1, dict(zip(header, line, strict=True))))
    return rows


def _read_parquet(path: Path) -> Rows:
    import pandas as pd
    from pyarrow.parquet import ParquetFile

    size = require_regular(path)
    with ParquetFile(path) as file:
        about = file.metadata
        sizes = (about.row_group(i).total_byte_size for i in range(about.num_row_groups))
        if max(size, sum(sizes)) > MAX_BYTES or about.num_rows > MAX_ROWS:
            raise UserError(
                f"{path} holds more than {MAX_BYTES} bytes or {MAX_ROWS} rows; split it, and train "
                "on a part"
            )
    records = pd.read_parquet(path).to_dict("records")
    return [(i, {str(k): v for k, v in row.items()}) for i, row in enumerate(records, start=1)]


READERS: Final[dict[str, Callable[[Path], Rows]]] = {
    ".jsonl": _read_jsonl,
    ".ndjson": _read_jsonl,
    ".json": _read_json,
    ".csv": _read_csv,
    ".tsv": _read_tsv,
    ".parquet": _read_parquet,
}
SUFFIXES: Final = tuple(READERS)
