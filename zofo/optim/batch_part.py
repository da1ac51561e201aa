"""Loss differences on the first rows of a micro-batch instead of all of its rows.

    s = (f(x + eps v; part) − f(x; part)) / eps        part: the first rows of the micro-batch

Under random reshuffling, any fixed rows of a batch are a random sample of it. The difference on the
part is therefore an unbiased estimate of the difference on the batch, at the part's share of the
cost. f(x; part) is known from the first-order pass if that pass gives a loss for every row and
rounds as the part does. Otherwise it is evaluated again, under the masks of f(x + eps v; part).

Both values are normalised as the loss of the batch is:

    loss of the batch                     loss of the part
    mean over rows                        mean over the part's rows
    sum / num_items_in_batch              sum / (num_items_in_batch · the part's share of rows)
    mean over the batch's own tokens      mean over the part's tokens, unbiased up to O(1 / rows)
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
    """Number of rows in the part: the fraction of `num_rows`, rounded up, so at least one."""
    return min(num_rows, max(1, math.ceil(fraction * num_rows - 1e-9)))  # 0.7 · 10 is above 7


def split_rows(inputs: Mapping[str, Any], num_first: int) -> tuple[dict[str, Any], dict[str, Any]]:
    """Split a batch into its first rows and the rest; sequence length and padding stay.

    Args:
        inputs: name -> tensor [rows, ...], list with one entry per row, or plain value.
        num_first: rows of the first part.

    Raises:
        UserError: if an entry does not hold one element per row.
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
    """Number of rows in a batch.

    Raises:
        UserError: if the batch holds no tensor or list.
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
