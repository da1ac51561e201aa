"""Flower's strategy and client app, on messages in one process, and with real processes."""

from __future__ import annotations

import pytest
import torch

flwr = pytest.importorskip("flwr", reason="needs pip install 'zofo[flower]'")

from flwr.app import ConfigRecord, Context, Message, RecordDict  # noqa: E402
from flwr.app.error import Error  # noqa: E402
from flwr.serverapp.strategy import FedAvg, FedMedian  # noqa: E402
from flwr.supercore.task_identity import TaskIdentity  # noqa: E402

from tests.federated.test_federated import OPTIONS, data_of  # noqa: E402
from tests.support.models import build  # noqa: E402
from zofo.errors import UserError  # noqa: E402
from zofo.federated import HybridStrategy, client_app  # noqa: E402
from zofo.federated import flower as room  # noqa: E402
from zofo.federated.base_log import num_bytes  # noqa: E402


def make_model(context=None):
    return build("llama", "lora", seed=context.node_config["seed"] if context else 0)


@pytest.fixture(autouse=True)
def identity(monkeypatch):
    """What Flower's processes know of themselves, without which they can make no message."""
    for name in ("run_id", "node_id", "task_id"):
        monkeypatch.setattr(TaskIdentity, f"_{name}", 7)


class Nodes:
    """A grid whose nodes run in this process, each message as in a new process."""

    def __init__(self, num=3, seeds=(0, 0, 0)):
        self.contexts = {
            number: Context(7, number, {"seed": seeds[i]}, RecordDict(), {})
            for i, number in enumerate(range(11, 11 + num))
        }
        self.app = client_app(make_model, lambda context: data_of(context.node_id - 11))
        self.dead = set()

    def get_node_ids(self):
        return list(self.contexts)

    def send_and_receive(self, messages, *, timeout=None):
        replies = []
        for message in messages:
            number = message.metadata.dst_node_id
            room._held.clear()
            copy = Message(message.content, number, message.metadata.message_type)
            if number in self.dead:
                reply = Message(Error(code=1, reason="no answer"), reply_to=copy)
            else:
                reply = self.app(copy, self.contexts[number])
            reply.metadata._src_node_id = number
            replies.append(reply)
        return replies


def fedavg(kind=FedAvg):
    return kind(min_train_nodes=1, min_evaluate_nodes=1, min_available_nodes=1)


def strategy(**options):
    return HybridStrategy(make_model, OPTIONS, adapter_strategy=fedavg(), **options)


def test_rounds_with_a_node_that_dies_and_comes_back(tmp_path):
    nodes, server = Nodes(), strategy(folder=tmp_path)
    result = server.start(nodes, server.arrays, num_rounds=2)
    nodes.dead = {12}
    result = server.start(nodes, result.arrays, num_rounds=2)
    nodes.dead = set()
    result = server.start(nodes, result.arrays, num_rounds=1)
    assert len(server.log) == 2 * (3 + 3 + 2 + 2 + 3)
    assert result.evaluate_metrics_clientapp[1]["accuracy"] == pytest.approx(0.5)
    copies = {
        str({**c.state[room.BASE_RECORD]}) for c in nodes.contexts.values()
    }  # the log of every node, which alone makes its base
    assert len(copies) == 1
    assert str({**ConfigRecord(server.log.since(0))}) in copies

    again = strategy(folder=tmp_path)  # the server's process ends, and a new one goes on
    assert again.log.digest() == server.log.digest()
    for name, array in again.arrays.items():
        assert (array.numpy() == result.arrays[name].numpy()).all()
    again.start(nodes, again.arrays, num_rounds=1)
    assert len(again.log) == len(server.log) + 6
    with pytest.raises(UserError, match="other options"):
        HybridStrategy(make_model, type(OPTIONS)(num_steps=3), folder=tmp_path)


def test_another_strategy_of_flower_takes_the_adapter():
    nodes = Nodes()
    server = HybridStrategy(make_model, OPTIONS, adapter_strategy=fedavg(FedMedian))
    result = server.start(nodes, server.arrays, num_rounds=1)
    assert set(result.arrays) == set(server.arrays)
    model = server.follow_rounds(result.arrays)
    for name, p in model.named_parameters():
        if name in result.arrays:
            assert torch.equal(p, torch.from_numpy(result.arrays[name].numpy().copy()))


def test_the_bytes_of_a_round_are_those_that_flower_counts():
    nodes, server = Nodes(), strategy()
    server.start(nodes, server.arrays, num_rounds=2)
    (_, wire) = server.wire
    assert wire.adapter_down == wire.adapter_up == 3 * server.arrays.count_bytes()
    record = server.log.since(0)
    assert num_bytes(record) == ConfigRecord(record).count_bytes()
    assert wire.base_up < wire.base_down < 3 * 2000


def test_a_node_with_another_base_is_left_out_and_one_error_ends_the_run_if_all_have():
    nodes, server = Nodes(seeds=(0, 1, 0)), strategy()
    server.start(nodes, server.arrays, num_rounds=1)
    assert len(server.log) == 2 * 2
    nodes, server = Nodes(seeds=(1, 1, 1)), strategy()
    with pytest.raises(UserError, match="fingerprint"):
        server.start(nodes, server.arrays, num_rounds=1)
