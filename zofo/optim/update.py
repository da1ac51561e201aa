"""One update of a group of weights, with the same bits in training and in a replay.

    w ← round(w + lr λ (w_0 − w))                                          if there is an anchor λ
    w ← round((1 − lr · weight_decay) · w − (lr / K) Σ_k s_k v_k)

w_0 is the weight before training. The pull towards it (`zofo.noise.pull`) is a pass of its own.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from zofo.noise.combine import Distribution, combine_many
from zofo.noise.pull import pull
from zofo.perturb.quantized import unit_of
from zofo.perturb.shards import local_part


@dataclass(frozen=True)
class GroupSpec:
    """The base tensors of a parameter group: their names and their tensor indices."""

    # Keep the names and the shown fields of GroupSpec and Update: zofo.trainer.base_history hashes
    # their `repr` to check whether a copy of the base belongs to a trajectory.
    names: tuple[str, ...]
    tensors: tuple[int, ...]


@dataclass(frozen=True, slots=True)  # A long run keeps millions.
class Update:
    """One step of one parameter group."""

    step: int  # addresses the directions
    projected_grad: tuple[float, ...]  # s_k, one per direction
    lr: float
    weight_decay: float  # decoupled
    anchor: float = field(default=0.0, repr=False)  # λ

    def coefficients(
        self, kind: tuple[Distribution, bool, float], unread: Tensor | None = None
    ) -> Tensor:
        """The factor of each direction of a weight: float64, [directions].

        Args:
            kind: distribution of the run, whether the weight's directions are rank-one, their unit.
            unread: as for `apply`.
        """
        distribution, is_rank_one, unit = kind
        own = self.projected_grad
        scalars = torch.tensor(own, dtype=torch.float64) if unread is None else unread
        if distribution == "rank-one" and not is_rank_one:
            scalars = total(scalars)[None]
        factors = scalars * -self.lr
        return (factors if distribution == "rank-one" else factors / len(scalars)) * unit

    @property
    def decay(self) -> float:
        """The factor of the weight: 1 − lr · weight_decay."""
        return 1.0 - self.lr * self.weight_decay

    def apply(
        self,
        parameters: Iterable[Tensor],
        tensors: Iterable[int],
        *,
        seed: int,
        distribution: Distribution,
        rank_one: Collection[int] = (),
        unread: Tensor | None = None,
        original: Iterable[Tensor] = (),
    ) -> None:
        """Update the parameters in place. A learning rate of 0 leaves every bit unchanged.

        Args:
            parameters: the weights of the group; of a sharded one, this process's shard changes.
            tensors: the tensor indices that address their directions.
            seed: seed of the run.
            distribution: distribution of the directions.
            rank_one: tensor indices of the weights whose directions are rank-one.
            unread: the scalars s_k while they are on the device, float64, shape [directions]. They
                replace `projected_grad` and give the same bits. If any is NaN or infinite, no
                weight changes. None: use `projected_grad`.
            original: the weights before training, one for each parameter, read one at a time if
                there is an anchor.
        """
        if self.lr == 0:
            return
        if self.anchor:
            parameters, tensors = list(parameters), list(tensors)
            for parameter, tensor, origin in zip(parameters, tensors, original, strict=True):
                self.pull(parameter, origin, seed=seed, tensor=tensor)
        kinds: dict[tuple[bool, float], list[tuple[Tensor, int]]] = {}
        for parameter, tensor in zip(parameters, tensors, strict=True):
            kind = tensor in rank_one, unit_of(parameter)
            kinds.setdefault(kind, []).append((parameter, tensor))
        for (is_rank_one, unit), pairs in kinds.items():
            parts = [local_part(parameter) for parameter, _ in pairs]
            factors = self.coefficients((distribution, is_rank_one, unit), unread)
            combine_many(
                [part for part, _ in parts],
                factors.tolist() if unread is None else factors,
                decay=self.decay,
                seed=seed,
                step=self.step,
                tensors=[tensor for _, tensor in pairs],
                offsets=[offset for _, offset in parts],
                distribution=drawn_from(distribution, is_rank_one=is_rank_one),
                rounding="stochastic",
            )

    def pull(self, parameter: Tensor, origin: Tensor, *, seed: int, tensor: int) -> None:
        """Move a weight the share lr λ of the way to `origin`, in place."""
        share = self.lr * self.anchor
        pull(parameter, origin, share, seed=seed, step=self.step, tensor=tensor)


def drawn_from(distribution: Distribution, *, is_rank_one: bool) -> Distribution:
    """The distribution of one weight: a run with rank-one directions has signs elsewhere."""
    return "rademacher" if distribution == "rank-one" and not is_rank_one else distribution


def total(scalars: Tensor) -> Tensor:
    """Sum float64 scalars [n] to [], with the same bits on every device: by halves."""
    while len(scalars) > 1:
        half = len(scalars) // 2
        pairs = scalars[:half] + scalars[half : 2 * half]
        scalars = torch.cat((pairs, scalars[2 * half :]))
    return scalars.sum()  # of one, or of none
