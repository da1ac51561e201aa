"""Digests of files that must stay as zofo has written them, in one file of a folder above them.

    zofo_digests.json    path in the folder -> digests of the last two contents of the file

A digest is recorded before its content is written. A kill in between therefore leaves a file with
one of the two. The digests detect damage, mixed-up files and changes by hand. They are no
signature.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from zofo.disk.files import file_digest, json_text, read_json, write_json, write_text
from zofo.disk.locks import take_lock
from zofo.errors import UserError

DIGESTS_FILE: Final = "zofo_digests.json"
_LOCK: Final = "locks/digests"
Digests = Mapping[str, list[str]]


def read_digests(folder: Path) -> Digests:
    """Path in the folder -> digests of what may lie there; empty if none were recorded.

    Raises:
        UserError: if the digests are damaged.
    """
    path = folder / DIGESTS_FILE
    if not path.exists():  # A study of an older version has none.
        return {}
    found = read_json(path)
    if isinstance(found, dict) and all(
        isinstance(known, list) and all(isinstance(d, str) for d in known)
        for known in found.values()
    ):
        return found
    raise UserError(f"{path} is damaged; copy it again, or remove it if all other files are whole")


def alterations(folder: Path, paths: Sequence[Path]) -> list[str]:
    """How files in the folder differ from what was recorded, in words; unrecorded ones do not."""
    found: list[str] = []
    for _ in range(2):  # A process may have written a file after the first reading of the digests.
        digests = read_digests(folder)
        problems = (_alteration(p, digests.get(_name(folder, p))) for p in paths)
        found = [problem for problem in problems if problem is not None]
        if not found:
            break
    return found


def _alteration(path: Path, known: list[str] | None) -> str | None:
    if known is None:
        return None
    try:
        is_known = file_digest(path) in known
    except UserError:
        return f"{path} was recorded, and now is missing or cannot be read"
    return None if is_known else f"{path} was altered after it was recorded"


def _name(folder: Path, path: Path) -> str:
    return path.relative_to(folder).as_posix()


def write_recorded(folder: Path, path: Path, value: Any) -> None:
    """Record the digest of a JSON file in the folder, and write the file."""
    text, name = json_text(value), _name(folder, path)
    digest = hashlib.blake2b(text.encode(), digest_size=16).hexdigest()
    _change(folder, lambda known: {**known, name: [*known.get(name, ())[-1:], digest]})
    write_text(path, text)


def record_files(folder: Path, paths: Iterable[Path]) -> None:
    """Record the digests of files in the folder as they are now."""
    found = {_name(folder, path): [file_digest(path)] for path in paths}
    _change(folder, lambda known: {**known, **found})


def forget_files(folder: Path, place: Path) -> None:
    """Forget the digests of the files below a folder in the folder."""
    prefix = f"{_name(folder, place)}/"
    _change(folder, lambda known: {k: v for k, v in known.items() if not k.startswith(prefix)})


def _change(folder: Path, change: Callable[[Digests], Digests]) -> None:
    (folder / _LOCK).parent.mkdir(exist_ok=True)
    lock = take_lock(folder / _LOCK, wait=True)
    assert lock is not None
    with lock:
        write_json(folder / DIGESTS_FILE, change(read_digests(folder)))
