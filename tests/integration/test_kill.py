"""A run that is killed or interrupted and then resumed ends with the bits of an undisturbed run.

Every run is a process of its own, which is forked from one that has imported everything.
"""

from __future__ import annotations

import gc
import json
import os
import random
import signal
import sys
import time
import warnings
from pathlib import Path

import pytest
import torch

from tests.support.forks import context
from tests.support.models import assert_same_bits
from tests.support.trainers import untimed_metrics
from zofo.config.load import read_config
from zofo.optim.blocks import split_parameters
from zofo.optim.trajectory import TRAJECTORY_FILE, Trajectory
from zofo.run.resume import is_finished, newest_checkpoint
from zofo.saved.artifact import load
from zofo.saved.layout import CONFIG_FILE

STEPS = 24
ADAPTER = "adapter_model.safetensors"


@pytest.fixture(scope="module")
def reviews(tmp_path_factory):
    path = tmp_path_factory.mktemp("data") / "reviews.csv"
    kinds = ("great warm story,good", "dull mess,bad")
    rows = [f"the film number {i} is a {kinds[i % 2]}" for i in range(90)]
    path.write_text("\n".join(["text,label", *rows]) + "\n")
    return path


def options(folder, reviews, model, *more):
    """Return the options of a run with 7 steps per epoch.

    The run has 50 rows in batches of 4 × 2, so the last step of an epoch has one short micro-batch.
    """
    return [
        f"model={model}",
        "task=classification",
        f"task.train={reviews}",
        "task.num_train=50",
        "task.num_dev=20",
        "task.num_test=20",
        f"steps={STEPS}",
        "eval_every=2",
        "log_every=3",
        "batch_size=4",
        "accumulation=2",
        "adapter.dropout=0.1",
        "adapter_lr=0.01",
        "base_lr=1e-4",
        "device=cpu",
        "num_threads=1",
        f"output_dir={folder}",
        *more,
    ]


def _begin(arguments, stderr):
    """Run `zofo train` in the forked process."""
    # `Trainer.train` collects garbage. Without the freeze it would visit every imported object.
    gc.freeze()
    sys.argv = ["zofo", "train", *arguments]
    handle = os.open(stderr, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(handle, 1)
    os.dup2(handle, 2)
    warnings.resetwarnings()
    sys.stdout, sys.stderr = (os.fdopen(number, "w", closefd=False) for number in (1, 2))
    from zofo.cli.app import main

    main()


def start(arguments, stderr):
    process = context().Process(target=_begin, args=(list(map(str, arguments)), str(stderr)))
    process.start()
    return process


def num_lines(path):
    return len(path.read_bytes().splitlines()) if path.exists() else 0


def wait_for(condition, process, *, limit_s=120):
    """Return True once the condition holds, and False if the process ends first."""
    end = time.monotonic() + limit_s
    while not condition():
        if not process.is_alive():
            return False
        assert time.monotonic() < end, "no progress"
        time.sleep(0.002)
    return True


def complete(arguments, log):
    process = start(arguments, log)
    process.join(120)
    assert process.exitcode == 0, log.read_text()


def kill_and_resume(folder, arguments, log, *, kills, seed):
    """Kill a run at random points and resume it. Return the number of kills that hit a live run.

    Each kill follows a random amount of progress and a random wait.
    """
    dice = random.Random(seed)
    metrics, done = folder / "metrics.jsonl", 0
    while done < kills and not is_finished(folder):
        begun = (folder / "run.yaml").exists()
        if folder.exists() and not begun:
            assert not [path for path in folder.iterdir() if not path.name.startswith(".")]
            for path in folder.iterdir():
                path.unlink()
        before = num_lines(metrics)
        process = start(["--resume", folder] if begun else arguments, log)
        # Some kills hit the run while it reads data, measures, or replays the base.
        if dice.random() < 0.2:
            wait_for((folder / "run.yaml").exists, process)
            process.join(dice.uniform(0, 1))
        else:
            wanted = before + dice.choice((-4, -2, 0, 1, 2, 3, 4))
            wait_for(lambda wanted=wanted: 0 < num_lines(metrics) >= wanted, process)
            process.join(dice.uniform(0, 0.08))
        if process.is_alive():
            os.kill(process.pid, signal.SIGKILL)
            process.join()
            assert process.exitcode == -signal.SIGKILL
            done += 1
        else:
            assert process.exitcode == 0, log.read_text()
    return done


def last_checkpoint(folder):
    path = newest_checkpoint(folder)
    assert path is not None
    assert path.name == f"checkpoint-{read_config(folder / CONFIG_FILE).steps}"
    return path


def values(path):
    return torch.load(path, weights_only=True)


def assert_same_value(a, b):
    assert type(a) is type(b)
    if isinstance(a, dict):
        assert a.keys() == b.keys()
        for key in a:
            assert_same_value(a[key], b[key])
    elif isinstance(a, (list, tuple)):
        assert len(a) == len(b)
        for x, y in zip(a, b, strict=True):
            assert_same_value(x, y)
    elif isinstance(a, torch.Tensor):
        assert torch.equal(a, b)
    else:
        assert a == b


def assert_same_run(a, b):
    """Assert that two runs end in the same state and have the same scores.

    Equal losses in the metrics show that both runs saw the samples in the same order.
    """
    first, second = last_checkpoint(a), last_checkpoint(b)
    assert (first / ADAPTER).read_bytes() == (second / ADAPTER).read_bytes()
    trajectories = [Trajectory.load(c / TRAJECTORY_FILE) for c in (first, second)]
    assert trajectories[0][0] == trajectories[1][0]
    assert trajectories[0][1]["base_fingerprint"] == trajectories[1][1]["base_fingerprint"]
    for name in ("optimizer.pt", "scheduler.pt"):
        assert_same_value(values(first / name), values(second / name))
    states = [json.loads((c / "trainer_state.json").read_text()) for c in (first, second)]
    for key in ("global_step", "best_global_step", "best_metric", "total_flos", "epoch"):
        assert states[0][key] == states[1][key], key
    assert Path(states[1]["best_model_checkpoint"]).parent == b
    assert untimed_metrics(a / "metrics.jsonl") == untimed_metrics(b / "metrics.jsonl")
    results = [json.loads((folder / "result.json").read_text()) for folder in (a, b)]
    for key in ("test", "best_dev", "best_checkpoint"):
        assert results[0][key] == results[1][key], key
    models = [load(folder).model for folder in (a, b)]
    for block in ("base", "adapter"):
        assert_same_bits(*(dict(getattr(split_parameters(m), block)) for m in models))
    assert {path.name for path in b.glob(".*")} <= {".lock"}


KINDS = [
    (f"optimizer={optimizer}", f"model.dtype={dtype}", f"snapshot_every={every}")
    for dtype, every in (("float32", "null"), ("bfloat16", "5"))
    for optimizer in ("adamw", "sgd")
]
QUANTISED = [
    ("model.quantization=nf4", "snapshot_every=5"),
    ("model.quantization=int8", "snapshot_every=null"),
]


def compare(tmp_path, reviews, model, *more, kills, seed):
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    complete(options(whole, reviews, model, *more), tmp_path / "log")
    arguments = options(killed, reviews, model, *more)
    done = kill_and_resume(killed, arguments, tmp_path / "log", kills=kills, seed=seed)
    complete(["--resume", killed], tmp_path / "log")
    assert_same_run(whole, killed)
    return done


def test_killed_three_times(tmp_path, reviews, decoder_folder):
    assert compare(tmp_path, reviews, decoder_folder, *KINDS[2], kills=3, seed=1) >= 2


@pytest.mark.parametrize(
    "kind", [QUANTISED[0], pytest.param(QUANTISED[1], marks=pytest.mark.slow)], ids=" ".join
)
def test_killed_on_a_quantised_base(tmp_path, reviews, decoder_folder, kind):
    pytest.importorskip("bitsandbytes")
    assert compare(tmp_path, reviews, decoder_folder, *kind, kills=2, seed=3) >= 1


@pytest.mark.slow
@pytest.mark.parametrize("kind", [*KINDS, *QUANTISED], ids=" ".join)
def test_killed_twenty_five_times(tmp_path, reviews, decoder_folder, kind):
    # A run may end before its last kill. The loop then starts another run, until 25 kills have hit
    # a live one.
    done, seed = 0, 0
    while done < 25:
        folder = tmp_path / str(seed)
        folder.mkdir()
        done += compare(folder, reviews, decoder_folder, *kind, kills=25 - done, seed=seed)
        seed += 1


DEADLY = """
import os
import signal
from pathlib import Path

def letters(prompts, completions, **columns):
    here = Path(__file__).parent
    with open(here / "calls", "a") as file:
        file.write("x")
    fatal = here / "fatal"  # the numbers of the calls that kill the process
    if fatal.exists() and str((here / "calls").stat().st_size) in fatal.read_text().split():
        os.kill(os.getpid(), signal.SIGKILL)
    return [float(len(text)) for text in completions]
"""


@pytest.mark.parametrize(
    ("fatal", "kills"),
    [((5,), 1), pytest.param(range(2, 30, 4), 5, marks=pytest.mark.slow)],
    ids=["once", "often"],
)
def test_killed_while_answers_are_scored(tmp_path, decoder_folder, fatal, kills):
    """The reward kills its process on some of its calls.

    A process calls it once for the held-out prompts, then twice a step, for both sides of the
    antithetic pairs. The fifth call is thus in the middle of a population, after a checkpoint.
    """
    rows = [{"prompt": f"What is {i}?", "completion": f" {i}"} for i in range(30)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))

    def run_options(folder):
        folder.mkdir()
        reward = folder / "deadly.py"
        reward.write_text(DEADLY)
        more = ["num_answers=3", "batch_size=2", "max_new_tokens=4", "temperature=1"]
        return f"reward={reward}:letters", [
            f"model={decoder_folder}",
            "task=completion",
            f"task.train={tmp_path / 'rows.jsonl'}",
            "zo_objective=reward",
            f"reward={reward}:letters",
            *(f"reward.{option}" for option in more),
            "estimator=central",
            "steps=4",
            "eval_every=1",
            "log_every=1",
            "eps=0.05",
            "base_lr=1e-3",
            "device=cpu",
            "num_threads=1",
            f"output_dir={folder / 'run'}",
        ]

    folders, log = (tmp_path / "whole", tmp_path / "killed"), tmp_path / "log"
    complete(run_options(folders[0])[1], log)
    reward, arguments = run_options(folders[1])
    whole, killed = (folder / "run" for folder in folders)
    (folders[1] / "fatal").write_text(" ".join(map(str, fatal)))
    for _ in range(kills):
        process = start(arguments, log)
        process.join(120)
        assert process.exitcode == -signal.SIGKILL, log.read_text()
        arguments = ["--resume", killed, reward]
    assert newest_checkpoint(killed) is not None
    complete(arguments, log)
    assert_same_run(whole, killed)
    for name in ("answers.jsonl", "held_out_answers.jsonl"):
        assert (killed / name).read_bytes() == (whole / name).read_bytes()
    results = [json.loads((run / "result.json").read_text()) for run in (whole, killed)]
    assert results[0]["rewards"] == results[1]["rewards"]
    assert results[0]["dev"] == results[1]["dev"]


@pytest.mark.slow
def test_killed_with_a_real_model(tmp_path, reviews):
    small = ["steps=6", "eval_every=1", "log_every=2", "batch_size=2", "adapter_lr=1e-3"]
    rows = ["task.num_train=14", "task.num_dev=4", "task.num_test=4", "base_lr=1e-5"]
    assert compare(tmp_path, reviews, "smollm2-135m", *small, *rows, kills=4, seed=2) >= 3


@pytest.fixture(scope="module")
def whole(tmp_path_factory, reviews, decoder_folder):
    """Return the folder of a run that nothing disturbed."""
    folder = tmp_path_factory.mktemp("whole")
    complete(options(folder / "run", reviews, decoder_folder), folder / "log")
    return folder / "run"


@pytest.mark.parametrize(
    ("signum", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)], ids=["ctrl-c", "sigterm"]
)
def test_a_signal_finishes_the_step_and_the_run_goes_on(
    tmp_path, reviews, decoder_folder, whole, signum, code
):
    stopped, log = tmp_path / "stopped", tmp_path / "log"
    process = start(options(stopped, reviews, decoder_folder), log)
    assert wait_for(lambda: num_lines(stopped / "metrics.jsonl") >= 4, process)
    os.kill(process.pid, signum)
    process.join(60)
    assert process.exitcode == code, log.read_text()
    assert "Traceback" not in log.read_text()
    assert f"zofo train --resume {stopped}" in log.read_text()
    checkpoint = newest_checkpoint(stopped)
    assert f"{checkpoint} is whole" in log.read_text()
    assert int(checkpoint.name.partition("-")[2]) < STEPS
    complete(["--resume", stopped], log)
    assert_same_run(whole, stopped)


def test_a_second_ctrl_c_stops_at_once_and_the_run_goes_on(
    tmp_path, reviews, decoder_folder, whole
):
    stopped, log = tmp_path / "stopped", tmp_path / "log"
    process = start(options(stopped, reviews, decoder_folder), log)
    assert wait_for(lambda: num_lines(stopped / "metrics.jsonl") >= 4, process)
    os.kill(process.pid, signal.SIGINT)
    if wait_for(lambda: "once more" in log.read_text(), process):
        os.kill(process.pid, signal.SIGINT)
    process.join(60)
    assert process.exitcode == 130, log.read_text()
    assert "Traceback" not in log.read_text()
    complete(["--resume", stopped], log)
    assert_same_run(whole, stopped)
