"""Runs whose base follows preference pairs: files, resuming, plans, and wrong configurations."""

from __future__ import annotations

import json
import math

import pytest
from rich.console import Console
from typer.testing import CliRunner

from tests.support.models import assert_same_bits
from tests.support.trainers import untimed_metrics
from tests.trainer.test_pairs import StopAfter
from zofo.cli.app import app
from zofo.config.load import load_config
from zofo.disk.files import read_json, read_tensors
from zofo.errors import UserError
from zofo.run.plan import make_plan
from zofo.run.prepare import check_processes
from zofo.run.resume import resumed_config
from zofo.run.train import train
from zofo.saved.verify import verify

QUIET = Console(quiet=True)


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A working folder with pairs as texts and as messages, and examples."""
    monkeypatch.chdir(tmp_path)
    texts = [
        {"prompt": f"What is {i} plus 1:", "chosen": f" {i + 1}", "rejected": f" {i} {i}"}
        for i in range(40)
    ]
    chats = [
        {
            "prompt": [{"role": "user", "content": row["prompt"]}],
            **{
                side: [{"role": "assistant", "content": row[side]}]
                for side in ("chosen", "rejected")
            },
        }
        for row in texts
    ]
    examples = [{"prompt": row["prompt"], "completion": row["chosen"]} for row in texts]
    for name, rows in (("pairs", texts), ("chats", chats), ("examples", examples)):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    return tmp_path


def config_of(decoder_folder, *overrides):
    return load_config(
        overrides=[
            f"model={decoder_folder}",
            "task=completion",
            "task.train=pairs.jsonl",
            "zo_objective=preference",
            "preference.batch_size=2",
            "steps=4",
            "eval_every=2",
            "log_every=1",
            "eps=0.01",
            "base_lr=1e-3",
            "distribution=rank-one",
            "directions_per_step=rows",
            "output_dir=run",
            *overrides,
        ]
    )


def test_a_run_shows_its_pairs_and_resumes_bit_for_bit(folder, decoder_folder):
    config = config_of(decoder_folder, "output_dir=whole")
    assert config.task.completion == "chosen"
    result = train(config, console=QUIET)
    logs = untimed_metrics(folder / "whole" / "metrics.jsonl")
    losses = [row["preference_loss"] for row in logs if "preference_loss" in row]
    assert losses[0] == pytest.approx(math.log(2), abs=1e-4)
    assert len(losses) == 4
    margins = [row["eval_preference_margin"] for row in logs if "eval_preference_margin" in row]
    found = read_json(folder / "whole" / "result.json")["preference"]
    assert found["before"]["preference_margin"] == 0
    assert found["before"]["preference_loss"] == pytest.approx(math.log(2))
    assert found["after"]["preference_margin"] == margins[-1] != 0
    assert 0 <= found["after"]["preference_ranked_right"] <= 1
    plan = make_plan(config)
    assert result.cost["forward_equivalents"] == pytest.approx(plan.forward_equivalents, rel=0.2)
    assert any("8 preference pairs are evaluated once" in note for note in plan.notes)

    with pytest.raises(KeyboardInterrupt):
        train(config_of(decoder_folder), console=QUIET, watchers=lambda _: [StopAfter(3)])
    train(resumed_config(folder / "run"), resume=folder / "run", console=QUIET)
    assert untimed_metrics(folder / "run" / "metrics.jsonl") == logs
    assert_same_bits(
        *(
            read_tensors(folder / name / "artifact/base_trajectory.safetensors")[0]
            for name in ("run", "whole")
        )
    )
    assert all(check.is_sound for check in verify("run/artifact"))
    answer = CliRunner().invoke(app, ["train", "--resume", "run"])
    assert answer.exit_code == 0


def test_pairs_beside_other_examples_and_alone(folder, decoder_folder):
    both = config_of(decoder_folder, "task.train=examples.jsonl", "preference=chats.jsonl")
    assert both.task.completion == "completion"
    alone = config_of(
        decoder_folder,
        "method=zo-ft",
        "task=chat",
        "task.train=chats.jsonl",
        "distribution=gaussian",
        "directions_per_step=1",
        "output_dir=alone",
        "steps=2",
    )
    assert alone.task.messages == "prompt+chosen"
    for config, forwards in ((both, None), (alone, 2 * 2)):
        result = train(config, console=QUIET)
        figures = result.held_out["preference"]
        assert figures["after"]["preference_loss"] != figures["before"]["preference_loss"]
        if forwards is not None:
            assert result.cost["forward_equivalents"] == forwards
            assert make_plan(config).forward_equivalents == forwards


def test_the_plan_counts_two_answers_for_each_pair(folder, decoder_folder):
    small, large = (
        make_plan(config_of(decoder_folder, f"preference.batch_size={n}")).forward_equivalents
        for n in (2, 4)
    )
    per_run = 4 * 2  # the gradients of the adapter
    assert large - per_run == pytest.approx(2 * (small - per_run), rel=1e-3)
    # Two evaluations of two pairs, in rows of eight examples of about half a pair's length.
    assert small - per_run == pytest.approx(4 * 2 * (2 * 2 / 8), rel=0.2)


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["zo_objective=loss", "preference=pairs.jsonl"], "set zo_objective=preference"),
        (["task=sst2", "task.train=null"], "no pairs; give the pairs as preference.data"),
        (["method=fo-peft"], "no zeroth-order block"),
        (["base_batch_fraction=0.5"], "set preference.batch_size"),
        (["model.head=classification"], "encoder-decoder"),
        (["method=zo-ft", "steps=null", "epochs=1"], "give steps"),
        (["base_lr=auto"], "zo_objective is preference"),
        (["preference.beta=0"], "beta"),
        (["preference.chose=a"], "did you mean preference.chosen|did you mean chosen"),
    ],
)
def test_a_wrong_configuration_is_one_error(overrides, words):
    with pytest.raises(UserError, match=words):
        config_of("tiny", *overrides)
    with pytest.raises(UserError, match="start one"):
        check_processes(config_of("tiny"), 2)


def test_a_file_without_the_column_ends_with_code_2_and_no_folder(folder, decoder_folder):
    arguments = [
        "train",
        f"model={decoder_folder}",
        "task=completion",
        "task.train=examples.jsonl",
        "zo_objective=preference",
        "preference=examples.jsonl",
        "output_dir=run",
    ]
    answer = CliRunner().invoke(app, arguments)
    assert answer.exit_code == 2
    assert "no column 'chosen', 'rejected'" in answer.stderr
    assert not (folder / "run").exists()
