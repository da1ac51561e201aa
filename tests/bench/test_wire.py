"""The bytes that processes send for a step, counted by the code and by the kernel."""

from __future__ import annotations

import json
import multiprocessing
import socket

import pytest
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
from typer.testing import CliRunner

from tests.support.groups import in_group
from zofo.bench import launch, wire
from zofo.bench.models import Workbench
from zofo.bench.settings import Settings
from zofo.cli.app import app
from zofo.optim.gradient_bytes import GradientBytes

SMALL = ("--model", "random:llama-tiny", "--device", "cpu", "--batch", "4", "--length", "8")
ROWS = 4


def bench(*arguments):
    words = map(str, arguments)
    return CliRunner().invoke(app, ["bench", *SMALL, "--rounds", "2", "--threads", "1", *words])


@pytest.fixture
def forks(monkeypatch):
    """The processes are forks, because a new one imports for ten seconds."""
    if torch.cuda.is_available():
        pytest.skip("a fork of a process that uses CUDA cannot compute gradients")
    monkeypatch.setattr(launch, "START_METHOD", "fork")


def bytes_of_whole_model():
    """The bytes of gradients that DistributedDataParallel sends a step for the whole model."""
    workbench = Workbench(Settings("random:llama-tiny", batch=4, length=8, device="cpu"))
    model, counter = DistributedDataParallel(workbench.plain), GradientBytes()
    counter.count(model)
    workbench.loss(model).backward()
    return counter.sent


def test_what_is_counted_and_what_is_computed(forks, tmp_path):
    path = tmp_path / "wire.json"
    done = bench("--wire", "--json", path)
    assert done.exit_code == 0, done.output
    found = json.loads(path.read_text())
    rows = {row["name"]: row for row in found["rows"]}
    for name, row in rows.items():
        assert name in done.stdout
        if row["tcp_bytes"] is not None:
            assert row["tcp_bytes"] > row["bytes"]  # There are headers.
    assert rows["hybrid: base, one direction"]["bytes"] == 16
    assert rows["hybrid-rows: base, a direction for each row"]["bytes"] == 8 * ROWS + 8 + 4
    adapter = found["sizes"]["adapter"]
    for name in ("hybrid: adapter", "hybrid-rows: adapter", "DDP of the adapter"):
        assert rows[name]["bytes"] == adapter
    assert rows["DDP of the whole model"]["bytes"] == in_group(2, bytes_of_whole_model)[0]
    assert rows["FedAvg of the whole model"]["bytes"] == found["sizes"]["base"]
    assert rows["FedAvg of the whole model"]["ratio"] == pytest.approx(
        found["sizes"]["base"] / (16 + adapter)
    )
    assert found["command"][:5] == ["zofo", "bench", "--wire", "--processes", "2"]


def test_the_kernel_counts_what_a_connection_sends():
    with socket.create_server(("127.0.0.1", 0)) as server:
        here = socket.create_connection(server.getsockname())
        there, _ = server.accept()
    with here, there:
        before = wire.tcp_bytes_sent()
        if before is None:
            pytest.skip("this kernel does not count")
        here.sendall(bytes(1000))
        there.sendall(bytes(234))
        assert wire.tcp_bytes_sent() - before == 1234


def fails_on_rank_1(settings):
    if dist.get_rank() == 1:
        raise RuntimeError("no such luck")
    dist.barrier()


def is_interrupted(*args, **kwargs):
    raise KeyboardInterrupt


def test_a_process_that_fails_is_one_error_and_none_is_left(forks, monkeypatch):
    monkeypatch.setattr(wire, "count_here", fails_on_rank_1)
    done = bench("--wire")
    assert done.exit_code == 2
    assert "process 1 failed: RuntimeError: no such luck" in done.stderr
    assert done.stdout == ""
    assert multiprocessing.active_children() == []


def test_ctrl_c_leaves_no_process(forks, monkeypatch):
    monkeypatch.setattr(launch.mp.ProcessContext, "join", is_interrupted)
    assert bench("--wire").exit_code == 130
    assert multiprocessing.active_children() == []


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--wire", "--processes", "1"], "processes is 1; it must lie in [2, 64]"),
        (["--processes", "3"], "only with --wire"),
        (["--wire", "--only", "hybrid"], "--only has no effect with --wire"),
        (["--wire", "--no-memory"], "--no-memory has no effect with --wire"),
        (["--wire", "--model", "./nowhere"], "does not exist"),
        (["--wire", "--json", "."], "is a folder"),
    ],
)
def test_bad_options_are_one_message_before_a_process_starts(arguments, words):
    done = bench(*arguments)
    assert done.exit_code == 2
    assert done.stderr.startswith("error: ")
    assert words in done.stderr
    assert done.stdout == ""
