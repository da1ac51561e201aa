"""The lines of a log of a run, as far as they can be read."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from zofo.disk.files import MAX_LOG_BYTES, parse_json, read_text
from zofo.errors import UserError


def log_lines(path: Path) -> Iterator[dict[str, Any]]:
    """The entries of a log that can be read; the last may be incomplete."""
    try:
        text = read_text(path, max_bytes=MAX_LOG_BYTES, errors="replace")
    except UserError:
        return
    for line in text.split("\n"):  # splitlines would also split at U+2028, which JSON may contain.
        try:
            entry = parse_json(line, has_nan=True)
        except ValueError:  # an incomplete line, or one that zofo did not write
            continue
        if isinstance(entry, dict):
            yield entry


def number_of(value: Any) -> float | None:
    """The value if it is a finite number, else None; a diverged run logs "nan"."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    return float(value) if math.isfinite(value) else None
