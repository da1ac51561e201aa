"""Files that are written whole or not at all, and never as pickles, which could run code.

What is read may come from anyone. Therefore only regular files up to a size limit are opened, and
JSON is checked for depth, large integers and invalid text before anything else sees it.
"""

from __future__ import annotations

import errno
import hashlib
import json
import math
import os
import secrets
import stat
import tempfile
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, NoReturn

from zofo.disk.plain import check_plain, unique_keys
from zofo.errors import UserError, shown

if TYPE_CHECKING:  # Rows and configurations are read without the seconds that torch takes.
    import torch
    from torch import Tensor

MAX_TEXT_BYTES: Final = 1 << 24  # far larger than any text file of zofo but a log
MAX_LOG_BYTES: Final = 1 << 26  # of the lines of a long run
_KINDS: Final = {
    stat.S_IFDIR: "a folder",
    stat.S_IFIFO: "a pipe",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
}


@contextmanager
def refusing(problem: str, remedy: str = "copy it again") -> Iterator[None]:
    """Turn every exception that a library raises on a damaged or hostile file into a `UserError`.

    Args:
        problem: beginning of the message, such as "FILE is damaged".
        remedy: end of the message.

    Raises:
        UserError: for any `Exception`; Ctrl-C passes unchanged.
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
    """A temporary file that replaces `path` when the block ends without an error.

    Raises:
        UserError: if the file cannot be written.
    """
    temporary: Path | None = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        # A rename is atomic only within a file system, so the temporary file lies beside `path`.
        name = temporary_prefix(path) + secrets.token_hex(4)
        # Made without mkstemp, because its files are private whatever the umask allows.
        handle = os.open(path.parent / name, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
        temporary = path.parent / name
        mode = os.fstat(handle).st_mode & 0o666
        os.close(handle)
        yield temporary
        # Without the flush, a power cut after the rename could leave an empty file.
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        temporary.chmod(mode)  # safetensors replaces the file by a private one.
        temporary.replace(path)
    except Exception as error:
        reason = reason_of_failed_write(error)
        if reason is None:
            raise
        raise UserError(
            f"cannot write {path}: {reason}; nothing was changed there. Free space or choose a "
            "folder that can be written"
        ) from error
    finally:
        if temporary is not None:
            with suppress(OSError):  # The file that stays is hidden.
                temporary.unlink(missing_ok=True)


def temporary_prefix(path: Path) -> str:
    """How the names of the temporary files of `path` begin; eight characters follow."""
    # Shortened, because a name of the greatest length would leave no room for the characters.
    return f".{path.name[:50]}."


def reason_of_failed_write(error: Exception) -> str | None:
    """The reason of a failed write, in words; None for an error of another kind."""
    if isinstance(error, UserError) and isinstance(error.__cause__, Exception):
        return reason_of_failed_write(error.__cause__)
    if isinstance(error, OSError):
        return error.strerror or str(error)
    # safetensors, tokenizers and torch.save wrap the error of the system in errors of their own.
    text = f"{type(error).__name__}: {error}"
    if "No space left" in text or "os error 28" in text:
        return os.strerror(errno.ENOSPC)
    signs = ("SafetensorError", "PytorchStreamWriter", "iostream error", "unexpected pos", "I/O")
    return text if any(sign in text for sign in signs) else None


def remove_file(path: Path, *, is_needed: bool = True) -> None:
    """Remove a file, if it exists.

    Args:
        path: the file.
        is_needed: whether a file that stays is an error; if not, it is a warning.

    Raises:
        UserError: if it cannot be removed.
    """
    try:
        path.unlink(missing_ok=True)
    except OSError as error:
        problem = (
            f"cannot remove {path}: {error.strerror or error}; make its folder writable, or remove "
            "it by hand"
        )
        if is_needed:
            raise UserError(problem) from error
        warnings.warn(problem, stacklevel=2)


def problem_of_name(path: Path) -> str | None:
    """Why no file can have this path; None if one can, whether or not it exists."""
    try:
        str(path).encode()
        os.lstat(path.expanduser())
    except UnicodeEncodeError:
        return f"{shown(str(path))} is no name in UTF-8; rename it"
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, ValueError, RuntimeError) as error:  # a zero byte; ~USER without a home
        reason = getattr(error, "strerror", None) or str(error).rstrip(".")
        return f"{shown(str(path))} cannot be used ({reason}); choose another name"
    return None


def problem_of_target(path: Path, *, is_folder: bool = False) -> str | None:
    """Why a file, or a folder, cannot be written, for checks before long work; None if it can.

    Neither the path nor the folders above it need to exist.
    """
    problem = problem_of_name(path)
    if problem is not None:
        return problem
    there = path
    try:
        if is_folder and path.is_file():
            return f"{path} is a file; name a folder"
        if not is_folder and path.is_dir():
            return f"{path} is a folder; name a file"
        if path.is_symlink() and not path.exists():
            return f"{path} is a link to {path.readlink()}, which does not exist; remove the link"
        # The nearest existing folder is where a missing path would be made.
        candidates = [path.absolute(), *path.absolute().parents][0 if is_folder else 1 :]
        there = next(folder for folder in candidates if folder.exists())
        with tempfile.TemporaryFile(dir=there):
            return None
    except NotADirectoryError:
        return f"{path} cannot be written, because {there} is a file; choose another folder"
    except OSError as error:
        reason = error.strerror or error
        return f"{path} cannot be written in {there} ({reason}); choose another folder"


def write_text(path: Path, text: str) -> None:
    """Write a text file whole or not at all."""
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: Path, value: Any) -> None:
    """Write JSON whole or not at all."""
    write_text(path, json_text(value))


def json_text(value: Any) -> str:
    """JSON as zofo writes it into files."""
    return json.dumps(value, indent=2, ensure_ascii=False) + "\n"


def finite(value: Any) -> Any:
    """A copy of the value with None for each infinity and NaN, which JSON does not have."""
    if isinstance(value, Mapping):
        return {str(key): finite(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [finite(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def require_regular(path: Path) -> int:
    """Refuse what is no regular file: opening a pipe would wait, and a device may never end.

    Returns:
        The size of the file in bytes.

    Raises:
        UserError: if it does not exist or is anything else.
    """
    try:
        found = path.stat()
    except (FileNotFoundError, NotADirectoryError):
        raise UserError(f"{path} does not exist; check the name, or copy it again") from None
    except (OSError, ValueError) as error:  # a loop of links, or a name that no file can have
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"{path!s:.300} cannot be read ({reason}); choose another file") from error
    if not stat.S_ISREG(found.st_mode):
        kind = _KINDS.get(stat.S_IFMT(found.st_mode), "no regular file")
        raise UserError(f"{path} is {kind}; put a regular file in its place")
    return found.st_size


def read_bytes(path: Path, *, max_bytes: int) -> bytes:
    """Read a regular file of at most `max_bytes`.

    Raises:
        UserError: if it is missing, no regular file, too large or unreadable.
    """
    size = require_regular(path)
    if size <= max_bytes:
        try:
            with path.open("rb") as file:  # Files of the system may hold more than their size.
                content = file.read(max_bytes + 1)
        except OSError as error:
            reason = f"{path} cannot be read ({error.strerror}); check its access"
            raise UserError(reason) from error
        if len(content) <= max_bytes:
            return content
    raise UserError(
        f"{path} is larger than {max_bytes} bytes, which is the limit for such a file; copy it "
        "again, or choose another"
    )


def read_text(path: Path, *, max_bytes: int = MAX_TEXT_BYTES, errors: str = "strict") -> str:
    """Read a text file in UTF-8.

    Args:
        path: the file.
        max_bytes: limit of its size.
        errors: "strict", or "replace" to read invalid bytes as �.

    Raises:
        UserError: if it is missing, no regular file, too large, unreadable or not UTF-8.
    """
    try:
        return read_bytes(path, max_bytes=max_bytes).decode("utf-8", errors)
    except UnicodeDecodeError as error:
        raise UserError(
            f"{path} cannot be read, because byte {error.start} is not UTF-8; save it as UTF-8, or "
            "copy it again"
        ) from None


def read_json(path: Path, *, max_bytes: int = MAX_TEXT_BYTES, has_nan: bool = False) -> Any:
    """Read a JSON file with the limits of `parse_json`.

    Raises:
        UserError: if it is missing, no regular file, damaged, or beyond a limit.
    """
    text = read_text(path, max_bytes=max_bytes)
    with refusing(f"{path} is damaged"):
        return parse_json(text, has_nan=has_nan)


def read_json_object(path: Path, **options: Any) -> dict[str, Any]:
    """As `read_json`, for a file that must hold an object.

    Raises:
        UserError: also if it holds anything else.
    """
    value = read_json(path, **options)
    if not isinstance(value, dict):
        raise UserError(f"{path} is damaged: it holds {shown(value)}, no object; copy it again")
    return value


def parse_json(text: str, *, has_nan: bool = False) -> Any:
    """Parse JSON and check it with `check_plain`.

    Args:
        text: the JSON.
        has_nan: whether NaN and infinities are allowed, which the standard does not have and
            transformers writes.

    Raises:
        ValueError: that says what is wrong.
    """
    try:
        constant = None if has_nan else _refuse_constant
        value = json.loads(text, parse_constant=constant, object_pairs_hook=unique_keys)
    except (RecursionError, MemoryError):
        raise ValueError("it is nested too deeply") from None
    check_plain(value)
    return value


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is no JSON")


def file_digest(path: Path) -> str:
    """BLAKE2b digest of a file's bytes: 32 hex digits.

    Raises:
        UserError: if it cannot be read.
    """
    digest = hashlib.blake2b(digest_size=16)
    require_regular(path)
    with refusing(f"{path} cannot be read"), path.open("rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


def json_digest(value: Any) -> str:
    """BLAKE2b digest of a JSON value, independent of the order of its keys: 32 hex digits."""
    return bytes_digest(json.dumps(value, sort_keys=True, separators=(",", ":")).encode())


def bytes_digest(content: bytes) -> str:
    """BLAKE2b digest of the content of a file, as `file_digest` computes it: 32 hex digits."""
    return hashlib.blake2b(content, digest_size=16).hexdigest()


def write_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Write a safetensors file whole or not at all."""
    from safetensors.torch import save_file

    with replacing(path) as temporary:
        save_file(dict(tensors), temporary, metadata=dict(metadata))


def read_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Read the tensors and the metadata of a safetensors file.

    Raises:
        UserError: if it is missing or damaged.
    """
    from safetensors import safe_open

    require_regular(path)
    with refusing(f"{path} is damaged"), safe_open(path, framework="pt") as file:
        return {key: file.get_tensor(key) for key in file.keys()}, file.metadata() or {}  # noqa: SIM118


class StoredTensors(Mapping[str, "Tensor"]):
    """Tensors in safetensors files, each read from the disk at every access.

    While a file stays mapped, every page that was read stays resident. Each access therefore maps
    the file anew, and its pages are freed with the tensor. A loop over the tensors holds only one.

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
        """The same tensors under new names (new name -> name here), returned in these dtypes."""
        return StoredTensors({name: self._places[keys[name]] for name in keys}, dtypes)

    def __iter__(self) -> Iterator[str]:
        return iter(self._places)

    def __len__(self) -> int:
        return len(self._places)


def open_tensors(*paths: Path) -> tuple[StoredTensors, dict[str, str]]:
    """Open safetensors files: the tensors, read at each access, and the last file's metadata.

    Raises:
        UserError: if a file is missing or its header is damaged.
    """
    from safetensors import safe_open

    places: dict[str, tuple[Path, str]] = {}
    metadata: dict[str, str] = {}
    for path in paths:
        require_regular(path)
        with refusing(f"{path} is damaged"), safe_open(path, framework="pt") as file:
            places |= {key: (path, key) for key in file.keys()}  # noqa: SIM118
            metadata = file.metadata() or {}
    return StoredTensors(places), metadata


def fingerprint(
    tensors: Mapping[str, Tensor], *, progress: Callable[[int], None] | None = None
) -> str:
    """BLAKE2b digest of names, dtypes, shapes and bits, sorted by name: 32 hex digits."""
    import torch

    digest = hashlib.blake2b(digest_size=16)
    for name in sorted(tensors):
        tensor = tensors[name].detach().contiguous()
        digest.update(f"{name}|{tensor.dtype}|{tuple(tensor.shape)}|".encode())
        if tensor.numel():
            # Viewed as bytes, because numpy has no bfloat16.
            digest.update(tensor.cpu().view(-1).view(torch.uint8).numpy().data)
        if progress is not None:
            progress(tensor.numel() * tensor.element_size())
    return digest.hexdigest()
