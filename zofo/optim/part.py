"""A part of the batch that stands for all of it in the loss differences.

    s = (f(x + eps v; part) − f(x; part)) / eps        part: the first rows of the micro-batch

Under random reshuffling any rows of a batch are a random sample of it, so the difference of a part
is an unbiased estimate of the batch's, at the part's share of a forward. f(x; part) is known from
the first-order pass where that has a loss for every row and rounds as the part does; otherwise it
is evaluated again, under the masks of f(x + eps v; part).

Both sides are normalised as the batch's loss: a mean over rows as the mean over the part's, a sum
over `num_items_in_batch` tokens by that number times the part's share of the rows. A mean over the
batch's own tokens becomes the mean over the part's, which is unbiased only up to O(1 / rows).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from zofo.errors import UserError


def check_fraction(fraction: float) -> None:
    """Raises UserError unless 0 < fraction ≤ 1."""
    if not 0 < fraction <= 1:
        raise UserError(
            f"base_batch_fraction is {fraction}; it must lie in (0, 1], 1 for the whole batch"
        )


def num_rows_of(fraction: float, num_rows: int) -> int:
    """Rows of the part: the fraction, rounded up."""
    return min(num_rows, math.ceil(fraction * num_rows - 1e-9))  # 0.7 · 10 is a little above 7


def split_rows(inputs: Mapping[str, Any], num_first: int) -> tuple[dict[str, Any], dict[str, Any]]:
    """The first rows of a batch of tensors, and the rest; lengths and padding stay.

    Args:
        inputs: name -> tensor or list with one entry a row, or a value that is no collection.
        num_first: rows of the first part.

    Raises:
        UserError: if an entry does not hold one element a row.
    """
    num_rows = batch_rows(inputs)
    first, rest = {}, {}
    for name, value in inputs.items():
        if value is None or isinstance(value, (bool, int, float, str)):
            first[name] = rest[name] = value
        elif _length(value) == num_rows:
            first[name], rest[name] = value[:num_first], value[num_first:]
        else:
            what = f"shape {list(value.shape)}" if isinstance(value, Tensor) else type(value)
            raise UserError(
                f"base_batch_fraction takes the first rows of a batch of {num_rows}, and {name!r} "
                f"({what}) does not have one entry a row; leave base_batch_fraction at 1, or "
                "override batch_part of the trainer"
            )
    return first, rest


def batch_rows(inputs: Mapping[str, Any]) -> int:
    """Rows of a batch.

    Raises:
        UserError: if it holds no tensor that could say.
    """
    for name in ("input_ids", "inputs_embeds", "pixel_values", "labels", *inputs):
        length = _length(inputs.get(name))
        if length is not None:
            return length
    raise UserError(
        "base_batch_fraction needs batches of tensors with one entry a row; leave it at 1, or "
        "override batch_part of the trainer"
    )


def _length(value: Any) -> int | None:
    if isinstance(value, Tensor):
        return len(value) if value.ndim else None
    return len(value) if isinstance(value, (list, tuple)) else None
