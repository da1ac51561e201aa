"""Tests of rounds, ratios and settings, and of the results after an interruption."""

from __future__ import annotations

import gc
import io
import subprocess
import sys

import pytest
import torch
from rich.console import Console
from typer.testing import CliRunner

from tests.support.forks import in_forks
from zofo.bench.memory import measure, measure_here
from zofo.bench.noise import kernels
from zofo.bench.report import show
from zofo.bench.results import Memory, NoiseTimes, Ratio, Results, Row, StepTimes, ratios_of
from zofo.bench.settings import CONTENDERS, Settings, settings_from
from zofo.bench.timing import time_rounds, warm_up
from zofo.cli.app import app
from zofo.errors import UserError
from zofo.noise.combine import direction

CPU = torch.device("cpu")
TINY = Settings("random:llama-tiny", batch=2, length=8, device="cpu", threads=(1,), elements=1001)


class Scripted:
    """Contender that logs its calls and raises `error` at step number `at`."""

    def __init__(self, name, log, at=None, error=None):
        self.name, self.log, self.at, self.error = name, log, at, error
        self.num_steps = 0

    def enter(self):
        self.log.append(f"enter {self.name}")

    def step(self):
        self.num_steps += 1
        if self.num_steps == self.at:
            raise self.error
        self.log.append(self.name)

    def leave(self):
        self.log.append(f"leave {self.name}")


def test_every_round_times_each_once_and_begins_with_the_next():
    log, seconds = [], {}
    time_rounds({n: Scripted(n, log) for n in "abc"}, 4, CPU, seconds=seconds)
    assert "".join(word for word in log if len(word) == 1) == "abc" + "bca" + "cab" + "abc"
    assert log[:3] == ["enter a", "a", "leave a"]
    assert {name: len(samples) for name, samples in seconds.items()} == {"a": 4, "b": 4, "c": 4}
    assert gc.isenabled()


def test_an_interruption_keeps_what_was_measured():
    log, seconds = [], {}
    contenders = {"a": Scripted("a", log), "b": Scripted("b", log, 3, KeyboardInterrupt())}
    with pytest.raises(KeyboardInterrupt):
        time_rounds(contenders, 5, CPU, seconds=seconds)
    assert {name: len(samples) for name, samples in seconds.items()} == {"a": 3, "b": 2}
    assert log[-1] == "leave b"
    assert len(Ratio("", ("a",), ("b",)).samples(seconds)) == 2
    assert gc.isenabled()


def test_what_lacks_memory_is_left_out_and_other_errors_are_not_hidden():
    failed, log = {}, []
    contenders = {
        "a": Scripted("a", log, 1, torch.OutOfMemoryError("too large")),
        "b": Scripted("b", log),
    }
    warm_up(contenders, CPU, failed=failed)
    assert failed == {"a": "out of memory"}
    assert list(contenders) == ["b"]
    with pytest.raises(RuntimeError, match="shapes"):
        warm_up({"c": Scripted("c", log, 1, RuntimeError("shapes"))}, CPU, failed=failed)


def test_ratios_are_taken_within_rounds():
    seconds = {"a": [1.0, 10.0, 1.0], "b": [2.0, 40.0, 1.0], "c": [2.0, 10.0, 3.0, 7.0]}
    table = (Ratio("a / (b + c)", ("a",), ("b", "c")), Ratio("a / d", ("a",), ("d",)))
    found = ratios_of(table, seconds)
    assert list(found) == ["a / (b + c)"]
    assert found["a / (b + c)"] == {
        "median": 0.25,
        "min": 0.2,
        "max": 0.25,
        "samples": [0.25, 0.2, 0.25],
    }


def test_a_rate_is_bytes_over_median_seconds():
    assert NoiseTimes(1, {"copy_": 4 * 10**9}, {"copy_": [1.0, 2.0, 9.0]}).rate("copy_") == 2.0
    assert NoiseTimes(1, {"copy_": 1}, {}).rate("copy_") is None


def test_settings_survive_their_own_command_line():
    settings = settings_from(threads="2, 1,2", only="mezo,hybrid", model="random:llama-tiny")
    assert settings.threads == (2, 1)
    assert settings.only == ("hybrid", "mezo")
    assert settings.device in ("cpu", "cuda", "mps")
    words = settings.arguments()
    values = dict(zip(words[::2], words[1::2], strict=True))
    assert values["--threads"] == "2,1"
    assert values["--only"] == "hybrid,mezo"
    assert "--no-memory" in Settings(memory=False).arguments()
    assert "--noise-only" in Settings(steps=False).arguments()


def test_what_needs_cuda_is_left_out_elsewhere_unless_it_is_named():
    settings = settings_from(threads=None, only=None, device="cpu")
    assert settings.only == tuple(name for name in CONTENDERS if name != "hybrid-overlap")
    assert "--only" not in settings.arguments()
    assert "--only" not in Settings(device="cuda").arguments()
    with pytest.raises(UserError, match=r"hybrid-overlap needs CUDA.*the device is cpu"):
        settings_from(threads=None, only="hybrid,hybrid-overlap", device="cpu")


def test_all_problems_are_told_at_once():
    with pytest.raises(UserError) as caught:
        settings_from(threads="0", only="mezzo", model="random:llama-2b", batch=0, dtype="float8")
    for part in ("threads is '0'", "did you mean mezo?", "llama-1b", "batch is 0", "'float8'"):
        assert part in str(caught.value)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_kernels_move_the_bytes_that_they_say(dtype):
    found = kernels(Settings(device="cpu", elements=1001, dtype=dtype))
    size = 1001 * (4 if dtype == "float32" else 2)
    for name, times in (
        ("copy_", 2),
        ("add_", 2),
        ("torch.add(out=)", 2),
        ("axpy: add_(v, alpha)", 3),
        ("randn + add", 4),
        ("rademacher perturb", 2),
        ("gaussian update", 2),
    ):
        assert found[name].num_bytes == times * size
    assert ("rademacher update, rounded to nearest" in found) == (dtype == "bfloat16")
    for kernel in found.values():
        kernel.step()


@pytest.mark.parametrize("distribution", ["rademacher", "gaussian"])
def test_our_kernels_add_noise_to_what_torchs_copy(distribution):
    found = kernels(Settings(device="cpu", elements=1001))
    weight = found["copy_"].step().clone()
    noise = direction((1001,), seed=1, step=2, tensor=3, distribution=distribution)
    perturbed = found[f"{distribution} perturb"].step()
    torch.testing.assert_close(perturbed, weight + 1e-3 * noise)
    assert torch.equal(found["copy_"].step(), weight)


def test_parts_of_the_memory_add_up_to_its_peak():
    row = measure_here(TINY, "hybrid")
    assert row["peak"] == sum(row[part] for part in ("libraries", "kernels", "model", "step"))
    assert row["optimizer_state"] > 0


def forked(command, **options):
    """Run `python -m zofo` in a fork of this process, which has imported everything."""

    def call():
        done = CliRunner().invoke(app, command[3:])
        return done.exit_code, done.stdout, done.stderr

    (found,) = in_forks((call,))
    return subprocess.CompletedProcess(command, *found)


def test_a_contender_is_measured_in_a_process_of_its_own(monkeypatch):
    monkeypatch.setattr("zofo.bench.memory.subprocess.run", forked)
    memory, told = Memory(), []
    settings = Settings(
        "random:llama-tiny", batch=2, length=8, device="cpu", threads=(1,), only=("forward",)
    )
    measure(settings, memory, on_done=told.append)
    assert told == ["forward"]
    row = memory.contenders["forward"]
    assert row["kernels"] == row["optimizer_state"] == 0
    assert 50 << 20 < row["libraries"] < row["peak"]


def test_a_process_that_fails_says_why():
    memory = Memory()
    measure(
        Settings(dtype="float8", device="cpu", threads=(1,), only=("forward",)),
        memory,
    )
    assert "'float8' does not exist" in memory.contenders["forward"]["failed"]


@pytest.mark.skipif(sys.platform != "linux", reason="the peak is read from /proc")
def test_a_peak_is_the_process_own_not_its_parents():
    held = torch.ones(1 << 27)  # The parent holds 512 MiB.
    code = (
        "import torch\n"
        "from zofo.bench.device import peak_bytes, used_bytes\n"
        "cpu = torch.device('cpu')\n"
        "print(peak_bytes(cpu) - used_bytes(cpu))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert held[0] == 1
    assert int(done.stdout) < 200 << 20


def test_hybrids_memory_beside_pefts():
    peft = {"peak": 1000, "kernels": 0}
    found = Memory(100, {"fo-peft": peft, "hybrid": {"peak": 1300, "kernels": 100}}).ratios(150)
    assert list(found.values()) == [1.3, 1.2, 1.05]
    assert Memory(100, {"fo-peft": peft, "hybrid": {"failed": "killed"}}).ratios(150) == {}


@pytest.mark.parametrize("width", [80, 160])
def test_a_terminal_of_80_columns_shows_every_name_and_number(width):
    seconds = {name: [1234.5678, 2345.6789] for name in CONTENDERS}
    rows = {name: Row("in words", 3, 1234 << 20) for name in CONTENDERS}
    part = dict.fromkeys(("peak", "libraries", "kernels", "model", "step"), 2345 << 20)
    results = Results(
        TINY,
        {"device": "cpu"},
        {"num_parameters": 10**8, "num_adapter_parameters": 10**6, "largest_layer_bytes": 10**8},
        Memory(10**8, {name: {**part, "optimizer_state": 0} for name in CONTENDERS}),
        [StepTimes(1, rows, seconds, {"mezo": "out of memory"})],
        [NoiseTimes(1, {"rademacher perturb": 10**9}, {"rademacher perturb": [0.5]})],
    )
    console = Console(width=width, file=io.StringIO(), force_terminal=True, color_system=None)
    show(results, console)
    lines = console.file.getvalue().splitlines()
    assert not any("…" in line for line in lines)
    assert max(map(len, lines)) <= width
    for name in CONTENDERS:
        (line,) = [line for line in lines if f" {name} " in line and "1790" in line]
        assert "2,345.0" in line
        assert "1,234.0" in line
        assert ("in words" in line) == (width == 160)
    assert "  mezo was not timed: out of memory" in lines


def test_the_names_of_the_contenders_are_unique():
    assert len(set(CONTENDERS)) == len(CONTENDERS) == 14
