"""The base as a function of its history: one scalar per direction and step.

    w_{t+1} = round((1 − lr_t · weight_decay) · w_t − (lr_t / K) Σ_k s_{t,k} v_{t,k})

Directions and rounding are pure functions of their address, so the recorded scalars and learning
rates are the whole difference between the original base and the trained one: a full-model
fine-tune at a few bytes a step. Training moves the weights by `Update.apply`, one step at a time.
`Trajectory.replay` applies many updates in one pass over the weights and gives the same bits.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor, nn

from zofo.disk.files import fingerprint, read_tensors, refusing, write_tensors
from zofo.errors import UserError
from zofo.noise.combine import DISTRIBUTIONS, Distribution, combine_many, combine_steps
from zofo.noise.philox import MAX_DIRECTIONS, MAX_STEP, MAX_TENSORS, NOISE_VERSION

FORMAT_VERSION = 1
DTYPE_POLICY = "float32 arithmetic, stochastic rounding to 16 bits"
"""How an update is computed and stored; float64 weights are computed in float64."""
TRAJECTORY_FILE: Final = "base_trajectory.safetensors"
_REPLAY_BLOCK = 4096
"""Updates in one pass: their scalars stay small beside the chunk of weights."""


@dataclass(frozen=True)
class GroupSpec:
    """Which base tensors a group holds, by name, and the indices of their directions."""

    # GroupSpec and Update keep their names and fields: `BaseSnapshot` of zofo.trainer hashes their
    # `repr` to tell whether a copy of the base lies on a trajectory.
    names: tuple[str, ...]
    tensors: tuple[int, ...]


@dataclass(frozen=True)
class Update:
    """One step of one group.

    Attributes:
        step: address of the directions.
        projected_grad: s_k, one a direction.
        lr: learning rate.
        weight_decay: decoupled weight decay.
    """

    step: int
    projected_grad: tuple[float, ...]
    lr: float
    weight_decay: float

    @property
    def coefficients(self) -> list[float]:
        """What each direction is added with."""
        num_directions = len(self.projected_grad)
        return [-self.lr * s / num_directions for s in self.projected_grad]

    @property
    def decay(self) -> float:
        """The factor of the weight."""
        return 1.0 - self.lr * self.weight_decay

    def apply(
        self,
        parameters: Iterable[Tensor],
        tensors: Iterable[int],
        *,
        seed: int,
        distribution: Distribution,
        unread: Tensor | None = None,
    ) -> None:
        """Move the parameters in place. A rate of 0 leaves every bit as it is.

        Args:
            parameters: the weights of the group.
            tensors: the indices of their directions.
            seed: run seed.
            distribution: of the directions.
            unread: the scalars while they are still on the device: float64, [directions]. They
                replace `projected_grad` and give the same bits. If one of them is not finite,
                nothing moves. None: `projected_grad` holds the scalars.
        """
        if self.lr == 0:
            return
        combine_many(
            list(parameters),
            self.coefficients if unread is None else unread * -self.lr / len(unread),
            decay=self.decay,
            seed=seed,
            step=self.step,
            tensors=list(tensors),
            distribution=distribution,
            rounding="stochastic",
        )


@dataclass
class Trajectory:
    """Every zeroth-order update of the base in a run.

    Attributes:
        seed: run seed of the directions.
        distribution: of the directions.
        eps: smoothing radius (for the record; replay does not need it).
        estimator: likewise.
        groups: what each recorded group holds.
        updates: one row a step, in it one update a group.
    """

    seed: int
    distribution: Distribution
    eps: float
    estimator: str
    groups: tuple[GroupSpec, ...]
    updates: list[tuple[Update, ...]] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.updates)

    def replay(
        self,
        parameters: Mapping[str, nn.Parameter],
        *,
        start: int = 0,
        stop: int | None = None,
        progress: Callable[[int, int], None] | None = None,
    ) -> None:
        """Apply updates start .. stop to the parameters, in place.

        Each weight takes a block of updates in one pass over its memory; the bits are those of the
        updates one by one.

        Args:
            parameters: name -> parameter at its value before update `start`.
            start: first update.
            stop: one past the last; None: all.
            progress: called with the numbers of weights done and to be done.

        Raises:
            UserError: if a recorded name is missing.
        """
        missing = [n for g in self.groups for n in g.names if n not in parameters]
        if missing:
            raise UserError(
                f"the trajectory moves {missing[0]!r} ({len(missing)} missing in all), which this "
                "model does not have; load it on the base it was recorded on"
            )
        num_done = 0
        num_weights = sum(parameters[n].numel() for g in self.groups for n in g.names)
        for g, group in enumerate(self.groups):
            # A rate of 0 leaves every bit as it is.
            updates = [row[g] for row in self.updates[start:stop] if row[g].lr != 0]
            for name, tensor in zip(group.names, group.tensors, strict=True):
                for block in range(0, len(updates), _REPLAY_BLOCK):
                    part = updates[block : block + _REPLAY_BLOCK]
                    combine_steps(
                        parameters[name],
                        [update.coefficients for update in part],
                        decays=[update.decay for update in part],
                        steps=[update.step for update in part],
                        seed=self.seed,
                        tensor=tensor,
                        distribution=self.distribution,
                        rounding="stochastic",
                    )
                if progress is not None:
                    num_done += parameters[name].numel()
                    progress(num_done, num_weights)

    def save(self, path: Path, **extra: Any) -> None:
        """Write safetensors, whole or not at all; `extra` goes to the metadata as JSON."""
        rows = self.updates

        def column(get: Callable[[Update], float]) -> Tensor:
            """[steps, groups], or [1, groups] if it never changes."""
            values = [[get(update) for update in row] for row in rows]
            table = torch.tensor(values, dtype=torch.float64).reshape(len(rows), len(self.groups))
            return table[:1].clone() if rows and bool((table == table[0]).all()) else table

        scalars = [row[0].projected_grad for row in rows]
        tensors = {
            "step": _without_run([row[0].step for row in rows]),
            "projected_grad": torch.tensor(scalars, dtype=torch.float64).reshape(
                len(rows), len(scalars[0]) if scalars else 0
            ),
            "lr": column(lambda update: update.lr),
            "weight_decay": column(lambda update: update.weight_decay),
        }
        header = {
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
        header["digest"] = _digest(header, tensors)
        write_tensors(path, tensors, {"zofo": json.dumps(header)})

    @classmethod
    def load(cls, path: Path) -> tuple[Trajectory, dict[str, Any]]:
        """Read a trajectory and its metadata.

        Raises:
            UserError: if the file is missing, damaged, or of another version.
        """
        tensors, metadata = read_tensors(path)
        with refusing(f"{path} is not a trajectory of zofo, or is damaged"):
            header = json.loads(metadata["zofo"])
            versions = {
                "format": FORMAT_VERSION,
                "noise_version": NOISE_VERSION,
                "dtype_policy": DTYPE_POLICY,
            }
            for key, known in versions.items():
                if header[key] != known:
                    raise UserError(
                        f"{path} has {key} {header[key]!r:.80}; this zofo reads {known}: install "
                        "the zofo that wrote it"
                    )
            if header.pop("digest") != _digest(header, tensors):
                raise UserError(f"{path} is damaged (its digest does not fit); copy it again")
            trajectory = _from_file(header, tensors)
        return trajectory, header


def check_base(base: Mapping[str, Tensor], expected: str | None, owner: str) -> None:
    """Refuse a base that is not the one a trajectory or adapter belongs to.

    Args:
        base: name -> tensor.
        expected: its fingerprint on record.
        owner: what has it on record, for the message.

    Raises:
        UserError: if the fingerprints differ.
    """
    found = fingerprint(base)
    if found != expected:
        raise UserError(
            f"{owner} was trained on a base with fingerprint {expected}, this base has {found}; "
            "load the base that the run began with"
        )


def _from_file(header: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Trajectory:
    """What a file says, checked: a digest tells damage, not whether the writer meant well.

    Raises:
        ValueError, KeyError, TypeError: if it says what no run records.
    """
    groups = tuple(GroupSpec(tuple(g["names"]), tuple(g["tensors"])) for g in header["groups"])
    names = [name for group in groups for name in group.names]
    indices = [index for group in groups for index in group.tensors]
    steps, scalars = tensors["step"], tensors["projected_grad"]
    num_steps = len(scalars)
    tables = [tensors[key] for key in ("lr", "weight_decay")]
    seed, eps = header["seed"], header["eps"]
    sound = {
        "num_steps": header["num_steps"] == num_steps,
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
        "lr and weight_decay": all(_is_table(t, (1, num_steps), len(groups)) for t in tables),
    }
    wrong = [key for key, is_sound in sound.items() if not is_sound]
    if wrong:
        raise ValueError(f"{', '.join(wrong)} cannot be")
    if len(steps) < num_steps:
        steps = steps + torch.arange(num_steps)
    lrs, decays = (table.expand(num_steps, len(groups)).tolist() for table in tables)
    updates = [
        tuple(Update(step, tuple(s), lr, wd) for lr, wd in zip(row_lr, row_wd, strict=True))
        for step, s, row_lr, row_wd in zip(
            steps.tolist(), scalars.tolist(), lrs, decays, strict=True
        )
    ]
    return Trajectory(seed, header["distribution"], eps, header["estimator"], groups, updates)


def _without_run(steps: list[int]) -> Tensor:
    """The steps, or only the first of them if they follow one another, as in most runs."""
    if steps and steps == list(range(steps[0], steps[0] + len(steps))):
        steps = steps[:1]
    return torch.tensor(steps, dtype=torch.int64)


def _is_table(table: Tensor, num_rows: Collection[int], num_columns: int | None = None) -> bool:
    """Finite float64 of that shape."""
    return (
        table.dtype == torch.float64
        and table.ndim == 2
        and len(table) in num_rows
        and num_columns in (None, table.shape[1])
        and bool(table.isfinite().all())
    )


def _digest(header: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> str:
    """Of a file's whole content: one changed bit would be another model."""
    text = json.dumps(header) + fingerprint(tensors)
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()
