"""A party: its model, which follows the log, and its local steps.

    base       stands at the round's point x while the local steps measure s; the log moves it
    adapter    takes the local steps, from the server's values

A local step is that of `HybridOptimizer` with the base's learning rate 0. So the base needs neither
a copy nor a way back, and a local step costs what a hybrid step does.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor, nn

from zofo.disk.files import fingerprint
from zofo.errors import UserError
from zofo.federated.base_log import BaseLog
from zofo.federated.options import FederatedOptions
from zofo.optim.blocks import split_parameters
from zofo.optim.methods import param_groups
from zofo.optim.moved import mark_moved
from zofo.optim.optimizer import HybridOptimizer
from zofo.trainer.base_history import BaseSnapshot

Closure = Callable[[], Tensor]


@dataclass(frozen=True)
class LocalData:
    """The data of a party, which never leave it.

    Attributes:
        num_examples: number of training examples, the party's weight in every mean.
        losses: called with the model and a seed; returns an iterable of closures, one for each
            local step, which compute the loss of a batch as for `HybridOptimizer.step`. It has to
            last for `num_steps` batches.
        evaluate: called with the model in evaluation mode; returns metrics by name. It may give the
            number of its own examples as "num-examples". None: the party evaluates nothing.
    """

    num_examples: int
    losses: Callable[[nn.Module, int], Iterable[Closure]]
    evaluate: Callable[[nn.Module], Mapping[str, float]] | None = None


@dataclass(frozen=True)
class Contribution:
    """What a party gives to a round.

    Attributes:
        first_step: number of its first local step.
        rows: its scalars s, [steps, directions]; empty if the base stays.
        rank_one: tensor indices of the weights whose directions were rank-one.
        num_examples: its number of training examples.
        loss: mean loss of its local steps, NaN if none was finite.
    """

    first_step: int
    rows: tuple[tuple[float, ...], ...]
    rank_one: tuple[int, ...]
    num_examples: int
    loss: float


class Party:
    """A model that follows the log of a run. The parties in one process can share it.

    Args:
        make_model: returns the model with its adapter and its original base, equal on all parties.
        options: the options of the run.
        snapshots: a folder for a copy of the moved base, so that a new process replays only the
            rows after it; None: no copies.
        snapshot_every: rows of the log between two copies.

    Attributes:
        model: the model.
        log: an empty log of this model, to compare and to copy.
    """

    def __init__(
        self,
        make_model: Callable[[], nn.Module],
        options: FederatedOptions,
        *,
        snapshots: Path | None = None,
        snapshot_every: int = 1000,
    ) -> None:
        self._make_model = make_model
        self._snapshot = None if snapshots is None else BaseSnapshot(snapshots, snapshot_every)
        self._is_checked = False
        self.model = make_model()
        self.log = BaseLog.begin(self.model, options)
        self._stand(self.model)

    def _stand(self, model: nn.Module) -> None:
        """Take a model whose base is the original."""
        self.model = model
        blocks = split_parameters(model)
        self.base, self._adapter = blocks.base, blocks.adapter
        self._position: int | None = 0  # None while the base moves
        self._digest = self.log.digest()

    @property
    def adapter(self) -> dict[str, Tensor]:
        """A copy of the adapter: name -> tensor, on the CPU."""
        return {name: p.detach().cpu().clone() for name, p in self._adapter.items()}

    @adapter.setter
    @torch.no_grad()
    def adapter(self, values: Mapping[str, Tensor]) -> None:
        different = [
            name
            for name in self._adapter.keys() | values.keys()
            if name not in self._adapter
            or name not in values
            or self._adapter[name].shape != values[name].shape
        ]
        if different:
            raise UserError(
                f"the server's adapter and this party's differ in {min(different)!r} "
                f"({len(different)} tensors in all); make the same adapter on every party"
            )
        for name, parameter in self._adapter.items():
            parameter.copy_(values[name])

    def follow(self, log: BaseLog) -> None:
        """Bring the base to the end of the log, bit for bit."""
        position = self._position
        if position is None or position > len(log) or log.digest(position) != self._digest:
            # The base has rows that this log lacks, so it starts again.
            adapter, position = self.adapter, 0
            self._stand(self._make_model())
            self.adapter = adapter
        if position == 0 and self._snapshot is not None:
            position = self._snapshot.restore(self.base, log.trajectory, log.base_fingerprint)
        self._position = None
        log.trajectory.replay(self.base, start=position)
        self._position, self._digest = len(log), log.digest()
        mark_moved(self.model, has_moved=log.trajectory.moves_weights)
        if self._snapshot is not None:
            self._snapshot.write_if_due(self.base, log.trajectory, log.base_fingerprint)

    def train(self, log: BaseLog, data: LocalData, first_step: int) -> Contribution:
        """Take the local steps of a round. The adapter moves, and the base does not.

        Args:
            log: the log, which the base follows first.
            data: the party's data.
            first_step: number of the first local step, which addresses its directions.

        Raises:
            UserError: if the data end before the last local step.
        """
        self.follow(log)
        options = log.options
        optimizer = HybridOptimizer(
            param_groups(
                self.model,
                options.method,
                base_lr=dict.fromkeys(options.base_rates, 0.0) or 0.0,
                adapter_lr=options.adapter_lr,
                adapter_weight_decay=options.adapter_weight_decay,
            ),
            self.model,
            optimizer=options.optimizer,
            seed=options.seed,
            max_grad_norm=options.max_grad_norm,
            options=options,
            self_check=options.self_check and not self._is_checked,
        )
        if len(log):
            # One update tells the optimizer that the base has moved.
            last = log.trajectory.updates[-1:]
            optimizer.trajectory = replace(log.trajectory, updates=last)
        optimizer.step_count = first_step
        rows: list[tuple[float, ...]] = []
        losses: list[float] = []
        self.model.train()
        with torch.random.fork_rng():
            seed = local_seed(options.seed, first_step)
            torch.manual_seed(seed)
            closures = iter(data.losses(self.model, seed))
            for step in range(options.num_steps):
                closure = next(closures, None)
                if closure is None:
                    raise UserError(
                        f"the data of this party end after {step} local steps, and a round has "
                        f"{options.num_steps}; let `losses` begin again with the first rows"
                    )
                optimizer.step(closure)
                report = optimizer.last_step
                assert report is not None
                if report.non_finite:
                    rows.append(())
                else:
                    rows.append(report.projected_grad)
                    losses.append(float(report.loss or 0.0))
        self._is_checked = True
        for parameter in self._adapter.values():
            parameter.grad = None
        longest = max(map(len, rows))  # A direction with the scalar 0 moves nothing.
        return Contribution(
            first_step,
            tuple((*row, *[0.0] * (longest - len(row))) for row in rows) if longest else (),
            tuple(sorted(optimizer.rank_one)),
            data.num_examples,
            sum(losses) / len(losses) if losses else math.nan,
        )

    def evaluate(self, log: BaseLog, data: LocalData) -> dict[str, float]:
        """The party's metrics at the end of the log, with the present adapter."""
        self.follow(log)
        self.model.eval()
        found = {} if data.evaluate is None else dict(data.evaluate(self.model))
        return {"num-examples": data.num_examples, **found}

    def base_fingerprint(self) -> str:
        """Fingerprint of the base as it is now."""
        return fingerprint(self.base)


def local_seed(seed: int, first_step: int) -> int:
    """The seed of the order of rows and of the dropout masks, in [0, 2^63)."""
    content = f"{seed} {first_step}".encode()
    return int.from_bytes(hashlib.blake2b(content, digest_size=8).digest()) >> 1
