"""Digests of a run's rows, by which they are found again in data that has changed since.

    row     digest of the text and the label, of prompt and completion, or of the messages
    text    digest of the text without case and blanks, by which duplicates are found

The artefact and every checkpoint keep both for each row of train, dev and test, in order: 16 bytes
a row. Neither depends on the file's format, the template, or the order of the classes.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final

import torch

from zofo.disk.files import read_tensors, write_tensors
from zofo.errors import UserError
from zofo.tasks.spec import Example, Splits
from zofo.tasks.splits import key_of

ROWS_FILE: Final = "rows.safetensors"
PARTS: Final = ("train", "dev", "test")


@dataclass(frozen=True)
class RowDigests:
    """The rows of a run.

    Attributes:
        parts: "train", "dev" and "test" -> digest of the row, and of its text, for each row.
    """

    parts: Mapping[str, tuple[tuple[int, int], ...]]

    @classmethod
    def of(cls, splits: Splits) -> RowDigests:
        """The digests of a task's rows."""
        return cls({part: _digests(splits.part(part), splits.labels) for part in PARTS})

    def save(self, folder: Path) -> None:
        """Write the file of an artefact or of a checkpoint."""
        tensors = {
            part: torch.tensor(rows, dtype=torch.int64).reshape(-1, 2)
            for part, rows in self.parts.items()
        }
        write_tensors(folder / ROWS_FILE, tensors, {"format": "1"})

    @classmethod
    def load(cls, folder: Path) -> RowDigests | None:
        """Read the file; None if there is none, as in folders of older versions.

        Raises:
            UserError: if it is damaged.
        """
        path = folder / ROWS_FILE
        if not path.exists():
            return None
        tensors, _ = read_tensors(path)
        is_sound = tensors.keys() == set(PARTS) and all(
            t.dtype == torch.int64 and t.ndim == 2 and t.shape[1] == 2 for t in tensors.values()
        )
        if not is_sound:
            raise UserError(f"{path} is damaged; copy the folder again")
        return cls({part: tuple(map(tuple, tensors[part].tolist())) for part in PARTS})

    def texts(self, *parts: str) -> set[int]:
        """The digests of the texts of some parts."""
        return {text for part in parts for _, text in self.parts[part]}

    def find(self, rows: Sequence[Any], now: Splits) -> Splits:
        """The splits of the run, of the rows that are still there.

        Args:
            rows: all rows of the task now.
            now: the task's splits now, for its kind, classes and notes.
        """
        digests = _digests(rows, now.labels)
        # The first of equal rows counts.
        place = {row: i for i, (row, _) in reversed(list(enumerate(digests)))}
        texts, used = {text for _, text in digests}, set[int]()
        parts: dict[str, Any] = {}
        lost = []
        for part, recorded in self.parts.items():
            parts[part] = tuple(rows[place[row]] for row, _ in recorded if row in place)
            used |= {row for row, _ in recorded}
            gone = [text for row, text in recorded if row not in place]
            changed = sum(text in texts for text in gone)
            of = f"of {len(recorded)} {part} rows"
            if len(gone) > changed:
                lost.append(f"{len(gone) - changed} {of} missing")
            if changed:
                lost.append(f"{changed} {of} with another label or spelling")
        others = sum(row not in used for row, _ in digests)
        changes = "the data has changed since the run began, so its rows are found by their digests"
        if others:
            changes += f"; {others} other rows, which are new or were not used, are left out"
        changes = "; ".join((changes, *lost))
        notes = (*now.notes, changes)
        return replace(now, **parts, notes=notes, changes=changes, lost=", ".join(lost))


def text_digest(row: Any) -> int:
    """The digest of a row's text without case and blanks."""
    return _hash(key_of(row))


def _digests(rows: Iterable[Any], labels: Sequence[str]) -> tuple[tuple[int, int], ...]:
    return tuple((_hash([row.text, _answer(row, labels)]), text_digest(row)) for row in rows)


def _answer(row: Any, labels: Sequence[str]) -> Any:
    """What the model shall learn of a row, unless its text already holds it."""
    if isinstance(row, Example):
        return labels[row.gold] if labels else row.gold
    learnt = () if row.is_rendered else [text for text, is_learnt in row.segments if is_learnt]
    return [learnt, row.answers and row.answers.gold]


def _hash(value: Any) -> int:
    digest = hashlib.blake2b(json.dumps(value).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little", signed=True)
