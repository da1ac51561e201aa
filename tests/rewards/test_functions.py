"""Rewards by name: checkers and code, and who may let code run."""

from __future__ import annotations

import json

import pytest

from tests.support.damage import refused
from zofo.rewards.functions import is_code, load_rewards
from zofo.rewards.score import Scorer

CODE = """
from dataclasses import dataclass
from pathlib import Path

@dataclass
class Kept:
    value: "int" = 2

def reward(completions, **columns):
    return [float(len(c)) * Kept().value for c in completions]

number = 3
"""


def score(name, *answers):
    return Scorer(load_rewards(name, is_allowed=False))([""] * len(answers), answers).total


@pytest.mark.parametrize(
    ("name", "good", "bad"),
    [
        ("json", ['{"a": 1}', " [1]\n"], ["a", "", "{", "NaN", "[" * 10**5, "```json\n1\n```"]),
        ("regex:[0-9]+ (a|b)", ["12 a", " 3 b "], ["12", "x 12 a", ""]),
        ("words:yes, no", ["Yes", "no.", " NO "], ["yes no", "", "maybe"]),
        ("length:2-3", ["a b", "a b c"], []),
    ],
)
def test_a_checker_scores_the_form_of_an_answer(name, good, bad):
    assert score(name, *good) == (1.0,) * len(good)
    assert score(name, *bad) == (0.0,) * len(bad)


def test_a_length_scores_less_the_further_it_is_away():
    assert score("length:2-4", "a", "", "a b c d e f g h") == (0.5, 0.0, 0.5)


def test_json_follows_a_schema_without_fetching_anything(tmp_path):
    pytest.importorskip("jsonschema")
    path = tmp_path / "schema.json"
    path.write_text(json.dumps({"type": "object", "required": ["answer"]}))
    assert score(f"json:{path}", '{"answer": 1}', '{"other": 1}', "[]", "x") == (1, 0, 0, 0)
    path.write_text(json.dumps({"$ref": "http://127.0.0.1:9/schema.json"}))
    found = Scorer(load_rewards(f"json:{path}", is_allowed=False))([""], ["1"])
    assert found.num_left_out == 1
    path.write_text(json.dumps({"type": 3}))
    refused(lambda: load_rewards(f"json:{path}", is_allowed=False), "schema")


def test_messages_are_scored_by_their_text():
    rewards = load_rewards("words:yes", is_allowed=False)
    answer = [{"role": "assistant", "content": "Yes"}]
    assert Scorer(rewards)([[{"role": "user", "content": "Is it?"}]], [answer]).total == (1.0,)


def test_code_of_a_file_and_of_a_module_runs_only_if_it_is_allowed(tmp_path, monkeypatch):
    (tmp_path / "own_rewards.py").write_text(CODE + "Path('zofo-was-here').touch()\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    for name in ("own_rewards.py:reward", "own_rewards:reward"):
        assert is_code(name)
        refused(lambda: load_rewards(name, is_allowed=False), "own_rewards", "command line")  # noqa: B023
        (reward,) = load_rewards({name: 0.5}, is_allowed=True)
        assert Scorer([reward])(["", ""], ["a", "bb"]).total == (1.0, 2.0)
        (tmp_path / "zofo-was-here").unlink(missing_ok=True)
    assert not is_code("regex:a:b")


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("nothing", ["package.module:function"]),
        ("no_such_module:f", ["no_such_module"]),
        ("missing.py:f", ["missing.py", "does not exist"]),
        ("own.py:absent", ["absent"]),
        ("own.py:number", ["number"]),
        ("broken.py:f", ["broken.py", "ZeroDivisionError"]),
        ("leaves.py:f", ["leaves.py", "SystemExit"]),
        ("a..b:f", ["a..b"]),
        (":f", ["package.module:function"]),
        ("regex:(", ["regular expression"]),
        ("length:5-2", ["length:1-20"]),
        ("length:many", ["length:1-20"]),
        ("words: ,", ["words:yes,no"]),
        ("json:missing.json", ["missing.json"]),
        ({"json": 0}, ["weight"]),
        ({"json": float("nan")}, ["weight"]),
        ([], ["no reward"]),
    ],
)
def test_a_wrong_name_is_one_error(tmp_path, monkeypatch, name, words):
    (tmp_path / "own.py").write_text(CODE)
    (tmp_path / "broken.py").write_text("1 / 0\n")
    (tmp_path / "leaves.py").write_text("raise SystemExit('two\\nlines')\n")
    monkeypatch.chdir(tmp_path)
    refused(lambda: load_rewards(name, is_allowed=True), *words)
