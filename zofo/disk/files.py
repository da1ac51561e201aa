"""Files that are written whole or not at all, and never as pickles."""

from __future__ import annotations

import hashlib
import json
import math
import os
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final, NoReturn

import torch
from torch import Tensor

from zofo.errors import UserError

_MAX_JSON_BYTES: Final = 1 << 24
"""Far beyond what any file of ours takes."""


@contextmanager
def refusing(problem: str, remedy: str = "copy it again") -> Iterator[None]:
    """Turn whatever another library raises on a damaged or hostile file into a `UserError`.

    Args:
        problem: how the message begins, such as "FILE is damaged".
        remedy: how it ends.

    Raises:
        UserError: for any exception but Ctrl-C and the like.
    """
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        said = " ".join(str(error).split())[:200]
        detail = f"{type(error).__name__}: {said}" if said else type(error).__name__
        raise UserError(f"{problem} ({detail}); {remedy}") from error


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A temporary file beside `path` that takes its place when the block ends well.

    Raises:
        UserError: if the folder cannot be written.
    """
    temporary: Path | None = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
        os.close(handle)
        temporary = Path(name)
        yield temporary
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        temporary.chmod(0o644)
        temporary.replace(path)
    except OSError as error:
        raise UserError(
            f"cannot write {path}: {error.strerror or error}; nothing was changed there. Free "
            "space or choose a folder that can be written"
        ) from error
    finally:
        if temporary is not None:
            temporary.unlink(missing_ok=True)


def problem_of_target(path: Path, *, is_folder: bool = False) -> str | None:
    """Why nothing could be written there, so that it can be said before any work; None if it can.

    Args:
        path: of a file that is to be written, or of a folder; neither need exist.
        is_folder: whether it is a folder.
    """
    there = path
    try:
        if is_folder and path.is_file():
            return f"{path} is a file; name a folder"
        if not is_folder and path.is_dir():
            return f"{path} is a folder; name a file"
        candidates = [path.absolute(), *path.absolute().parents][0 if is_folder else 1 :]
        there = next(folder for folder in candidates if folder.exists())
        with tempfile.TemporaryFile(dir=there):
            return None
    except NotADirectoryError:
        return f"{path} cannot be written, since {there} is a file; choose another folder"
    except OSError as error:
        reason = error.strerror or error
        return f"{path} cannot be written in {there} ({reason}); choose another folder"


def write_text(path: Path, text: str) -> None:
    """Write a text file whole or not at all."""
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: Path, value: Any) -> None:
    """Write JSON whole or not at all."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def finite(value: Any) -> Any:
    """A copy of the value with None for each infinite or undefined number, for JSON."""
    if isinstance(value, Mapping):
        return {str(key): finite(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [finite(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def read_json(path: Path) -> Any:
    """Read JSON as the standard has it: without NaN and infinities.

    Raises:
        UserError: if it is missing, damaged, or too large to be a file of ours.
    """
    if not path.is_file():
        raise UserError(f"{path} does not exist")
    with refusing(f"{path} is damaged"):
        if path.stat().st_size > _MAX_JSON_BYTES:
            raise ValueError(f"larger than {_MAX_JSON_BYTES} bytes")
        return json.loads(path.read_text(encoding="utf-8"), parse_constant=_refuse_constant)


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is no JSON")


def file_digest(path: Path) -> str:
    """Digest of a file's bytes: 32 hex digits.

    Raises:
        UserError: if it cannot be read.
    """
    digest = hashlib.blake2b(digest_size=16)
    with refusing(f"{path} cannot be read"), path.open("rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


def json_digest(value: Any) -> str:
    """Digest of a JSON value, whatever the order of its keys: 32 hex digits."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"))
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


def write_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Write a safetensors file whole or not at all."""
    from safetensors.torch import save_file

    with replacing(path) as temporary:
        save_file(dict(tensors), temporary, metadata=dict(metadata))


def read_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Read a safetensors file: tensors and metadata.

    Raises:
        UserError: if it is missing or damaged.
    """
    from safetensors import safe_open

    if not path.is_file():
        raise UserError(f"{path} does not exist")
    with refusing(f"{path} is damaged"), safe_open(path, framework="pt") as file:
        return {key: file.get_tensor(key) for key in file.keys()}, file.metadata() or {}  # noqa: SIM118


class StoredTensors(Mapping[str, Tensor]):
    """Tensors in safetensors files, read from the disk each time one is asked for.

    A file that stays mapped keeps every page that was read resident. Each access therefore maps the
    file anew, and its pages go with the tensor: whoever takes one tensor after the other holds one.

    Args:
        places: name -> file, and key of the tensor in it.
        dtypes: name -> dtype in which a tensor is returned; others keep the dtype of the file.
    """

    def __init__(
        self,
        places: Mapping[str, tuple[Path, str]],
        dtypes: Mapping[str, torch.dtype] | None = None,
    ) -> None:
        self._places, self._dtypes = dict(places), dict(dtypes or {})

    def __getitem__(self, name: str) -> Tensor:
        from safetensors import safe_open

        path, key = self._places[name]
        with refusing(f"{path} is damaged"), safe_open(path, framework="pt") as file:
            tensor: Tensor = file.get_tensor(key)
        return tensor.to(self._dtypes.get(name, tensor.dtype))

    def under(self, keys: Mapping[str, str], dtypes: Mapping[str, torch.dtype]) -> StoredTensors:
        """The same tensors under other names (name -> name here), returned in these dtypes."""
        return StoredTensors({name: self._places[keys[name]] for name in keys}, dtypes)

    def __iter__(self) -> Iterator[str]:
        return iter(self._places)

    def __len__(self) -> int:
        return len(self._places)


def open_tensors(*paths: Path) -> tuple[StoredTensors, dict[str, str]]:
    """The tensors of safetensors files, to be read one at a time, and the last file's metadata.

    Raises:
        UserError: if a file is missing or its header is damaged.
    """
    from safetensors import safe_open

    places: dict[str, tuple[Path, str]] = {}
    metadata: dict[str, str] = {}
    for path in paths:
        if not path.is_file():
            raise UserError(f"{path} does not exist")
        with refusing(f"{path} is damaged"), safe_open(path, framework="pt") as file:
            places |= {key: (path, key) for key in file.keys()}  # noqa: SIM118
            metadata = file.metadata() or {}
    return StoredTensors(places), metadata


def fingerprint(
    tensors: Mapping[str, Tensor], *, progress: Callable[[int], None] | None = None
) -> str:
    """Digest of names, dtypes, shapes and bits, whatever the order: 32 hex digits."""
    digest = hashlib.blake2b(digest_size=16)
    for name in sorted(tensors):
        tensor = tensors[name].detach().contiguous()
        digest.update(f"{name}|{tensor.dtype}|{tuple(tensor.shape)}|".encode())
        if tensor.numel():
            digest.update(tensor.cpu().view(-1).view(torch.uint8).numpy().data)
        if progress is not None:
            progress(tensor.numel() * tensor.element_size())
    return digest.hexdigest()
