"""Check the files of a local model folder before transformers opens any of them.

transformers opens whatever lies under the names that it knows. A pipe would make it wait, a device
would fill the memory, and an index could name a file outside the folder.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Final

from zofo.disk.files import read_json_object, require_regular
from zofo.disk.folders import difference_from_list
from zofo.errors import UserError, shown

MAX_BYTES: Final = 1 << 28
"""Choice: eight times the largest tokenizer file that we know."""
_WEIGHTS: Final = (".safetensors", ".bin", ".pt", ".pth", ".gguf", ".h5", ".msgpack", ".onnx")
_INDICES: Final = ("model.safetensors.index.json", "pytorch_model.bin.index.json")


def check_model_folder(folder: Path) -> None:
    """Check that the files are regular, are not too large, and name no file outside the folder.

    Raises:
        UserError: for the first file that is not so.
    """
    for path in sorted(folder.iterdir()):
        if path.name.startswith(".") or path.is_dir():
            continue
        size = require_regular(path)
        if size > MAX_BYTES and path.suffix not in _WEIGHTS:
            raise UserError(f"{path} is larger than {MAX_BYTES} bytes; copy it again, or remove it")
    for name in _INDICES:
        if (folder / name).exists():
            _ = files_in_index(folder / name)


def check_digests(folder: Path) -> None:
    """Compare a folder with the list of its files, if zofo has written one.

    Raises:
        UserError: if a file was altered, lost or added.
    """
    difference = difference_from_list(folder)
    if difference is not None:
        raise UserError(f"{folder} is not as zofo wrote it: {difference}; export or copy it again")


def files_in_index(index: Path) -> set[str]:
    """The files that an index of weights names.

    Raises:
        UserError: if it is damaged or names anything but files of its own folder.
    """
    places = read_json_object(index, max_bytes=MAX_BYTES).get("weight_map")
    files: list[Any] = list(places.values()) if isinstance(places, dict) else [None]
    wrong = [file for file in files if not _is_name(file)]
    if wrong:
        raise UserError(
            f"{index} is damaged: it names {shown(wrong[0])}, which is no file of this folder; "
            "copy the folder again"
        )
    return set(files)


def _is_name(value: Any) -> bool:
    """Whether the value names a file without naming a folder."""
    return isinstance(value, str) and value not in ("", "..") and Path(value).name == value
