"""A copy of tensors in a temporary file, which is read one tensor at a time.

The file has no name once it is open, so it ends with the process, however that ends. It is read and
not mapped, because the pages of a mapped file count as memory of the process.
"""

from __future__ import annotations

import tempfile
import weakref
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from zofo.disk.files import reason_of_failed_write
from zofo.errors import UserError

if TYPE_CHECKING:
    from torch import Tensor


class CopyOnDisk(Mapping[str, "Tensor"]):
    """Tensors as they are now, by name. Each access reads one, onto the CPU.

    Args:
        tensors: name -> tensor, on any device.
        folder: a folder on the disk that takes the file; None: the system's for temporary files.

    Raises:
        UserError: if the disk has no room for them.
    """

    def __init__(self, tensors: Mapping[str, Tensor], folder: Path | None = None) -> None:
        import torch

        self._places: dict[str, tuple[int, torch.Size, torch.dtype]] = {}
        at = 0
        try:
            if folder is not None:
                folder.mkdir(parents=True, exist_ok=True)
            self._file: Any = tempfile.TemporaryFile(dir=folder, prefix=".zofo.")  # noqa: SIM115
            weakref.finalize(self, self._file.close)
            for name, tensor in tensors.items():
                self._places[name] = at, tensor.shape, tensor.dtype
                values = tensor.detach().cpu().reshape(-1)
                if len(values):
                    at += self._file.write(values.view(torch.uint8).numpy().data)
            self._file.flush()
        except OSError as error:
            place = folder or tempfile.gettempdir()
            raise UserError(
                f"the original weights need a temporary copy in {place}, which cannot be written: "
                f"{reason_of_failed_write(error)}. Free space or choose another folder"
            ) from error

    def __getitem__(self, name: str) -> Tensor:
        import torch

        at, shape, dtype = self._places[name]
        tensor = torch.empty(shape, dtype=dtype)
        if tensor.numel():
            self._file.seek(at)
            bits = tensor.view(-1).view(torch.uint8).numpy().data
            if self._file.readinto(bits) != len(bits):
                raise UserError(f"the temporary copy of {name!r} cannot be read; check the disk")
        return tensor

    def __iter__(self) -> Iterator[str]:
        return iter(self._places)

    def __len__(self) -> int:
        return len(self._places)

    def __deepcopy__(self, memo: Any) -> CopyOnDisk:
        return self  # It never changes.

    def __reduce__(self) -> Any:
        raise UserError(
            "the original weights of an anchor lie in a temporary file of this process, so its "
            "optimizer cannot be pickled; save its state_dict()"
        )
