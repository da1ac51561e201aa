"""Federated hybrid training on Flower: a strategy for its `ServerApp`, and a `ClientApp`.

    adapter   arrays, by any of Flower's strategies, such as FedAvg
    base      scalars and seeds in both directions, in a record beside the arrays

Flower starts the processes, carries the messages and chooses the parties of a round. A `ClientApp`
may run each message in a new process. Flower keeps the party's copy of the log, a few bytes a
direction, and the model is made anew and follows it.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid
from flwr.serverapp.strategy import FedAvg, Strategy
from torch import Tensor, nn

from zofo.disk.files import read_tensors, refusing, write_tensors
from zofo.errors import UserError
from zofo.federated.base_log import BaseLog
from zofo.federated.exchange import (
    REFUSAL,
    Coordinator,
    Task,
    answer,
    check_protocol,
    record_of,
)
from zofo.federated.options import FederatedOptions
from zofo.federated.party import LocalData, Party
from zofo.optim.trajectory import TRAJECTORY_FILE

BASE_RECORD: Final = "zofo"
"""The name of the record of the base in every message, and of the party's copy of the log."""
ADAPTER_FILE: Final = "adapter.safetensors"
_log = logging.getLogger("flwr")
_held: dict[Any, tuple[Party, dict[int, LocalData]]] = {}
"""The party of this process, and the data of its nodes. Flower loads the app's module anew for each
message, so the model that it made is kept here."""


@dataclass
class RoundBytes:
    """Bytes of the records of one round, for all parties together, as Flower counts them.

    Attributes:
        base_down: base, server to parties, in training messages.
        base_up: base, parties to server.
        adapter_down: adapter, server to parties.
        adapter_up: adapter, parties to server.
        evaluation: base and adapter in the messages of the evaluation.
    """

    base_down: int = 0
    base_up: int = 0
    adapter_down: int = 0
    adapter_up: int = 0
    evaluation: int = 0


class HybridStrategy(Strategy):
    """A strategy of Flower that moves the base by scalars, and the adapter by another strategy.

    Args:
        make_model: returns the model with its adapter and its original base, as on every party.
        options: the options of the run, which the parties get from here.
        adapter_strategy: the strategy for the adapter, which also chooses the parties of a round;
            None: `FedAvg()`.
        folder: after each round, log and adapter are written here. If the folder holds those of a
            run with the same options, that run goes on. None: nothing is written.

    Attributes:
        party: the server's own model. `follow_rounds` brings it up to date.
        log: the log of the base: a `Trajectory` and what it belongs to.
        arrays: the adapter at the start, for `start(grid, strategy.arrays)`.
        wire: bytes of each round, the newest last.

    Raises:
        UserError: if an option lies outside its range, or the folder holds another run.
    """

    def __init__(
        self,
        make_model: Callable[[], nn.Module],
        options: FederatedOptions,
        *,
        adapter_strategy: Strategy | None = None,
        folder: str | Path | None = None,
    ) -> None:
        self.adapter_strategy = adapter_strategy or FedAvg()
        self.party = Party(make_model, options)
        self.folder = None if folder is None else Path(folder)
        self.log = self.party.log.copy()
        adapter = self.party.adapter
        if self.folder is not None and (self.folder / ADAPTER_FILE).exists():
            self.log, adapter = self._written(self.folder)
        self.arrays = arrays_of(adapter)
        self.wire: list[RoundBytes] = []
        self._coordinator = Coordinator(self.log)

    def summary(self) -> None:
        """Log the settings of both blocks."""
        _log.info("\t├──> Base, by scalars: %s", self.log.options.to_json())
        _log.info("\t└──> Adapter, by %s:", type(self.adapter_strategy).__name__)
        self.adapter_strategy.summary()

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Messages of the adapter's strategy, each with the party's record of the base."""
        self.wire.append(RoundBytes())
        messages = list(self.adapter_strategy.configure_train(server_round, arrays, config, grid))
        self.wire[-1].adapter_down = len(messages) * arrays.count_bytes()
        self.wire[-1].base_down = self._add_tasks(messages, trains=True)
        return messages

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """Add the scalars to the log, and give the adapters to the adapter's strategy."""
        replies = sorted(replies, key=lambda reply: reply.metadata.src_node_id)
        records, failed = {}, []
        for reply in replies:
            party = reply.metadata.src_node_id
            if reply.has_error():
                failed.append(reply)
                continue
            content = reply.content
            record = dict(content.config_records.get(BASE_RECORD, ConfigRecord()))
            self.wire[-1].base_up += ConfigRecord(record).count_bytes()
            for arrays in content.array_records.values():
                self.wire[-1].adapter_up += arrays.count_bytes()
                if not _is_finite(arrays):
                    record[REFUSAL] = "its adapter is not finite"
            metrics = next(iter(content.metric_records.values()), MetricRecord())
            if not metrics and not record.get("is_behind"):
                record.setdefault(REFUSAL, "its reply has no metrics")
            records[party] = record, metrics.get("num-examples", 0)
        left_out = self._coordinator.join(records)
        refusals = [record[REFUSAL] for record, _ in records.values() if REFUSAL in record]
        self._tell(left_out, refusals, len(records))
        accepted = [
            r for r in replies if not r.has_error() and r.metadata.src_node_id not in left_out
        ]
        for reply in accepted:
            del reply.content[BASE_RECORD]  # the other strategy knows nothing of it
        joined = self.adapter_strategy.aggregate_train(server_round, [*accepted, *failed])
        if joined[0] is not None and self.folder is not None:
            self._write(self.folder, joined[0])
        _log.info("\t└──> Bytes of the round: %s", vars(self.wire[-1]))
        return joined

    def configure_evaluate(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Messages of the adapter's strategy, each with the rows that the party lacks."""
        messages = list(
            self.adapter_strategy.configure_evaluate(server_round, arrays, config, grid)
        )
        sent = self._add_tasks(messages, trains=False) + len(messages) * arrays.count_bytes()
        if self.wire:
            self.wire[-1].evaluation += sent
        return messages

    def aggregate_evaluate(
        self, server_round: int, replies: Iterable[Message]
    ) -> MetricRecord | None:
        """Give the metrics to the adapter's strategy."""
        kept, left_out, refusals = [], {}, []
        for reply in sorted(replies, key=lambda reply: reply.metadata.src_node_id):
            problem = None
            if not reply.has_error():
                record = reply.content.config_records.get(BASE_RECORD, ConfigRecord())
                problem = self._coordinator.problem_of(reply.metadata.src_node_id, record)
            if problem is None:
                kept.append(reply)
            else:
                left_out[reply.metadata.src_node_id] = problem
                refusals += [problem] if REFUSAL in record else []
        self._tell(left_out, refusals, len(kept) + len(left_out))
        return self.adapter_strategy.aggregate_evaluate(server_round, kept)

    def follow_rounds(self, arrays: ArrayRecord) -> nn.Module:
        """The server's model with the present base and this adapter, in evaluation mode."""
        self.party.follow(self.log)
        self.party.adapter = tensors_of(arrays)
        return self.party.model.eval()

    def _add_tasks(self, messages: list[Message], *, trains: bool) -> int:
        """Add the record of the base to each message; return the bytes of all records."""
        parties = [message.metadata.dst_node_id for message in messages]
        tasks = self._coordinator.tasks(parties, trains=trains)
        num_bytes = 0
        for message in messages:
            record = ConfigRecord(tasks[message.metadata.dst_node_id])
            # The strategy may give all messages one content, so each gets its own.
            message.content = RecordDict({**message.content, BASE_RECORD: record})
            num_bytes += record.count_bytes()
        return num_bytes

    def _tell(self, left_out: dict[int, str], refusals: list[str], num_replies: int) -> None:
        """Log who is left out.

        Raises:
            UserError: if every party refuses, so that the run cannot go on.
        """
        for party, problem in left_out.items():
            _log.warning("\t> party %d is left out of the round: %s", party, problem)
        if refusals and len(refusals) == num_replies:
            raise UserError(f"no party can take part in the round: {refusals[0]}")

    def _write(self, folder: Path, arrays: ArrayRecord) -> None:
        # The adapter comes last and names its position: a log that is longer is cut there.
        self.log.save(folder / TRAJECTORY_FILE)
        about = {"position": str(len(self.log)), "digest": self.log.digest()}
        write_tensors(folder / ADAPTER_FILE, tensors_of(arrays), about)

    def _written(self, folder: Path) -> tuple[BaseLog, dict[str, Tensor]]:
        log = BaseLog.load(folder / TRAJECTORY_FILE)
        if log.digest(0) != self.log.digest(0):
            raise UserError(
                f"{folder} holds a run with other options or another base; choose another folder, "
                "or the options of that run"
            )
        tensors, about = read_tensors(folder / ADAPTER_FILE)
        with refusing(f"{folder / ADAPTER_FILE} does not belong to the log beside it"):
            position = int(about["position"])
            if log.digest(position) != about["digest"]:
                raise ValueError("another digest")
        log.truncate(position)
        return log, tensors


def client_app(
    make_model: Callable[[Context], nn.Module],
    make_data: Callable[[Context], LocalData],
    *,
    snapshots: str | Path | None = None,
    snapshot_every: int = 1000,
) -> ClientApp:
    """Make the `ClientApp` of a party.

    Args:
        make_model: returns the model with its adapter and its original base, equal on all parties.
        make_data: returns the party's data. `context.node_config` tells which party it is.
        snapshots: a folder for a copy of the moved base, for Flower's SuperNode, which runs each
            message in a new process: it then replays only the rows after the copy. None: each
            process replays the whole log.
        snapshot_every: rows of the log between two copies.
    """
    app = ClientApp()

    def run(message: Message, context: Context, *, trains: bool) -> Message:
        task = dict(message.content.config_records[BASE_RECORD])
        state = context.state.config_records.get(BASE_RECORD)
        content = RecordDict()

        def work(read: Task) -> dict[str, Any]:
            (arrays,) = message.content.array_records.values()
            party.adapter = tensors_of(arrays)
            if not trains:
                content["metrics"] = MetricRecord(party.evaluate(read.log, data()))
                return {"position": len(read.log)}
            contribution = party.train(read.log, data(), read.first_step)
            (name,) = message.content.array_records
            content[name] = arrays_of(party.adapter)
            content["metrics"] = MetricRecord(
                {"num-examples": contribution.num_examples, "train-loss": contribution.loss}
            )
            return record_of(contribution, read.log)

        def data() -> LocalData:
            if context.node_id not in held:
                held[context.node_id] = make_data(context)
            return held[context.node_id]

        try:
            check_protocol(task)
            party, held = _party_of(
                make_model, context, str(task["options"]), snapshots, snapshot_every
            )
            record, copy = answer(work, party, state, task)
        except UserError as error:
            record, copy = {REFUSAL: str(error)}, None
        if copy is not None:
            context.state[BASE_RECORD] = ConfigRecord(copy)
        content[BASE_RECORD] = ConfigRecord(record)
        return Message(content, reply_to=message)

    @app.train()
    def train(message: Message, context: Context) -> Message:
        return run(message, context, trains=True)

    @app.evaluate()
    def evaluate(message: Message, context: Context) -> Message:
        return run(message, context, trains=False)

    return app


def _party_of(
    make_model: Callable[[Context], nn.Module],
    context: Context,
    options: str,
    snapshots: str | Path | None,
    snapshot_every: int,
) -> tuple[Party, dict[int, LocalData]]:
    """The model of this process, which all nodes in it share, and the data of the nodes."""
    key = context.run_id, make_model.__module__, make_model.__qualname__, options
    if key not in _held:
        _held.clear()  # that of another run, as large as a model
        party = Party(
            lambda: make_model(context),
            FederatedOptions.from_json(options),
            snapshots=None if snapshots is None else Path(snapshots),
            snapshot_every=snapshot_every,
        )
        _held[key] = party, {}
    return _held[key]


def arrays_of(adapter: dict[str, Tensor]) -> ArrayRecord:
    """The adapter as a record of Flower; bfloat16, which numpy lacks, becomes float32."""
    return ArrayRecord(
        {
            name: Array((t.float() if t.dtype == torch.bfloat16 else t).contiguous().numpy())
            for name, t in adapter.items()
        }
    )


def tensors_of(arrays: ArrayRecord) -> dict[str, Tensor]:
    """The adapter in a record of Flower: name -> tensor."""
    return {name: torch.from_numpy(array.numpy().copy()) for name, array in arrays.items()}


def _is_finite(arrays: ArrayRecord) -> bool:
    return all(bool(t.isfinite().all()) for t in tensors_of(arrays).values())
