"""The base as a function of its history: one scalar per direction and step.

    w_{t+1} = round((1 − lr_t · weight_decay) · w_t − (lr_t / K) Σ_k s_{t,k} v_{t,k})

s_{t,k} is the projected gradient of direction k in step t, and v_{t,k} is that direction. Of
rank-one directions, each has rows of its own, and s_{t,k} is their share of the loss difference:

    matrices    w_{t+1} = round((1 − lr_t · weight_decay) · w_t − lr_t Σ_k s_{t,k} a_{t,k} b_{t,k}ᵀ)
    all others  the first equation with one direction for the batch, and s_t = Σ_k s_{t,k}

Directions and stochastic rounding are pure functions of their address (seed, step, tensor,
element). The recorded scalars and learning rates therefore turn the original base into the trained
one: a fine-tuned model costs a few bytes per step. Training updates the weights with
`Update.apply`, one step at a time. `Trajectory.replay` applies many updates in one pass over the
weights and gives the same bits. With an anchor (`zofo.optim.update`), it applies them one by one.

References:
    Malladi et al., "Fine-Tuning Language Models with Just Forward Passes", 2023, on storing a run
    as seeds and scalars.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor, nn

from zofo.disk.files import (
    fingerprint,
    parse_json,
    read_tensors,
    refusing,
    require_regular,
    write_tensors,
)
from zofo.errors import UserError
from zofo.noise.combine import DISTRIBUTIONS, Distribution, combine_steps
from zofo.noise.philox import MAX_DIRECTIONS, MAX_STEP, MAX_TENSORS, NOISE_VERSION
from zofo.optim.update import GroupSpec as GroupSpec
from zofo.optim.update import Update as Update
from zofo.optim.update import drawn_from
from zofo.perturb.shards import Whole, local_part

FORMAT_VERSION: Final = 1
RANK_ONE_VERSION: Final = 2
"""The format of a file with rank-one directions, which older versions of zofo do not know."""
UNITS_VERSION: Final = 3
"""The format of a file with scales of quantised weights, whose directions have units."""
ANCHOR_VERSION: Final = 4
"""The format of a file with an anchor, of weights that are not quantised."""
DTYPE_POLICY = "float32 arithmetic, stochastic rounding to 16 bits"
"""How an update is computed and stored. Updates of float64 weights use float64 arithmetic."""
TRAJECTORY_FILE: Final = "base_trajectory.safetensors"
_REPLAY_BLOCK = 4096
"""Updates per pass, few enough that their scalars are small beside a chunk of weights."""
MAX_UPDATES: Final = 1 << 22
"""Steps times parameter groups that a trajectory can hold, in half a GiB of memory."""
_MAX_BYTES: Final = 1 << 30  # of the file
_MAX_EXPONENT: Final = 64  # of a unit, far beyond any scale


@dataclass
class Trajectory:
    """All zeroth-order updates of the base in a run.

    Attributes:
        seed: seed of the directions.
        distribution: distribution of the directions.
        eps: smoothing radius, for information only; replay does not use it.
        estimator: "forward" or "central", for information only.
        groups: the recorded parameter groups.
        updates: one row per step, which holds one update per group.
        rank_one: tensor indices of the weights whose directions are rank-one.
        units: tensor index -> unit of its directions, a power of two, where it is not 1: of scales
            of quantised weights (`zofo.perturb.quantized`).
    """

    seed: int
    distribution: Distribution
    eps: float
    estimator: str
    groups: tuple[GroupSpec, ...]
    updates: list[tuple[Update, ...]] = field(default_factory=list)
    rank_one: frozenset[int] = frozenset()
    units: dict[int, float] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.updates)

    @property
    def moves_weights(self) -> bool:
        """Whether some update has a learning rate above 0."""
        return any(update.lr != 0 for row in self.updates for update in row)

    @property
    def has_anchor(self) -> bool:
        """Whether some update pulls the weights towards their values before training."""
        return any(update.anchor and update.lr for row in self.updates for update in row)

    def replay(
        self,
        parameters: Mapping[str, nn.Parameter],
        *,
        start: int = 0,
        stop: int | None = None,
        progress: Callable[[int, int], None] | None = None,
        original: Mapping[str, Tensor] | None = None,
    ) -> None:
        """Apply the updates start .. stop − 1 to the parameters, in place.

        Each weight takes a block of updates in one pass over memory, with the same bits as one
        update at a time. Of a sharded weight, this process's shard takes them.

        Args:
            parameters: name -> parameter, at its value before update `start`.
            start: first update.
            stop: one past the last update; None: all.
            progress: called with the number of weights done and their total number.
            original: name -> value before update 0, read one at a time if the updates have an
                anchor; None: that of `parameters`, if `start` is 0.

        Raises:
            UserError: if the parameters lack a recorded name, or the original is needed.
        """
        if start and original is None and self.has_anchor:
            raise UserError(
                "the trajectory has an anchor, so a replay from its middle needs the weights "
                "before training; pass original, or replay from the start"
            )
        missing = [n for g in self.groups for n in g.names if n not in parameters]
        if missing:
            raise UserError(
                f"the trajectory updates {missing[0]!r} ({len(missing)} missing in all), which "
                "this model does not have; replay it on the base of the recorded run"
            )
        matrices = (
            parameters[name].ndim == 2
            for group in self.groups
            for name, tensor in zip(group.names, group.tensors, strict=True)
            if tensor in self.rank_one
        )
        if not all(matrices):
            raise UserError(
                "the trajectory has rank-one directions of a weight that is no matrix in this "
                "model; replay it on the base of the recorded run"
            )
        num_done = 0
        num_weights = sum(parameters[n].numel() for g in self.groups for n in g.names)
        for g, group in enumerate(self.groups):
            # An update with learning rate 0 changes no bit, so it is skipped.
            updates = [row[g] for row in self.updates[start:stop] if row[g].lr != 0]
            for name, tensor in zip(group.names, group.tensors, strict=True):
                is_rank_one = tensor in self.rank_one
                kind = self.distribution, is_rank_one, self.units.get(tensor, 1.0)
                shard, offset = local_part(parameters[name])
                is_anchored = any(update.anchor for update in updates)
                # A pull is a pass of its own, so each update is one.
                size, origin = (1 if is_anchored else _REPLAY_BLOCK), None
                if is_anchored:
                    origin = shard.detach().clone() if original is None else original[name]
                for block in range(0, len(updates), size):
                    part = updates[block : block + size]
                    if origin is not None and part[0].anchor:
                        part[0].pull(shard, origin, seed=self.seed, tensor=tensor)
                    coefficients = [update.coefficients(kind).tolist() for update in part]
                    combine_steps(
                        shard,
                        _filled(coefficients),
                        decays=[update.decay for update in part],
                        steps=[update.step for update in part],
                        seed=self.seed,
                        tensor=tensor,
                        offset=offset,
                        distribution=drawn_from(self.distribution, is_rank_one=is_rank_one),
                        rounding="stochastic",
                    )
                if progress is not None:
                    num_done += parameters[name].numel()
                    progress(num_done, num_weights)

    def save(self, path: Path, **extra: Any) -> None:
        """Write a safetensors file atomically; `extra` is added to its metadata as JSON."""
        rows = self.updates

        def column(get: Callable[[Update], float]) -> Tensor:
            """float64, [steps, groups]; [1, groups] if every step has the same values."""
            values = [[get(update) for update in row] for row in rows]
            table = torch.tensor(values, dtype=torch.float64).reshape(len(rows), len(self.groups))
            return table[:1].clone() if rows and bool((table == table[0]).all()) else table

        scalars = _filled([row[0].projected_grad for row in rows])
        tensors = {
            "step": _compressed([row[0].step for row in rows]),
            "projected_grad": torch.tensor(scalars, dtype=torch.float64).reshape(
                len(rows), len(scalars[0]) if scalars else 0
            ),
            "lr": column(lambda update: update.lr),
            "weight_decay": column(lambda update: update.weight_decay),
        }
        header: dict[str, Any] = {
            "format": FORMAT_VERSION,
            "noise_version": NOISE_VERSION,
            "dtype_policy": DTYPE_POLICY,
            "num_steps": len(rows),
            "seed": self.seed,
            "distribution": self.distribution,
            "eps": self.eps,
            "estimator": self.estimator,
            "groups": [asdict(group) for group in self.groups],
            **extra,
        }
        if self.distribution == "rank-one":
            # A batch may have fewer rows than others, so the numbers of directions differ.
            counts = [len(row[0].projected_grad) for row in rows]
            recorded = self.rank_one.intersection(t for g in self.groups for t in g.tensors)
            tensors["num_directions"] = torch.tensor(counts, dtype=torch.int64)
            header |= {"format": RANK_ONE_VERSION, "rank_one": sorted(recorded)}
        if any(update.anchor for row in rows for update in row):
            tensors["anchor"] = column(lambda update: update.anchor)
            header["format"] = ANCHOR_VERSION
        if self.units:
            exponents = {str(t): round(math.log2(unit)) for t, unit in sorted(self.units.items())}
            header |= {"format": UNITS_VERSION, "units": exponents}
        header["digest"] = _digest(header, tensors)
        write_tensors(path, tensors, {"zofo": json.dumps(header)})

    @classmethod
    def load(cls, path: Path) -> tuple[Trajectory, dict[str, Any]]:
        """Read a trajectory and its metadata.

        Raises:
            UserError: if the file is missing, damaged, or of another version.
        """
        if require_regular(path) > _MAX_BYTES:
            raise UserError(f"{path} is larger than {_MAX_BYTES} bytes, so damaged; copy it again")
        tensors, metadata = read_tensors(path)
        with refusing(f"{path} is not a trajectory of zofo, or is damaged"):
            header = parse_json(metadata["zofo"])
            is_rank_one = header["distribution"] == "rank-one"
            plain = RANK_ONE_VERSION if is_rank_one else FORMAT_VERSION
            plain = ANCHOR_VERSION if "anchor" in tensors else plain
            versions = {
                "format": UNITS_VERSION if header.get("units") else plain,
                "noise_version": NOISE_VERSION,
                "dtype_policy": DTYPE_POLICY,
            }
            for key, known in versions.items():
                if header[key] != known:
                    raise UserError(
                        f"{path} has {key} {header[key]!r:.80}; this zofo reads {known}: install "
                        "the version of zofo that wrote it"
                    )
            if header.pop("digest") != _digest(header, tensors):
                raise UserError(f"{path} is damaged (its digest does not match); copy it again")
            trajectory = _from_file(header, tensors)
        return trajectory, header


def check_base(base: Mapping[str, Tensor], expected: str | None, owner: str) -> None:
    """Check that a base is the one that a trajectory or adapter was trained on.

    Args:
        base: name -> tensor; sharded ones are gathered one at a time.
        expected: the recorded fingerprint.
        owner: the trajectory or adapter, for the message.

    Raises:
        UserError: if the fingerprints differ.
    """
    found = fingerprint(Whole(base))
    if found != expected:
        raise UserError(
            f"{owner} was trained on a base with fingerprint {expected}, but this base has "
            f"{found}; load the base that the run began with"
        )


def _from_file(header: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Trajectory:
    """Validate the content of a file: a digest detects damage, but not a hostile writer.

    Raises:
        ValueError, KeyError, TypeError: if no run could have recorded the content.
    """
    groups = tuple(GroupSpec(tuple(g["names"]), tuple(g["tensors"])) for g in header["groups"])
    names = [name for group in groups for name in group.names]
    indices = [index for group in groups for index in group.tensors]
    steps, scalars = tensors["step"], tensors["projected_grad"]
    num_steps = len(scalars)
    tables = [tensors[key] for key in ("lr", "weight_decay")]
    tables.append(tensors.get("anchor", torch.zeros_like(tables[0])))
    seed, eps = header["seed"], header["eps"]
    counts = tensors.get("num_directions")
    if counts is None:
        counts = torch.full((num_steps,), scalars.shape[-1])
    sound = {
        "num_steps": header["num_steps"] == num_steps,
        "groups": num_steps * max(1, len(groups)) <= MAX_UPDATES,
        "names": all(type(name) is str for name in names) and len(set(names)) == len(names),
        "tensors": all(type(i) is int and 0 <= i < MAX_TENSORS for i in indices)
        and all(len(group.names) == len(group.tensors) for group in groups),
        "seed": type(seed) is int and 0 <= seed < 1 << 64,
        "distribution": header["distribution"] in DISTRIBUTIONS,
        "eps": type(eps) in (int, float) and 0 < eps < float("inf"),
        "estimator": type(header["estimator"]) is str,
        "step": steps.dtype == torch.int64
        and steps.shape in ((1,), (num_steps,))
        and bool(((steps >= 0) & (steps < MAX_STEP - num_steps)).all()),
        "projected_grad": _is_table(scalars, (num_steps,))
        and (0 < scalars.shape[1] < MAX_DIRECTIONS or not num_steps),
        "lr, weight_decay and anchor": all(
            _is_table(t, (1, num_steps), len(groups)) for t in tables
        ),
        "rank_one": set(header.get("rank_one", [])) <= set(indices),
        "units": all(
            int(tensor) in indices and type(exponent) is int and abs(exponent) <= _MAX_EXPONENT
            for tensor, exponent in header.get("units", {}).items()
        ),
        "num_directions": counts.dtype == torch.int64
        and counts.shape == (num_steps,)
        and bool(((counts > 0) & (counts <= scalars.shape[1])).all()),
    }
    wrong = [key for key, is_sound in sound.items() if not is_sound]
    if wrong:
        raise ValueError(f"invalid values of {', '.join(wrong)}")
    if len(steps) < num_steps:  # the file holds only the first of consecutive steps
        steps = steps + torch.arange(num_steps)
    # [steps, groups, 3], in the order of the fields of `Update`
    rates = torch.stack([table.expand(num_steps, len(groups)) for table in tables], -1)
    updates = [
        tuple(Update(step, tuple(s[:n]), *group) for group in row)
        for step, s, n, row in zip(
            steps.tolist(), scalars.tolist(), counts.tolist(), rates.tolist(), strict=True
        )
    ]
    rank_one = frozenset(header.get("rank_one", ()))
    drawing = seed, header["distribution"], eps, header["estimator"]
    units = {int(t): 2.0**exponent for t, exponent in header.get("units", {}).items()}
    return Trajectory(*drawing, groups, updates, rank_one, units)


def _filled(rows: Sequence[Sequence[float]]) -> list[list[float]]:
    """The rows with zeros up to the longest. A direction with the factor 0 changes no bit."""
    longest = max(map(len, rows), default=0)
    return [[*row, *[0.0] * (longest - len(row))] for row in rows]


def _compressed(steps: list[int]) -> Tensor:
    """int64, [steps]; or only the first, [1], if they are consecutive, as in most runs."""
    if steps and steps == list(range(steps[0], steps[0] + len(steps))):
        steps = steps[:1]
    return torch.tensor(steps, dtype=torch.int64)


def _is_table(table: Tensor, num_rows: Collection[int], num_columns: int | None = None) -> bool:
    """Whether the table is finite float64, [num_rows, num_columns]."""
    return (
        table.dtype == torch.float64
        and table.ndim == 2
        and len(table) in num_rows
        and num_columns in (None, table.shape[1])
        and bool(table.isfinite().all())
    )


def _digest(header: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> str:
    """Digest of a whole file: one changed bit would give another model."""
    text = json.dumps(header) + fingerprint(tensors)
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()
