"""A perturbed linear layer that computes its perturbed weight a tile at a time.

    y[:, rows] = x (w[rows] + scale · v[rows])ᵀ + b[rows]        512 rows at a time

The tile stays in the second-level cache, from which the product reads it. On an output head of
49,152 × 576 the perturbation measurably costs nothing beside the product. With scratch for the
whole weight it costs a quarter of the product. The layer needs one megabyte instead of its size.

A product with some rows of the weight has the bits of the whole product if the library sums over
the inner dimension in the same order. The first batch decides: if the bits differ, the layer is
swapped as a whole.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any, Final

import torch
from torch import Tensor, nn

from zofo.noise.combine import Distribution, prepare
from zofo.perturb.shards import kind_of
from zofo.perturb.slots import Slot

ROWS: Final = 512  # of the weight, per tile
_MIN_TILES: Final = 8


def is_tileable(module: nn.Module) -> bool:
    """Whether the module is a plain linear layer on the CPU, large enough for tiles."""
    if kind_of(module) is not nn.Linear or "forward" in vars(module):
        return False
    weight: Any = module.weight
    return (
        weight.device.type == "cpu"
        and weight.dtype in (torch.float32, torch.float64)
        and weight.is_contiguous()
        and len(weight) >= _MIN_TILES * ROWS
    )


class TiledLinear:
    """A perturbed linear layer; `slot` holds its weight [out, in], which `is_tileable` accepts.

    `scratch` has the weight's dtype and at least ROWS · in elements. Layers may share it.
    """

    def __init__(
        self,
        slot: Slot,
        scratch: Tensor,
        *,
        seed: int,
        distribution: Distribution,
    ) -> None:
        self._slot, self.seed, self.distribution = slot, seed, distribution
        self._scratch = scratch
        self._is_exact: bool | None = None
        self._address: int | None = None
        self._tiles: list[tuple[slice, Tensor, Callable[[float, int, int], None]]] = []

    def serves(self, x: Tensor, bias: Tensor | None) -> bool:
        """Whether the tiled product with `x` has the bits of the whole product."""
        weight = self._slot.present
        if (
            torch.is_grad_enabled()
            or torch.is_autocast_enabled("cpu")
            or not x.dtype == weight.dtype == self._scratch.dtype
            or x.numel() == 0
            or not weight.is_contiguous()
        ):
            return False
        if self._is_exact is None:
            # Both products use the unperturbed weight: only the order of summation matters.
            whole = nn.functional.linear(x, weight, bias)
            rows = [slice(a, a + ROWS) for a in range(0, len(weight), ROWS)]
            tiled = self._product(x, bias, len(weight), ((part, weight[part]) for part in rows))
            self._is_exact = torch.equal(whole, tiled)
        return self._is_exact

    def __call__(
        self, x: Tensor, bias: Tensor | None, scale: float, step: int, direction: int
    ) -> Tensor:
        """The output [..., out] for x [..., in] at weight + scale · v[step, direction].

        The bias, [out], is used as it is, so it must already be perturbed.
        """
        weight = self._slot.present
        if self._address != weight.data_ptr():
            self._lay_out(weight.detach())

        # All tiles share one buffer, so each is used before the next is computed.
        def tiles() -> Iterator[tuple[slice, Tensor]]:
            for part, tile, compute in self._tiles:
                compute(scale, step, direction)
                yield part, tile

        return self._product(x, bias, len(weight), tiles())

    def _product(
        self, x: Tensor, bias: Tensor | None, size: int, tiles: Iterable[tuple[slice, Tensor]]
    ) -> Tensor:
        rows = x.reshape(-1, x.shape[-1])  # [rows, in]
        out = rows.new_empty(len(rows), size)  # [rows, out]
        for part, tile in tiles:
            if bias is None:
                torch.mm(rows, tile.t(), out=out[:, part])
            else:
                torch.addmm(bias[part], rows, tile.t(), out=out[:, part])
        return out.view(*x.shape[:-1], size)

    def _lay_out(self, weight: Tensor) -> None:
        width = weight.shape[1]
        scratch = self._scratch[: ROWS * width].view(ROWS, width)
        self._address, self._tiles = weight.data_ptr(), []
        for a in range(0, len(weight), ROWS):
            source = weight[a : a + ROWS]  # [at most ROWS, in]
            tile = scratch[: len(source)]
            compute = prepare(
                [source],
                [tile],
                tensors=[self._slot.tensor],
                seed=self.seed,
                distribution=self.distribution,
                offset=a * width,  # of the tile's first element within the weight
            )
            self._tiles.append((slice(a, a + ROWS), tile, compute))
