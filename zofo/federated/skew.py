"""Split rows between parties so that their labels differ, as in studies of federated learning."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from zofo.errors import UserError


def label_skew(
    labels: Sequence[int], num_parties: int, *, alpha: float, seed: int = 0, min_rows: int = 1
) -> list[list[int]]:
    """Split rows by label skew: each label's rows in shares of a Dirichlet distribution.

    Args:
        labels: the label of each row.
        num_parties: number of parties.
        alpha: the distribution's parameter, above 0. The smaller, the more the parties' labels and
            sizes differ.
        seed: seed of the shares and of the order of rows.
        min_rows: rows that each party needs. Shares are drawn until every party has so many.

    Returns:
        The indices of each party's rows. Every row belongs to one party.

    Raises:
        UserError: if an argument lies outside its range, or if 1000 draws give no such split.

    References:
        Hsu et al., "Measuring the Effects of Non-Identical Data Distribution for Federated Visual
        Classification", 2019.
    """
    if num_parties < 1 or not alpha > 0 or num_parties * min_rows > len(labels):
        raise UserError(
            f"{len(labels)} rows for {num_parties} parties with alpha {alpha} and min_rows "
            f"{min_rows}; alpha must be above 0, and there must be rows for every party"
        )
    generator = np.random.default_rng(seed)
    values = np.asarray(labels)
    for _ in range(1000):
        parts: list[list[int]] = [[] for _ in range(num_parties)]
        for label in np.unique(values):
            rows = generator.permutation(np.flatnonzero(values == label))
            shares = generator.dirichlet([alpha] * num_parties)
            cuts = (np.cumsum(shares)[:-1] * len(rows)).astype(int)
            for part, piece in zip(parts, np.split(rows, cuts), strict=True):
                part.extend(piece.tolist())
        if min(map(len, parts)) >= min_rows:
            return parts
    raise UserError(
        f"no split of {len(labels)} rows in 1000 draws gave each of {num_parties} parties "
        f"{min_rows} rows; choose a larger alpha, fewer parties or a smaller min_rows"
    )
