"""Whether the files of a run folder belong to the same run.

    result.json    files: digests of run.yaml, base.json, metrics.jsonl, artifact/zofo.json and,
                   where the run has them, advise.json, modules.json and stopped.json
    study.json     files: digest of run.yaml

A run writes `result.json` last, and its study writes `study.json` after that. Records of older
versions have no digests, so method and seed are compared as well. The digests detect mixed-up
folders and changes by hand. They are no signature.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any, Final

from zofo.disk.files import file_digest, read_json
from zofo.disk.yaml import read_yaml
from zofo.errors import UserError, shown

CONFIG: Final = "run.yaml"
RESULT: Final = "result.json"
STUDY: Final = "study.json"
HEADER: Final = "artifact/zofo.json"
SEALED: Final = (
    CONFIG,
    "base.json",
    "metrics.jsonl",
    HEADER,
    "advise.json",
    "modules.json",
    "stopped.json",
)
"""Files of a run that do not change once its result is written."""


def digests_of(folder: Path, names: Iterable[str] = SEALED) -> dict[str, str]:
    """Name -> digest of the files that exist, for the key `files` of a record."""
    return {name: file_digest(folder / name) for name in names if (folder / name).is_file()}


def mixed_up(folder: Path) -> str | None:
    """How the files of a run folder belong to different runs, in words; None if they do not.

    What is missing or cannot be read is left to those who read it.
    """
    try:
        digests, config = digests_of(folder), read_yaml(folder / CONFIG)
    except UserError:
        return None
    for record in (RESULT, STUDY):
        known = _read(folder / record).get("files")
        for name, digest in digests.items():
            if isinstance(known, dict) and known.get(name, digest) != digest:
                return _problem(folder / name, f"its digest differs from the one in {record}")
            if record == RESULT and isinstance(known, dict) and name not in known:
                return _problem(folder / name, f"{record} does not name it")
    header, result, study = (_read(folder / name) for name in (HEADER, RESULT, STUDY))
    base, cell = header.get("base"), study.get("cell")
    method = cell.get("method") if isinstance(cell, dict) else None
    found = [
        (HEADER, "method", header.get("method")),
        (HEADER, "seed", base.get("seed") if isinstance(base, dict) else None),
        (RESULT, "method", result.get("method")),
        (RESULT, "seed", result.get("seed")),
        (STUDY, "method", str(method).removesuffix("-tied") if method else None),
        (STUDY, "seed", study.get("seed")),
    ]
    for name, key, value in found:
        if value is not None and key in config and value != config[key]:
            differs = f"its {key} is {shown(value)}, and {shown(config[key])} in {CONFIG}"
            return _problem(folder / name, differs)
    return None


def _problem(path: Path, why: str) -> str:
    return f"{path} was changed or belongs to another run ({why}); put the run's own file back"


def _read(path: Path) -> dict[str, Any]:
    try:
        value = read_json(path)
    except UserError:
        return {}
    return value if isinstance(value, dict) else {}
