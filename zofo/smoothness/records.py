"""Measurements as they are made: JSON lines, one a measurement, none made twice.

A measurement is told by its kind, the step it was made at and, where it is of one, its block. What
a killed process leaves is a last line that is cut short: it is dropped and measured again.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from zofo.disk.files import write_text
from zofo.errors import UserError

Key = tuple[str, int, str]


class Records:
    """Measurements in memory and, if a path is given, on disk.

    Args:
        path: of the file; None: in memory only.

    Raises:
        UserError: if the file holds something else, or cannot be written.
    """

    def __init__(self, path: Path | None = None) -> None:
        self.path = path
        self._found: dict[Key, dict[str, Any]] = {}
        if path is not None and path.exists():
            self._read(path)

    def all(self) -> list[dict[str, Any]]:
        """Every measurement, as made."""
        return list(self._found.values())

    def of(self, kind: str) -> list[dict[str, Any]]:
        """Those of a kind, by step."""
        return sorted((r for r in self.all() if r["kind"] == kind), key=lambda r: r["step"])

    def has(self, kind: str, step: int, block: str = "") -> bool:
        """Whether it was made."""
        return (kind, step, block) in self._found

    def add(self, record: Mapping[str, Any]) -> None:
        """Keep a measurement; numbers that are not finite become null.

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
                f"cannot write {self.path}: {error.strerror or error}; free space and measure "
                "again: what is in the file is kept"
            ) from error

    def _read(self, path: Path) -> None:
        lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
        for i, line in enumerate(lines):
            try:
                record = json.loads(line)
                key = _key(record)
            except (ValueError, TypeError, KeyError):
                if i == len(lines) - 1:
                    break
                raise UserError(
                    f"line {i + 1} of {path} is no measurement; move the file away to begin anew"
                ) from None
            self._found[key] = record
        kept = (json.dumps(r, ensure_ascii=False) + "\n" for r in self._found.values())
        write_text(path, "".join(kept))


def finite(value: Any) -> Any:
    """The value with null for every number that is not finite, which JSON does not have."""
    if isinstance(value, Mapping):
        return {str(k): finite(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [finite(v) for v in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def _key(record: Mapping[str, Any]) -> Key:
    return str(record["kind"]), int(record["step"]), str(record.get("block", ""))
