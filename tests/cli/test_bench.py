"""Tests of `zofo bench` as a user runs it, on a tiny model with random weights."""

from __future__ import annotations

import json
from statistics import median

import pytest
import torch
from typer.testing import CliRunner

import zofo.bench.timing
from zofo.bench.results import NOISE_RATIOS, STEP_RATIOS
from zofo.bench.settings import contenders_on
from zofo.cli.app import app

runner = CliRunner()
CONTENDERS = contenders_on("cpu")
ON_CPU = [ratio for ratio in STEP_RATIOS if {*ratio.above, *ratio.below} <= {*CONTENDERS}]
SMALL = (
    *("--model", "random:llama-tiny", "--device", "cpu", "--batch", "2", "--length", "8"),
    *("--elements", "1000", "--rounds", "2"),
)


@pytest.fixture(autouse=True)
def _threads_as_before():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def bench(*arguments):
    return runner.invoke(app, ["bench", *SMALL, *map(str, arguments)])


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    path = tmp_path_factory.mktemp("bench") / "bench.json"
    done = bench("--no-memory", "--threads", "1", "--json", path)
    assert done.exit_code == 0, done.output
    return done.stdout, json.loads(path.read_text())


def test_the_tables_have_every_contender_and_every_ratio(measured):
    output, _ = measured
    lines = [line.split() for line in output.splitlines()]
    for name in CONTENDERS:
        assert any(words[:1] == [name] for words in lines), name
    for ratio in (*ON_CPU, *NOISE_RATIOS):
        assert f"  {ratio.label} " in output, ratio.label
    for kernel in ("copy_", "randn + add", "rademacher perturb", "gaussian update"):
        assert f" {kernel} " in output
    assert max(map(len, output.splitlines())) <= 160


def test_json_holds_samples_arguments_and_environment(measured):
    _, found = measured
    assert found["is_complete"]
    assert found["arguments"]["model"] == "random:llama-tiny"
    assert found["arguments"]["threads"] == [1]
    assert found["command"][:4] == ["zofo", "bench", "--model", "random:llama-tiny"]
    assert found["environment"]["device"] == "cpu"
    assert "torch" in found["environment"]["packages"]
    assert found["model"]["num_parameters"] > 0
    assert found["memory"] is None
    (steps,), (noise,) = found["steps"], found["noise"]
    assert list(steps["contenders"]) == list(CONTENDERS)
    for row in (*steps["contenders"].values(), *noise["kernels"].values()):
        assert len(row["samples_s"]) == 2
        assert row["median_s"] == median(row["samples_s"])
        assert 0 < row["min_s"] <= row["median_s"] <= row["max_s"]
    assert steps["contenders"]["fo-ft"]["optimizer_state_bytes"] > 0


def test_ratios_follow_from_the_samples(measured):
    _, found = measured
    rows = found["steps"][0]["contenders"]
    seconds = {name: row["samples_s"] for name, row in rows.items()}
    both = zip(seconds["hybrid"], seconds["fo-peft"], seconds["forward"], strict=True)
    ratios = found["steps"][0]["ratios"]
    assert ratios["hybrid / (fo-peft + forward)"]["median"] == pytest.approx(
        median(h / (p + f) for h, p, f in both)
    )
    assert set(ratios) == {ratio.label for ratio in ON_CPU}
    assert {ratio.label for ratio in STEP_RATIOS} - set(ratios) == {"hybrid-overlap / hybrid"}
    kernels = found["noise"][0]["kernels"]
    ours, plain = kernels["rademacher perturb"], kernels["torch.add(out=)"]
    pairs = zip(plain["samples_s"], ours["samples_s"], strict=True)
    assert found["noise"][0]["ratios"]["rademacher perturb / torch.add(out=)"][
        "median"
    ] == pytest.approx(median(a / b for a, b in pairs))
    assert ours["gigabytes_per_s"] == pytest.approx(8000 / ours["median_s"] / 1e9)


def test_the_command_in_the_json_asks_for_the_same(measured, tmp_path):
    _, found = measured
    path = tmp_path / "again.json"
    done = runner.invoke(app, [*found["command"][1:], "--json", str(path)])
    assert done.exit_code == 0, done.output
    assert json.loads(path.read_text())["arguments"] == found["arguments"]


def test_chosen_contenders_and_several_numbers_of_threads(tmp_path):
    path = tmp_path / "bench.json"
    done = bench(
        "--only",
        "mezo,zo-ft-central",
        "--no-memory",
        "--no-noise",
        "--threads",
        "1,2",
        "--json",
        path,
    )
    assert done.exit_code == 0, done.output
    found = json.loads(path.read_text())
    assert [part["threads"] for part in found["steps"]] == [1, 2]
    for part in found["steps"]:
        assert list(part["contenders"]) == ["zo-ft-central", "mezo"]
        assert list(part["ratios"]) == ["zo-ft-central / mezo"]
    assert found["noise"] == []


def test_noise_only_needs_no_model():
    done = bench("--noise-only", "--model", "./nowhere", "--dtype", "bfloat16")
    assert done.exit_code == 0, done.output
    assert "rademacher update, rounded to nearest" in done.stdout
    assert "one step" not in done.stdout


@pytest.mark.parametrize("when", [1, 40])
def test_ctrl_c_shows_and_writes_what_was_measured(monkeypatch, tmp_path, when):
    measure, calls = zofo.bench.timing.seconds_of, []

    def interrupted(*arguments, **options):
        calls.append(1)
        if len(calls) == when:
            raise KeyboardInterrupt
        return measure(*arguments, **options)

    monkeypatch.setattr(zofo.bench.timing, "seconds_of", interrupted)
    path = tmp_path / "bench.json"
    done = bench("--no-memory", "--no-noise", "--rounds", "5", "--threads", "1", "--json", path)
    assert done.exit_code == 130
    assert "interrupted: not everything was measured" in done.stdout
    assert "naive-hybrid" in done.stdout
    found = json.loads(path.read_text())
    assert not found["is_complete"]
    samples = [len(row["samples_s"]) for row in found["steps"][0]["contenders"].values()]
    # Each contender takes two warm-up steps first.
    assert sum(samples) == max(0, when - 1 - 2 * len(CONTENDERS))
    assert bool(found["steps"][0]["ratios"]) == (when == 40)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--model", "random:llama-3b"], "llama-1b"),
        (["--model", "./nowhere"], "does not exist"),
        (["--only", "hybrids"], "did you mean hybrid?"),
        (["--threads", "1,none"], "such as 1 or 1,2"),
        (["--rounds", "0"], "rounds is 0"),
        (["--length", "1"], "length is 1"),
        (["--elements", "0"], "elements is 0"),
        (["--dtype", "float8"], "choose from float32"),
        (["--adapter", "none"], "choose from lora"),
        (["--distribution", "cauchy"], "choose from rademacher"),
        (["--device", "tpu"], "choose one of"),
        (["--json", "."], "is a folder"),
        (["--json", "setup.cfg/bench.json"], "cannot be written"),
        (["--noise-only", "--no-noise"], "nothing to measure"),
    ],
)
def test_bad_options_are_one_message_before_any_work(arguments, words, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "setup.cfg").write_text("")
    done = bench(*arguments)
    assert done.exit_code == 2
    assert done.stderr.startswith("error: ")
    assert words in done.stderr
    assert done.stdout == ""


@pytest.mark.slow
def test_memory_of_each_contender(tmp_path):
    path = tmp_path / "bench.json"
    done = bench("--only", "fo-peft,hybrid", "--no-noise", "--json", path)
    assert done.exit_code == 0, done.output
    found = json.loads(path.read_text())["memory"]
    assert found["kernels_bytes"] > 0
    rows = found["contenders"]
    assert rows["fo-peft"]["kernels"] == 0 < rows["hybrid"]["kernels"]
    assert found["ratios"]["hybrid / fo-peft"] == pytest.approx(
        rows["hybrid"]["peak"] / rows["fo-peft"]["peak"]
    )
    assert "code of the noise kernels" in done.stdout
