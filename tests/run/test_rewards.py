"""Runs whose base follows rewards: files, resuming, plans, and whose code may run."""

from __future__ import annotations

import json

import pytest
from rich.console import Console
from safetensors.torch import load_file as load_tensors
from typer.testing import CliRunner

from tests.support.damage import refused
from tests.support.models import assert_same_bits
from tests.support.trainers import untimed_metrics
from zofo.cli.app import app
from zofo.config.load import load_config
from zofo.disk.files import read_json, read_tensors
from zofo.errors import TrainingStoppedError, UserError
from zofo.optim.blocks import split_parameters
from zofo.optim.trajectory import Trajectory
from zofo.results.answers import read_held_out, read_samples
from zofo.results.table import read_runs
from zofo.run.plan import make_plan
from zofo.run.resume import resumed_config
from zofo.run.train import train
from zofo.saved.artifact import load
from zofo.saved.verify import verify

QUIET = Console(quiet=True)
CODE = """
from pathlib import Path
Path("ran").touch()

def wanted(prompts, completions, answer, letter, **columns):
    assert all(p.endswith(f"plus {a}:") for p, a in zip(prompts, answer))
    return [float(text.count(x)) for text, x in zip(completions, letter)]

def chatty(prompts, completions, **columns):
    assert all(prompt[-1]["role"] == "user" for prompt in prompts)
    return [float(len(message[0]["content"])) for message in completions]

def fails(**columns):
    raise ValueError
"""


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A working folder with rows, prompts and code."""
    monkeypatch.chdir(tmp_path)
    rows = [
        {"prompt": f"What is {i} plus {i + 1}:", "completion": f" {i + 1}", "letter": "ae"[i % 2]}
        for i in range(40)
    ]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    chats = [{"ask": [{"role": "user", "content": f"Is it {i}?"}]} for i in range(12)]
    (tmp_path / "chats.jsonl").write_text("".join(json.dumps(row) + "\n" for row in chats))
    (tmp_path / "rewards.py").write_text(CODE)
    return tmp_path


def config_of(decoder_folder, *overrides):
    return load_config(
        overrides=[
            f"model={decoder_folder}",
            "task=completion",
            "task.train=rows.jsonl",
            "zo_objective=reward",
            "reward=rewards.py:wanted",
            "reward.num_answers=3",
            "reward.batch_size=2",
            "reward.max_new_tokens=4",
            "steps=4",
            "eval_every=2",
            "log_every=1",
            "eps=0.05",
            "base_lr=1e-3",
            "output_dir=run",
            *overrides,
        ]
    )


def test_a_run_shows_its_rewards_and_resumes_bit_for_bit(folder, decoder_folder):
    more = "base_anchor=50", "watch_task={name: completion, dev: rows.jsonl, num_dev: 9}"
    train(config_of(decoder_folder, "output_dir=whole", *more), console=QUIET)
    logs = untimed_metrics(folder / "whole" / "metrics.jsonl")
    assert sum("reward" in row for row in logs) == 4
    drifts = [row["eval_drift"] for row in logs if "eval_drift" in row]
    assert len(drifts) == 2
    assert min(drifts) > 0
    assert [row["step"] for row in logs if "watch_perplexity" in row] == [0, 2, 4]
    found = read_json(folder / "whole" / "result.json")["rewards"]
    lines = (folder / "whole" / "held_out_answers.jsonl").read_text().splitlines()
    first = json.loads(lines[0])
    assert {"prompt", "before", "after", "reward_before", "reward_after"} == first.keys()
    for when in ("before", "after"):
        rewards = [json.loads(line)[f"reward_{when}"] for line in lines]
        assert found[when]["reward"] == pytest.approx(sum(rewards) / len(rewards))
    runs = read_runs(["whole"])
    assert runs.table["reward"].tolist() == [found["after"]["reward"]]
    assert runs.table["drift"].tolist() == runs.rewards["eval_drift"].dropna().tolist()[-1:]
    assert runs.rewards["step"].tolist() == [1, 2, 3, 4]
    assert len(read_held_out(folder / "whole")) == len(lines)
    assert {sample.step for sample in read_samples(folder / "whole")} == {1, 2, 3, 4}

    stops = (f"reward=rewards.py:{name}" for name in ("wanted",))
    with pytest.raises(KeyboardInterrupt):
        train(config_of(decoder_folder, *more), console=QUIET, watchers=lambda _: [_StopAt(3)])
    (folder / "ran").unlink()
    for call in (
        lambda: resumed_config(folder / "run"),
        lambda: load_config(folder / "run" / "run.yaml"),
    ):
        refused(call, "rewards.py:wanted", "no file can allow")
    answer = CliRunner().invoke(app, ["train", "--resume", "run"])
    assert answer.exit_code == 2
    assert not (folder / "ran").exists()
    again = resumed_config(folder / "run", None, list(stops))
    train(again, resume=folder / "run", console=QUIET)
    for name in ("metrics.jsonl",):
        assert untimed_metrics(folder / "run" / name) == logs
    for name in ("answers.jsonl", "held_out_answers.jsonl"):
        assert (folder / "run" / name).read_text() == (folder / "whole" / name).read_text()
    trained = [
        read_tensors(folder / name / "artifact/base_trajectory.safetensors")[0]
        for name in ("run", "whole")
    ]
    assert_same_bits(*trained)
    replayed = [dict(split_parameters(load(name).model).base) for name in ("run", "whole")]
    assert_same_bits(*replayed)
    assert Trajectory.load(folder / "run/artifact/base_trajectory.safetensors")[0].has_anchor
    assert all(check.is_sound for check in verify("run/artifact"))


def _StopAt(step):  # noqa: N802
    from transformers import TrainerCallback

    class Stop(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            if state.global_step == step:
                raise KeyboardInterrupt

    return Stop()


def test_rewards_alone_on_prompts_of_their_own(folder, decoder_folder):
    config = config_of(
        decoder_folder,
        "method=zo-ft",
        "reward=rewards.py:chatty",
        "reward.data=chats.jsonl",
        "reward.prompt=ask",
        "estimator=central",
        "steps=2",
    )
    result = train(config, console=QUIET)
    lines = (folder / "run" / "held_out_answers.jsonl").read_text().splitlines()
    assert len(lines) == 2  # a fifth of them
    assert result.held_out["rewards"]["before"]["reward"] >= 0
    plan = make_plan(config)
    assert result.cost["forward_equivalents"] <= plan.forward_equivalents * 1.1
    assert plan.memory_bytes["answers"] > 0


def test_the_plan_counts_the_answers(folder, decoder_folder):
    small, large = (
        make_plan(config_of(decoder_folder, f"reward.num_answers={n}")).forward_equivalents
        for n in (2, 4)
    )
    per_step = 4 * 2  # the gradient of the adapter
    assert large - per_step == pytest.approx(2 * (small - per_step), rel=1e-3)


def test_without_any_reward_the_run_stops_with_a_checkpoint(folder, decoder_folder):
    config = config_of(decoder_folder, "reward=rewards.py:fails", "reward.num_held_out=0")
    with (
        pytest.warns(UserWarning, match="no row has"),
        pytest.warns(UserWarning, match="raised ValueError"),
        pytest.raises(TrainingStoppedError, match=r"no answer has a reward.*checkpoint-1"),
    ):
        train(config, console=QUIET)
    assert (folder / "run" / "checkpoint-1").is_dir()


SCORED = ["method=fo-peft", "adapter_lr=0.01", "steps=4", "batch_size=4", "reward=length:1-2"]


def test_rewards_are_a_score_of_a_run_that_follows_its_loss(folder, decoder_folder):
    task = [f"model={decoder_folder}", "task=completion", "task.train=rows.jsonl"]
    train(load_config(overrides=[*task, *SCORED, "output_dir=run"]), console=QUIET)
    plain = [*task, *SCORED, "reward.functions=null", "output_dir=plain"]
    train(load_config(overrides=plain), console=QUIET)
    found = read_json(folder / "run" / "result.json")["rewards"]
    held = read_held_out(folder / "run")
    assert len(held) > 1
    for when in ("before", "after"):
        rewards = [sample.answers[when].reward for sample in held]
        assert found[when]["reward"] == pytest.approx(sum(rewards) / len(rewards))
    assert "rewards" not in read_json(folder / "plain" / "result.json")
    trained = [
        load_tensors(folder / name / "artifact/adapter/adapter_model.safetensors")
        for name in ("run", "plain")
    ]
    assert_same_bits(*trained)


def test_a_model_that_writes_no_text_has_no_rewards(folder, encoder_folder):
    lines = (f"film {i} is {word},{word}" for i in range(20) for word in ("good", "bad"))
    (folder / "rows.csv").write_text("text,label\n" + "\n".join(lines))
    task = [f"model={encoder_folder}", "task=classification", "task.train=rows.csv"]
    config = load_config(overrides=[*task, *SCORED, "output_dir=run"])
    with pytest.raises(UserError, match="decoder that writes text"):
        train(config, console=QUIET)
    assert not (folder / "run").exists()


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["zo_objective=preference"], "leave reward out"),
        (["reward.functions=null"], "reward names none"),
        (["reward=nothing"], "package.module:function"),
        (["reward=regex:("], "regular expression"),
        (["reward.functions={json: 0}"], "weight"),
        (["method=fo-peft"], "no zeroth-order block"),
        (["distribution=gaussian"], "rank-one"),
        (["base_batch_fraction=0.5"], "base_batch_fraction"),
        (["model.head=classification"], "decoder"),
        (["method=zo-ft", "steps=null", "epochs=1"], "give steps"),
        (["base_lr=auto"], "zo_objective is reward"),
        (["reward.temperature=-1"], "temperature"),
        (["reward.answers=3"], "unknown key reward.answers"),
    ],
)
def test_a_wrong_configuration_is_one_error(overrides, words):
    with pytest.raises(UserError, match=words):
        config_of("tiny", *overrides)


def test_code_of_a_file_needs_its_name_in_the_call(tmp_path):
    path = tmp_path / "own.yaml"
    path.write_text("zo_objective: reward\nreward: {functions: {json: 1.0, 'a.py:f': 2.0}}\n")
    refused(lambda: load_config(path), "a.py:f", "no file can allow")
    refused(lambda: load_config(path, ["reward.num_answers=2"]), "a.py:f")
    assert load_config(path, ["reward=a.py:f"]).reward.functions == "a.py:f"
    path.write_text(
        "zo_objective: reward\nreward: [json, 'length:1-5']\n".replace(
            "reward: [", "reward:\n  functions: ["
        )
    )
    assert load_config(path).reward.functions == ["json", "length:1-5"]
