"""The base before training, which an anchor pulls towards."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from torch import Tensor

from zofo.errors import UserError


class OriginalBase(Mapping[str, Tensor]):
    """The original weights of a base, each read at every access, in the dtype of the base.

    Args:
        source: name -> tensor of the base, and of anything else.
        base: name -> weight.

    Raises:
        UserError: if the source lacks a weight.
    """

    def __init__(self, source: Mapping[str, Tensor], base: Mapping[str, Tensor]) -> None:
        self._source = source
        self._kinds = {name: (weight.dtype, weight.shape) for name, weight in base.items()}
        if missing := [name for name in base if name not in source]:
            raise UserError(
                f"the original base lacks {missing[0]!r} ({len(missing)} of {len(base)} weights); "
                "give every weight of the base under its name in the model without adapter"
            )

    def __getitem__(self, name: str) -> Tensor:
        dtype, shape = self._kinds[name]
        tensor = self._source[name].detach()
        if tensor.shape != shape:
            raise UserError(
                f"the original of {name!r} has shape {list(tensor.shape)}, and the weight "
                f"{list(shape)}; give the base that the run began with"
            )
        return tensor.to(dtype)

    def __iter__(self) -> Iterator[str]:
        return iter(self._kinds)

    def __len__(self) -> int:
        return len(self._kinds)
