"""Weights in temporary files, so that memory holds only those in use.

A weight in a mapped file can be changed in place like any other. The system writes its pages back
and drops them from memory when it needs room. The files have no names once they are mapped, so they
end with the process.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Final

from zofo.disk.files import reason_of_failed_write
from zofo.errors import UserError

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

_PART: Final = 1 << 16
"""Elements that are written at a time."""


def move_to_disk(
    weights: Iterable[nn.Parameter], folder: Path, dtype: torch.dtype | None = None
) -> None:
    """Move weights into temporary files, one at a time; those in such files already stay.

    Args:
        weights: weights on the CPU.
        folder: a folder on the disk that takes the files.
        dtype: dtype that floating weights take; None: their own.

    Raises:
        UserError: if the disk has no room for them.
    """
    for weight in weights:
        wanted = dtype if dtype is not None and weight.is_floating_point() else weight.dtype
        is_there = weight.untyped_storage().filename is not None and weight.dtype == wanted
        if weight.numel() and not is_there:
            weight.data = _mapped(weight.data, folder, wanted)


def _mapped(values: Tensor, folder: Path, dtype: torch.dtype) -> Tensor:
    import torch

    try:
        with tempfile.NamedTemporaryFile(dir=folder, prefix=".zofo.") as file:
            # Written first, because a full disk would end the process at a write to a mapped page.
            # In parts, because blocks as large as a weight would leave gaps in the heap.
            for part in values.reshape(-1).split(_PART):
                file.write(part.to(dtype).view(torch.uint8).numpy().data)
            file.flush()
            found = torch.from_file(file.name, shared=True, size=values.numel(), dtype=dtype)
    except (OSError, RuntimeError) as error:
        reason = reason_of_failed_write(error)
        if reason is None:
            raise
        raise UserError(
            f"the weights need a temporary copy in {folder}, which cannot be written: {reason}. "
            "Nothing else was written: free space or choose another folder"
        ) from error
    return found.view(values.shape)
