"""The server's log of scalars, of which every party's base is a pure function.

A round adds the scalars of its parties, in the order of the parties' numbers:

    x ← x − base_lr Σ_c (n_c / n) Σ_h s_{c,h} v_{c,h}      n = Σ_c n_c

n_c is the number of examples of party c, and s_{c,h} the projected gradient of its local step h.
Each local step has directions v of its own, and the number of the step addresses them. The log is a
`Trajectory` whose learning rates are base_lr · n_c / n, so it replays, saves and loads as one, and
the trained base needs nothing else.

A position is a number of rows of the log, one row a local step. The digest at a position covers the
rows before it, the options and the original base, so equal digests mean equal bits of the base.
"""

from __future__ import annotations

import hashlib
import json
import math
import struct
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Final

from torch import nn

from zofo.disk.files import fingerprint, refusing
from zofo.federated.options import FederatedOptions, checked
from zofo.noise.philox import MAX_DIRECTIONS, MAX_STEP, NOISE_VERSION
from zofo.optim.blocks import split_parameters, units_of
from zofo.optim.methods import param_groups
from zofo.optim.trajectory import DTYPE_POLICY, MAX_UPDATES, GroupSpec, Trajectory, Update

PROTOCOL: Final = 1
"""The version of the records that server and parties exchange."""
Record = dict[str, Any]
"""Name -> text, number, or list of numbers: what a `ConfigRecord` of Flower can hold."""


class BaseLog:
    """All updates of the base in a federated run.

    Args:
        options: the options of the run.
        trajectory: the updates so far.
        base_fingerprint: fingerprint of the original base.
    """

    def __init__(
        self, options: FederatedOptions, trajectory: Trajectory, base_fingerprint: str
    ) -> None:
        self.options, self.trajectory = options, trajectory
        self.base_fingerprint = base_fingerprint
        self._rates = list(options.base_rates.values())  # of each group
        known = {
            "protocol": PROTOCOL,
            "noise_version": NOISE_VERSION,
            "dtype_policy": DTYPE_POLICY,
            "options": options.to_json(),
            "groups": [[group.names, group.tensors] for group in trajectory.groups],
            "base": base_fingerprint,
        }
        self._digests = [_digest(json.dumps(known).encode())]
        self._extend_digests()

    @classmethod
    def begin(cls, model: nn.Module, options: FederatedOptions) -> BaseLog:
        """Make an empty log.

        Args:
            model: a model with its adapter and its original base.
            options: the options of the run.

        Raises:
            UserError: if the model has no adapter, a pattern of `base_lr` matches no weight, or an
                option lies outside its range.
        """
        options = checked(options)
        groups = param_groups(model, options.method, base_lr=options.base_rates or 0.0)
        zeroth = [group for group in groups if group["order"] == "zeroth"]
        specs = tuple(GroupSpec(tuple(g["names"]), tuple(g["tensors"])) for g in zeroth)
        drawing = options.seed, options.distribution, options.eps, options.estimator
        trajectory = Trajectory(*drawing, specs, units=units_of(zeroth))
        return cls(options, trajectory, fingerprint(split_parameters(model).base))

    def copy(self) -> BaseLog:
        """A log with the same rows, which grows on its own."""
        trajectory = replace(self.trajectory, updates=list(self.trajectory.updates))
        return BaseLog(self.options, trajectory, self.base_fingerprint)

    def __len__(self) -> int:
        return len(self.trajectory)

    @property
    def next_step(self) -> int:
        """The first step whose directions no row of the log has used."""
        updates = self.trajectory.updates
        return updates[-1][0].step + 1 if updates else 0

    def digest(self, position: int | None = None) -> str:
        """The digest of everything before a position; None: before the end."""
        return self._digests[len(self) if position is None else position].hex()

    def add(
        self,
        first_step: int,
        rows: Sequence[Sequence[float]],
        weight: float,
        rank_one: Iterable[int],
    ) -> None:
        """Append the local steps of a party.

        Args:
            first_step: number of its first step, which addresses the directions.
            rows: its scalars s, finite, [steps, directions].
            weight: its share of the round, n_c / n.
            rank_one: tensor indices of the weights with rank-one directions. All parties have the
                same, and the first rows of the log decide.
        """
        if not len(self):
            self.trajectory.rank_one = frozenset(rank_one)
        decay = self.options.base_weight_decay
        for i, row in enumerate(rows):
            self.trajectory.updates.append(
                tuple(Update(first_step + i, tuple(row), lr * weight, decay) for lr in self._rates)
            )
        self._extend_digests()

    def truncate(self, length: int) -> None:
        """Forget all rows from a position on."""
        del self.trajectory.updates[length:], self._digests[length + 1 :]

    def since(self, start: int) -> Record:
        """The rows from a position on, as a record: `start`, `digest`, and columns.

        Consecutive steps of the same learning rate and number of directions share an entry:
        `first_step`, `num_steps`, `num_directions` and, for each group, `lr`. `scalars` holds the
        scalars of all rows in order.
        """
        runs: list[tuple[int, int, int, tuple[float, ...]]] = []
        scalars: list[float] = []
        for row in self.trajectory.updates[start:]:
            step, num, lrs = row[0].step, len(row[0].projected_grad), tuple(u.lr for u in row)
            if runs and runs[-1][0] + runs[-1][1] == step and runs[-1][2:] == (num, lrs):
                runs[-1] = (runs[-1][0], runs[-1][1] + 1, num, lrs)
            else:
                runs.append((step, 1, num, lrs))
            scalars.extend(row[0].projected_grad)
        record: Record = {"start": start, "digest": self.digest()}
        if runs:  # A record of Flower cannot hold an empty list.
            record |= {
                "first_step": [run[0] for run in runs],
                "num_steps": [run[1] for run in runs],
                "num_directions": [run[2] for run in runs],
                "lr": [lr for run in runs for lr in run[3]],
                "scalars": scalars,
            }
            if start == 0 and self.trajectory.rank_one:
                record["rank_one"] = sorted(self.trajectory.rank_one)
        return record

    def follow(self, record: Mapping[str, Any]) -> None:
        """Replace all rows from `start` on by those of a record that `since` made.

        Raises:
            Behind: if this log ends before `start`, or if its earlier rows are others. In the
                second case it is then empty.
            UserError: if the record is damaged.
        """
        start = record["start"]
        if not 0 <= start <= len(self):
            raise Behind(len(self))
        self.truncate(start)
        with refusing("the server's record of the base is damaged", "check its version of zofo"):
            if start == 0:
                self.trajectory.rank_one = frozenset(record.get("rank_one", ()))
            self.trajectory.updates += self._rows_of(record)
        self._extend_digests()
        if self.digest() != record["digest"]:
            self.truncate(0)
            raise Behind(0)

    def _rows_of(self, record: Mapping[str, Any]) -> list[tuple[Update, ...]]:
        columns = [record.get(key, []) for key in ("first_step", "num_steps", "num_directions")]
        scalars, lrs = record.get("scalars", []), record.get("lr", [])
        num_groups = len(self._rates)
        runs = list(zip(*columns, strict=True))
        sound = (
            all(
                min(s, n - 1, k - 1) >= 0 and s + n < MAX_STEP and k < MAX_DIRECTIONS
                for s, n, k in runs
            )
            and sum(n * k for _, n, k in runs) == len(scalars) <= MAX_UPDATES
            and len(lrs) == len(runs) * num_groups
            and all(type(x) is float and math.isfinite(x) for x in (*scalars, *lrs))
        )
        if not sound:
            raise ValueError("invalid values")
        decay, rows, at = self.options.base_weight_decay, [], 0
        for i, (first, num_steps, num) in enumerate(runs):
            rates = lrs[i * num_groups : (i + 1) * num_groups]
            for step in range(first, first + num_steps):
                s = tuple(scalars[at : at + num])
                rows.append(tuple(Update(step, s, lr, decay) for lr in rates))
                at += num
        return rows

    def save(self, path: Path) -> None:
        """Write the log, whole or not at all."""
        self.trajectory.save(
            path, base_fingerprint=self.base_fingerprint, federated=self.options.to_json()
        )

    @classmethod
    def load(cls, path: Path) -> BaseLog:
        """Read a log.

        Raises:
            UserError: if the file is missing, damaged, or not the log of a federated run.
        """
        trajectory, header = Trajectory.load(path)
        with refusing(f"{path} is not the log of a federated run"):
            options = FederatedOptions.from_json(header["federated"])
            return cls(options, trajectory, header["base_fingerprint"])

    def _extend_digests(self) -> None:
        """Chain the digests of the rows that have none."""
        for position in range(len(self._digests) - 1, len(self)):
            row = self.trajectory.updates[position]
            numbers = [*row[0].projected_grad, *(update.lr for update in row)]
            content = struct.pack(f"<2Q{len(numbers)}d", row[0].step, len(row), *numbers)
            if position == 0:
                content += json.dumps(sorted(self.trajectory.rank_one)).encode()
            self._digests.append(_digest(self._digests[-1] + content))


class Behind(Exception):  # noqa: N818 - no error: the server sends the rest in the next round
    """A party lacks rows of the log that the server believed it to have.

    Args:
        position: what it has.
    """

    def __init__(self, position: int) -> None:
        super().__init__(f"the party has {position} rows of the log")
        self.position = position


def _digest(content: bytes) -> bytes:
    return hashlib.blake2b(content, digest_size=16).digest()


def num_bytes(record: Mapping[str, Any]) -> int:
    """Bytes of a record: 8 for each number, and one for each character of a name or text."""

    def of(value: Any) -> int:
        return len(value.encode()) if isinstance(value, str) else 8

    return sum(
        len(name.encode()) + (sum(map(of, value)) if isinstance(value, list) else of(value))
        for name, value in record.items()
    )
