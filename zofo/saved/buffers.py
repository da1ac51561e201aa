"""Buffers that training has changed, such as running statistics, in a file of their own.

Neither the adapter nor the trajectory holds them. Most models have none, and then no file.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from zofo.disk.files import file_digest, read_tensors, refusing, write_tensors
from zofo.errors import UserError
from zofo.optim.buffers import set_buffers
from zofo.saved.layout import BUFFERS_FILE


def save_buffers(folder: Path, values: Mapping[str, Tensor]) -> dict[str, str]:
    """Write the buffers, if there are any, and return file -> digest."""
    path = folder / BUFFERS_FILE
    if not values:
        path.unlink(missing_ok=True)  # of an earlier model in the same folder
        return {}
    write_tensors(path, values, {})
    return {BUFFERS_FILE: file_digest(path)}


def read_buffers(folder: Path, record: Mapping[str, Any] | None) -> dict[str, Tensor]:
    """Read the buffers.

    Args:
        folder: a checkpoint or an artefact.
        record: metadata of the trajectory beside them, which holds the digest; None without one.

    Raises:
        UserError: if the file is damaged or missing, or belongs to another run.
    """
    path = folder / BUFFERS_FILE
    found = file_digest(path) if path.is_file() else None
    if record is not None and (record.get("files") or {}).get(BUFFERS_FILE) != found:
        raise UserError(f"{path} is missing, damaged or of another run; copy the folder again")
    return {} if found is None else read_tensors(path)[0]


def load_buffers(folder: Path, model: nn.Module, record: Mapping[str, Any] | None) -> int:
    """Set the saved buffers of a model whose others are those before training; return how many.

    Raises:
        UserError: as `read_buffers`, or if they do not fit the model.
    """
    values = read_buffers(folder, record)
    with refusing(f"{folder / BUFFERS_FILE} does not fit this model", "load its own base"):
        set_buffers(model, values)
    return len(values)
