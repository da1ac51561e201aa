"""Tests of reading what runs with rewards have written."""

import json

import pytest

from tests.support.run_folders import add_rewards, write_run
from zofo.results.answers import (
    ANSWERS_FILE,
    HELD_OUT_FILE,
    Answer,
    prompt_text,
    read_held_out,
    read_samples,
)
from zofo.results.comparison import compare
from zofo.results.table import REWARD_COLUMNS, read_runs


def test_rewards_are_read_as_they_were_written(tmp_path):
    folder = add_rewards(write_run(tmp_path / "run"), gain=0.75)
    write_run(tmp_path / "other")
    runs = read_runs([tmp_path])
    rows = runs.table.set_index("run")
    assert tuple(rows.loc["run", ["reward_before", "reward", "drift"]]) == (0, 0.75, 0.03)
    assert rows.loc["other", ["reward_before", "reward", "drift"]].isna().all()
    assert list(runs.rewards.columns) == list(REWARD_COLUMNS)
    assert set(runs.rewards["run"]) == {"run"}
    assert runs.rewards["step"].tolist() == [10, 20, 30]
    assert runs.rewards["reward"].tolist() == [0.1, 0.2, 0.3]
    assert runs.rewards["eval_drift"].tolist() == [0.01, 0.02, 0.03]
    assert runs.rewards["forward_equivalents"].tolist() == [30, 60, 90]
    held_out = read_held_out(folder)
    assert [sample.prompt for sample in held_out] == ["a?", "b?"]
    assert held_out[0].answers == {
        "before": Answer("old answer to a?", 0.0),
        "after": Answer("run's answer to a?", 0.75),
    }
    assert [sample.step for sample in read_samples(folder)] == [10, 10, 20, 20, 30, 30]
    assert read_samples(folder)[1].answer == Answer("no score", None)


def test_a_run_without_a_test_score_is_compared_by_its_rewards(tmp_path):
    for seed in (0, 1, 2):
        run = write_run(tmp_path / f"run-{seed}", seed=seed, accuracy=None)
        add_rewards(run, gain=seed / 4)
    write_run(tmp_path / "scored", method="fo-peft")
    comparison = compare(read_runs([tmp_path]))
    (group,) = [g for g in comparison.groups if g.method == "hybrid"]
    assert group.accuracy is None
    assert group.reward.value == 0.25
    assert group.reward.low < 0.25 < group.reward.high
    assert (group.reward_before.value, group.drift.value) == (0, 0.03)
    assert not comparison.pairs
    assert not comparison.left_out


def test_lines_that_cannot_be_read_are_left_out(tmp_path):
    lines = [
        '{"prompt": "a\u2028b", "before": "\x85", "reward_before": NaN, "after": 3}',
        '["no map"]',
        '{"before": "no prompt"}',
        '{"prompt": "cut off',
    ]
    (tmp_path / HELD_OUT_FILE).write_text("\n".join(lines), encoding="utf-8")
    (found,) = read_held_out(tmp_path)
    assert found.prompt == "a\u2028b"
    assert found.answers == {"before": Answer("\x85", None), "after": Answer("3", None)}
    (tmp_path / ANSWERS_FILE).write_text('{"step": "x"}\n{"step": true}\n' + json.dumps([]))
    assert read_samples(tmp_path) == []
    assert read_samples(tmp_path / "nowhere") == []


@pytest.mark.parametrize(
    ("prompt", "text"),
    [
        ("plain", "plain"),
        ([{"role": "user", "content": "one"}], "one"),
        (
            [{"role": "system", "content": "be"}, {"role": "user", "content": [{"text": "x"}]}],
            'system: be\nuser: [{"text": "x"}]',
        ),
        (None, "null"),
    ],
)
def test_a_prompt_as_text(prompt, text):
    assert prompt_text(prompt) == text
