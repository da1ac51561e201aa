"""A layer at W + eps · a bᵀ, evaluated as the layer at W and a path of two vectors beside it.

    linear        y = W x         + eps · a (b · x)         W is [out, in], a has out signs
    Conv1D        y = Wᵀ x        + eps · b (a · x)         W is [in, out], as in GPT-2
    embedding     y = W[i]        + eps · a[i] b            W is [tokens, width]
    quantised     y = (s ⊙ q) x   + eps · unit · a ⊙ (q (b' ⊙ x))

In a quantised layer, s is the matrix of scales [out, groups], q are the codes, and b' repeats each
sign of b for the columns of its group. The path takes another product with the codes. In int8 there
is one group, and the path follows from the layer's output.

The hook adds the path to the output of the layer's own forward. No weight is computed or written.
Each row of the batch may have a direction of its own at the price of one forward. The rows of a
layer's input are then told by its first dimension, [rows, ..., in], or [rows · places, in] where a
model joins rows and places. A layer that receives anything else, such as one relative position for
all rows, cannot tell the rows apart (`NotByRows`).
"""

from __future__ import annotations

import functools
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from zofo.noise.rank_one import Side, signs, signs_of_rows
from zofo.perturb.compiled import is_compiled
from zofo.perturb.owners import Owner
from zofo.perturb.quantized import Scales, num_codes, product_of_codes
from zofo.perturb.shards import kind_of
from zofo.perturb.slots import Slot


@dataclass(frozen=True)
class RowDirections:
    """The directions of a batch.

    Attributes:
        first: index of the first direction.
        num: number of directions, K.
        of_rows: the direction of each row of the model's input, int64 [rows], values in
            [first, first + num); None: one direction for all rows, and `num` is 1.
    """

    first: int = 0
    num: int = 1
    of_rows: Tensor | None = None

    @functools.cached_property
    def is_one_each(self) -> bool:
        """Whether the rows have the directions in order, one each."""
        own = torch.arange(self.first, self.first + self.num)
        return self.of_rows is not None and torch.equal(self.of_rows, own)


class NotByRows(Exception):  # noqa: N818
    """Layers whose input does not hold one part for each row of the batch.

    Attributes:
        found: tensor index -> the place of the weight, and the shape of the input.
    """

    def __init__(self, found: Mapping[int, tuple[Slot, Sequence[int]]]) -> None:
        super().__init__(*(f"{slot.path}: {list(shape)}" for slot, shape in found.values()))
        self.found = dict(found)


class SidePath:
    """The path beside one layer that `side_path_kind` accepts."""

    def __init__(self, owner: Owner, slot: Slot, seed: int) -> None:
        self.owner, self.slot, self._seed = owner, slot, seed
        self._is_lookup = isinstance(slot.module, nn.Embedding)
        # Of Conv1D's weight [in, out], the columns belong to the output.
        is_linear = kind_of(slot.module) is nn.Linear
        self._out: Side = "rows" if is_linear else "columns"
        self._in: Side = "columns" if is_linear else "rows"

    def fits(self, x: Tensor, directions: RowDirections) -> bool:
        """Whether the rows of the batch can be told in the layer's input, as `add` takes it."""
        if directions.of_rows is None:
            return True
        rows = len(directions.of_rows)
        num_dims = x.ndim if self._is_lookup else x.ndim - 1  # before the dimension of width
        return x.shape[0] == rows or (num_dims == 1 and x.shape[0] % rows == 0)

    def add(
        self, x: Tensor, output: Tensor, scale: float, step: int, directions: RowDirections
    ) -> Tensor:
        """The output at W + scale · v.

        Args:
            x: the layer's input, [..., in], or token ids [...].
            output: the output of its forward, [..., out]; it may be written to.
            scale: eps, or −eps.
            step: address of the directions.
            directions: those of the batch, which fit the input.
        """
        if not output.numel():
            return output
        rows = 1 if directions.of_rows is None else len(directions.of_rows)
        y = output.reshape(rows, -1, output.shape[-1])  # [rows, places, out]
        across = functools.partial(self._across, step, directions, output.device)
        path = across(output.shape[-1], self._out)[:, None]  # [rows, 1, out]
        if self._is_lookup:
            of_rows = directions.of_rows
            index = torch.tensor([directions.first]) if of_rows is None else of_rows
            factor = signs_of_rows(
                x.reshape(rows, -1).long(),
                index.to(x.device)[:, None],
                seed=self._seed,
                step=step,
                tensor=self.slot.tensor,
            )[..., None]  # [rows, places, 1]
        else:
            b = across(x.shape[-1], self._in)[:, None]  # [rows, 1, in]
            # With b on the left, the product measured 5 to 10 times faster on the CPU.
            product = b.to(x.dtype) @ x.reshape(rows, -1, x.shape[-1]).transpose(1, 2)
            factor = product.transpose(1, 2)  # [rows, places, 1]
        factor, path = factor.to(y.dtype), path.to(y.dtype)
        if torch.is_grad_enabled() and y.requires_grad:
            return torch.addcmul(y, factor, path, value=scale).view(output.shape)
        return y.addcmul_(factor, path, value=scale).view(output.shape)

    def _across(
        self, step: int, directions: RowDirections, device: torch.device, size: int, side: Side
    ) -> Tensor:
        """The signs of one side for each row of the batch: float32, [rows, size]."""
        drawn = signs(
            size,
            side,
            num_directions=directions.num,
            first_direction=directions.first,
            seed=self._seed,
            step=step,
            tensor=self.slot.tensor,
            device=device,
        )
        if directions.of_rows is None or directions.is_one_each:
            return drawn
        return drawn[directions.of_rows - directions.first]


class ScalePath(SidePath):
    """The path beside a quantised linear layer, whose scales are a matrix."""

    def add(
        self, x: Tensor, output: Tensor, scale: float, step: int, directions: RowDirections
    ) -> Tensor:
        """The output at scales + scale · unit · v; arguments as for `SidePath.add`."""
        if not output.numel():
            return output
        rows = 1 if directions.of_rows is None else len(directions.of_rows)
        across = functools.partial(self._across, step, directions, output.device)
        a = across(output.shape[-1], "rows")[:, None]  # [rows, 1, out]
        b = across(self.slot.parameter.shape[1], "columns")  # [rows, groups]
        y = output.reshape(rows, -1, output.shape[-1])  # [rows, places, out]
        product = product_of_codes(self.slot.module, x.reshape(rows, -1, x.shape[-1]), y, b)
        product, a = product.to(y.dtype), a.to(y.dtype)
        factor = scale * self.slot.unit
        if torch.is_grad_enabled() and y.requires_grad:
            return torch.addcmul(y, product, a, value=factor).view(output.shape)
        return y.addcmul_(product, a, value=factor).view(output.shape)


def cost_of(paths: Iterable[SidePath], weights: Iterable[Tensor]) -> float:
    """The cost of an evaluation in forwards: 4-bit layers compute two products on their path.

    Args:
        paths: the paths of the model.
        weights: the perturbed weights, which stand for the products of a forward.
    """
    doubled = sum(num_codes(path.slot.module) for path in paths if isinstance(path, ScalePath))
    others = sum(weight.numel() for weight in weights if not isinstance(weight, Scales))
    return 1.0 + doubled / (doubled + others) if doubled else 1.0


def take_matrices(
    owners: Sequence[Owner], seed: int, excluded: Collection[int]
) -> dict[Owner, SidePath]:
    """Remove from their owners the weights that side paths serve, and return the paths.

    A weight is served if every place that holds it is the weight of a plain linear layer, `Conv1D`
    or embedding, or the scales of a quantised linear layer, which is called for its output. A head
    that is tied to an embedding therefore has the signs of the embedding, and both are served or
    neither.

    Args:
        owners: of all perturbed weights; their slots change.
        seed: seed of the directions.
        excluded: tensor indices of weights that are not served.
    """
    found: dict[Owner, Slot] = {}
    unserved = set(excluded)
    for owner in owners:
        for slot in owner.slots:
            if not owner.ties and slot.module is owner.module and _is_served(owner, slot):
                found[owner] = slot
            else:
                unserved.add(slot.tensor)
        unserved |= {slot.tensor for slot, _ in owner.ties}
    paths = {}
    for owner, slot in found.items():
        if slot.tensor not in unserved:
            kind = ScalePath if isinstance(slot.parameter, Scales) else SidePath
            paths[owner] = kind(owner, slot, seed)
            owner.slots.remove(slot)
    return paths


def _is_served(owner: Owner, slot: Slot) -> bool:
    module = slot.module
    kind = kind_of(module)
    is_plain = "forward" not in vars(module) and not is_compiled(module)
    is_conv1d = kind.__name__ == "Conv1D" and kind.__module__ == "transformers.pytorch_utils"
    if slot.parameter.ndim != 2 or not is_plain:
        return False
    if isinstance(slot.parameter, Scales):
        return True
    if slot.name != "weight":
        return False
    return kind is nn.Linear or is_conv1d or (kind is nn.Embedding and owner.is_lookup)
