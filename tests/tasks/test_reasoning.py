"""Rows and rewards of reasoning-gym, by a stand-in with its interface and by the package itself."""

from __future__ import annotations

import sys
from types import SimpleNamespace

import pytest

from tests.support.damage import refused
from zofo.config.load import load_config
from zofo.rewards.functions import is_code, load_rewards
from zofo.rewards.score import Scorer
from zofo.run.rewards import reward_rows
from zofo.tasks.load import load_splits
from zofo.tasks.rows import read_table
from zofo.tasks.spec import TaskSpec


def sums(name, *, size, seed, most=9):
    if name != "sums":
        raise ValueError(f"Dataset '{name}' not registered")
    return [
        {"question": f"{i} + {seed} =", "answer": str(i + seed), "metadata": {"range": (0, most)}}
        for i in range(size)
    ]


@pytest.fixture
def stand_in(monkeypatch):
    score_of = lambda name: lambda answer, entry: float(answer == entry["answer"])  # noqa: E731
    module = SimpleNamespace(create_dataset=sums, get_score_answer_fn=score_of)
    monkeypatch.setitem(sys.modules, "reasoning_gym", module)


SOURCE = "reasoning-gym:sums?size=60&seed=3&most=4"


def test_a_source_gives_rows_and_the_reward_scores_them(stand_in):
    _, row = read_table(SOURCE).rows[5]
    assert row["prompt"] == "5 + 3 =\nAnswer:"
    assert row["completion"] == " 8"
    assert row["entry"]["metadata"] == {"range": [0, 4]}
    assert not is_code("reasoning-gym")
    columns = {name: [row[name]] * 3 for name in ("dataset", "entry")}
    scorer = Scorer(load_rewards("reasoning-gym", is_allowed=False))
    scores = scorer([row["prompt"]] * 3, [" 8\n9 + 3", "8 or 9", ""], columns)
    assert scores.total == (1.0, 0.0, 0.0)


def test_the_source_stands_for_a_file_in_a_task_and_as_prompts(stand_in):
    spec = TaskSpec(name="completion", train=SOURCE)
    splits = load_splits(spec)
    assert len(splits.train) + len(splits.dev) + len(splits.test) == 60
    overrides = ["zo_objective=reward", "reward=reasoning-gym"]
    config = load_config(overrides=["task=completion", f"task.train={SOURCE}", *overrides])
    rows, held_out = reward_rows(config, splits)
    prompts = [{row["prompt"] for row in part} for part in (rows, held_out)]
    assert not prompts[0] & prompts[1]
    for row in rows:
        assert row["prompt"].startswith(row["entry"]["question"])
    config = load_config(overrides=[f"reward.data={SOURCE}", *overrides])
    rows, held_out = reward_rows(config, splits)
    assert (len(rows), len(held_out)) == (48, 12)


@pytest.mark.parametrize(
    "source", ["nothing", "sums?size=0", "sums?size=many", "sums?size=9999999", "sums?other=1", ""]
)
def test_a_wrong_source_is_one_error(stand_in, source):
    refused(lambda: read_table(f"reasoning-gym:{source}"), "reasoning-gym:")


def test_without_the_package_the_remedy_is_told(monkeypatch):
    monkeypatch.setitem(sys.modules, "reasoning_gym", None)
    refused(lambda: read_table(SOURCE), "pip install")


def test_the_package_itself():
    pytest.importorskip("reasoning_gym")
    rows = [row for _, row in read_table("reasoning-gym:chain_sum?size=4&seed=1&max_terms=2").rows]
    columns = {name: [row[name] for row in rows] for name in ("dataset", "entry")}
    scorer = Scorer(load_rewards("reasoning-gym", is_allowed=False))
    prompts = [row["prompt"] for row in rows]
    assert scorer(prompts, [row["completion"] for row in rows], columns).total == (1.0,) * 4
    assert max(scorer(prompts, ["nothing"] * 4, columns).total) < 0.1
