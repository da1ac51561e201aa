"""One run on several processes: what it leaves, who speaks, and how errors and losses end it."""

from __future__ import annotations

import io
import json
import os
import re
import socket
from contextlib import redirect_stderr, redirect_stdout
from datetime import timedelta
from pathlib import Path

import pytest
import torch.distributed as dist
from rich.console import Console
from transformers import TrainerCallback

from tests.support.forks import in_forks
from tests.support.groups import in_group
from zofo.cli.exits import app
from zofo.config.load import load_config
from zofo.errors import TrainingStoppedError, UserError
from zofo.run import peers
from zofo.run.peers import Peers, joined
from zofo.run.train import train
from zofo.saved.artifact import load
from zofo.scoring.score import evaluate_artifact

BY_ROWS = ("distribution=rank-one", "directions_per_step=rows")
QUIET = Console(quiet=True)


@pytest.fixture(scope="module")
def reviews(tmp_path_factory):
    path = tmp_path_factory.mktemp("data") / "reviews.csv"
    lines = ["text,label"]
    for i in range(80):
        word, label = (("great warm", "good"), ("dull mess", "bad"))[i % 2]
        lines.append(f"the film number {i} is a {word} story,{label}")
    path.write_text("\n".join(lines) + "\n")
    return str(path)


def options(folder, reviews, model, *more):
    return [
        f"model={model}",
        "task=classification",
        f"task.train={reviews}",
        "task.num_train=40",
        "task.num_dev=12",
        "task.num_test=12",
        "steps=6",
        "eval_every=2",
        "log_every=1",
        "batch_size=6",
        "device=cpu",
        f"output_dir={folder}",
        *more,
    ]


def run(given, resume=None, callback=None):
    """Train on this process's part of the rows; the result, or the error."""
    watchers = None if callback is None else lambda trainer: [callback(trainer)]
    try:
        result = train(load_config(None, given), resume=resume, console=QUIET, watchers=watchers)
    except (UserError, TrainingStoppedError) as error:
        return f"{type(error).__name__}: {error}"
    return [result.before.as_dict(), result.after.as_dict(), result.cost["steps"]]


def losses(folder):
    lines = [json.loads(x) for x in (folder / "metrics.jsonl").read_text().splitlines()]
    return [x["loss"] for x in lines if "loss" in x]


@pytest.fixture(scope="module")
def alone(tmp_path_factory, reviews, decoder_folder):
    """A run by rows on one process."""
    folder = tmp_path_factory.mktemp("alone") / "run"
    return folder, run(options(folder, reviews, decoder_folder, *BY_ROWS))


@pytest.fixture(scope="module")
def two(tmp_path_factory, reviews, decoder_folder):
    """The same run on two processes."""
    folder = tmp_path_factory.mktemp("two") / "run"
    return folder, in_group(2, run, options(folder, reviews, decoder_folder, *BY_ROWS))


def test_two_processes_train_as_one_does(alone, two):
    one, (folder, found) = alone[1], two
    assert found[0] == found[1]
    assert found[0][0] == one[0]  # before training
    assert found[0][1]["loss"] == pytest.approx(one[1]["loss"], rel=1e-3)
    assert losses(folder) == pytest.approx(losses(alone[0]), rel=1e-3)
    assert {path.name for path in folder.iterdir()} == {path.name for path in alone[0].iterdir()}


def test_the_artifact_of_two_processes_scores_the_same_on_one(two, reviews, decoder_folder):
    folder, found = two
    config = load_config(None, options(folder, reviews, decoder_folder, *BY_ROWS))
    scored = evaluate_artifact(load(folder), config.task, seed=config.seed)
    assert scored.as_dict() == found[0][1]


class Dies(TrainerCallback):
    """Ends process 1 without a word in its third step."""

    def __init__(self, trainer):
        self.trainer = trainer

    def on_step_begin(self, args, state, control, **kwargs):
        if args.process_index == 1 and state.global_step == 3:
            os._exit(9)


def test_a_lost_process_ends_the_run_which_another_number_continues(
    tmp_path, reviews, decoder_folder, two
):
    given = options(tmp_path / "run", reviews, decoder_folder, *BY_ROWS)
    found = in_group(2, run, given, None, Dies)
    assert re.match("TrainingStoppedError: another process .* --resume", found[0])
    again = in_group(2, run, given, tmp_path / "run")
    assert again == two[1]  # bit for bit what it would have been
    (tmp_path / "run" / "result.json").unlink()
    on_three = in_group(3, run, given, tmp_path / "run")
    assert on_three[0][1]["loss"] == pytest.approx(two[1][0][1]["loss"], rel=1e-3)


def wrong(folder, reviews, model):
    """What each wrong start says on this process."""
    rank = int(os.environ["RANK"])
    starts = {
        "batch_size": ("batch_size=5",),
        "seed": (f"seed={rank}",),
        "absent": ("task.train=absent.csv",) if rank else (),
        "rows": ("task.train=reviews.csv",),  # not the same file
    }
    os.chdir(folder / f"host-{rank}")
    return {
        name: run(options(folder / name, reviews, model, *more)) for name, more in starts.items()
    }


def test_wrong_starts_end_on_all_processes_before_any_work(tmp_path, reviews, decoder_folder):
    text = Path(reviews).read_text()
    for rank in range(2):
        (tmp_path / f"host-{rank}").mkdir()
        rows = text.replace("number 7 ", "number 70 ") if rank else text
        (tmp_path / f"host-{rank}" / "reviews.csv").write_text(rows)
    found = in_group(2, wrong, tmp_path, reviews, decoder_folder)
    assert found[0] == found[1]
    assert "batch_size is 5" in found[0]["batch_size"]
    assert "different values of seed: 0 and 1" in found[0]["seed"]
    assert "different values of task.train" in found[0]["absent"]
    assert "different values of the rows of" in found[0]["rows"]
    assert {path.name for path in tmp_path.iterdir()} == {"host-0", "host-1"}


def command(arguments):
    """Run the command line in this process: its exit code, and what it wrote."""
    out, err = io.StringIO(), io.StringIO()
    try:
        with redirect_stdout(out), redirect_stderr(err):
            code = app(arguments, standalone_mode=False) or 0
    except SystemExit as ended:
        code = ended.code
    except Exception as error:
        code = getattr(error, "exit_code", repr(error))
    return [code, out.getvalue(), err.getvalue()]


def test_only_the_first_process_speaks(tmp_path, reviews, decoder_folder):
    given = options(tmp_path / "run", reviews, decoder_folder, "steps=1", "eval_every=null")
    first, second = in_group(2, command, ["train", *given])
    assert first[0] == second[0] == 0
    assert "held-out rows" in first[1]
    assert "step 1/1" in first[2]
    assert second[1:] == ["", ""]
    first, second = in_group(2, command, ["train", *given])
    assert first[0] == second[0] == 2
    assert first[2].count("error:") == 1
    assert second[1:] == ["", ""]


def refused_by(listener):
    """What a process says that is sent to a port of another program, which never answers."""
    os.environ |= {"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1"}
    os.environ["MASTER_PORT"] = str(listener.getsockname()[1])
    peers._ANSWER = timedelta(seconds=0.5)
    return command(["train"])


def test_a_port_of_another_program_ends_a_process_with_one_error():
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        [(code, out, err)] = in_forks((refused_by, listener))
    assert code == 2
    assert out == ""
    assert err.count("error:") == 1
    assert "another program listens there" in err
    assert "--master-port" in err


def test_other_commands_run_by_themselves(monkeypatch):
    for name, value in {"RANK": "0", "MASTER_ADDR": "localhost", "MASTER_PORT": "1"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("WORLD_SIZE", "2")
    code, _, err = command(["tasks"])
    assert code == 2
    assert "start 'zofo tasks' by itself" in err


def test_torchrun_that_starts_again_continues_the_run(
    tmp_path, reviews, decoder_folder, monkeypatch
):
    given = options(tmp_path / "run", reviews, decoder_folder, *BY_ROWS)
    in_group(2, run, given, None, Dies)
    monkeypatch.setenv("TORCHELASTIC_MAX_RESTARTS", "2")
    first, _ = in_group(2, command, ["train", *given])
    assert first[0] == 0
    assert "step 3/6" in first[2]
    assert "step 1/6" not in first[2]
    without = [text for text in given if not text.startswith("output_dir=")]
    first, _ = in_group(2, command, ["train", *without])
    assert first[0] == 2
    assert "give output_dir=FOLDER" in first[2]


def errors_of():
    """What `together`, `from_first` and `check_equal` raise, if something is wrong on one rank."""
    found = []
    with joined() as peers:
        for rank in range(peers.size):
            try:
                with peers.together():
                    if peers.rank == rank:
                        raise UserError("wrong")
            except UserError as error:
                found.append([str(error), peers.knows(error)])

        def fail():
            raise UserError("not found")

        for call in (lambda: peers.from_first(fail), lambda: peers.check_equal({"x": peers.rank})):
            try:
                call()
            except UserError as error:
                found.append([str(error).split(";")[0], peers.knows(error)])
        found.append(peers.from_first(lambda: dist.get_rank()))
    return found


def test_an_error_of_one_process_is_raised_in_all():
    found = in_group(3, errors_of)
    assert found[0] == found[1] == found[2]
    assert found[0] == [
        ["wrong", True],
        ["process 1: wrong", True],
        ["process 2: wrong", True],
        ["not found", True],
        ["process 0 and process 1 have different values of x: 0 and 1", True],
        0,
    ]


def test_one_process_needs_no_group():
    peers = Peers()
    assert (peers.rank, peers.size) == (0, 1)
    assert peers.from_first(lambda: 3) == 3
    with pytest.raises(UserError, match="wrong"), peers.together():
        raise UserError("wrong")
