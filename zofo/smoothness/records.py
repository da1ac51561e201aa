"""Measurements as JSON lines, one line per measurement.

Kind, step and block (if it has one) identify a measurement, so none is made twice. A killed process
may leave an incomplete last line: it is dropped, and the measurement is made again.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import is_dataclass
from pathlib import Path
from typing import Any

from zofo.disk import files
from zofo.errors import UserError
from zofo.statistics.resampling import Interval

Key = tuple[str, int, str]


class Records:
    """Measurements in memory and, if a path is given, in a file.

    Raises:
        UserError: if the file contains anything else, or cannot be written.
    """

    def __init__(self, path: Path | None = None) -> None:
        self.path = path
        self._found: dict[Key, dict[str, Any]] = {}
        if path is not None and path.exists():
            self._read(path)

    def all(self) -> list[dict[str, Any]]:
        """Every measurement, in the order in which they were made."""
        return list(self._found.values())

    def of(self, kind: str) -> list[dict[str, Any]]:
        """The measurements of a kind, ordered by step."""
        return sorted((r for r in self.all() if r["kind"] == kind), key=lambda r: r["step"])

    def has(self, kind: str, step: int, block: str = "") -> bool:
        """Whether this measurement was made."""
        return (kind, step, block) in self._found

    def add(self, record: Mapping[str, Any]) -> None:
        """Add a measurement, in the form that `finite` gives it.

        Raises:
            UserError: if the file cannot be written.
        """
        plain = finite(dict(record))
        self._found[_key(plain)] = plain
        if self.path is None:
            return
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(plain, ensure_ascii=False, allow_nan=False) + "\n")
        except OSError as error:
            raise UserError(
                f"cannot write {self.path}: {error.strerror or error}; free space and start "
                "again, which keeps the measurements in the file"
            ) from error

    def _read(self, path: Path) -> None:
        text = files.read_text(path, max_bytes=files.MAX_LOG_BYTES, errors="replace")
        lines = text.splitlines()
        for i, line in enumerate(lines):
            try:
                record = files.parse_json(line)
                key = _key(record)
            except (ValueError, TypeError, KeyError):
                if i == len(lines) - 1:
                    break
                raise UserError(
                    f"line {i + 1} of {path} is not a measurement; move the file away to start anew"
                ) from None
            self._found[key] = record
        kept = (json.dumps(r, ensure_ascii=False) + "\n" for r in self._found.values())
        # Without this the next line would be appended to an incomplete last line.
        files.write_text(path, "".join(kept))


def finite(value: Any) -> Any:
    """Plain values for JSON. Infinite and undefined numbers become None."""
    if is_dataclass(value):
        value = value.as_dict() if isinstance(value, Interval) else vars(value)
    if isinstance(value, Mapping):
        return {str(k): finite(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [finite(v) for v in value]
    return files.finite(value)


def _key(record: Mapping[str, Any]) -> Key:
    return str(record["kind"]), int(record["step"]), str(record.get("block", ""))
