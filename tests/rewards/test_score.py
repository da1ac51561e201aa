"""Scores of answers: weights and None, and rewards that misbehave in every way."""

from __future__ import annotations

import asyncio
import math
import re
import threading
import time

import pytest

from zofo.errors import UserError
from zofo.rewards.functions import load_rewards
from zofo.rewards.score import Scorer

ANSWERS = ["a", "bad", "ccc"]


def scores_of(*functions, weights=None, time_limit_s=0.2, answers=ANSWERS, **columns):
    rewards = load_rewards(functions, weights, is_allowed=True)
    return Scorer(rewards, time_limit_s)([f"ask {a}" for a in answers], answers, columns)


def lengths(completions, **_):
    return [len(answer) for answer in completions]


def test_a_score_is_the_weighted_sum_of_the_rewards_that_are_not_none():
    def only_c(prompts, completions, weight, **_):
        assert prompts == [f"ask {answer}" for answer in completions]
        return [w if "c" in answer else None for answer, w in zip(completions, weight, strict=True)]

    found = scores_of(lengths, only_c, weights=[2, -1], weight=[4.0, 5.0, 6.0])
    assert found.total == (2.0, 6.0, 0.0)
    assert found.num_left_out == 0
    assert found.by_reward["lengths"] == (1, 3, 3)
    assert math.isnan(found.by_reward["only_c"][0])


def test_an_answer_that_no_reward_scores_is_left_out():
    found = scores_of(lambda completions: [None, 1, None])
    assert found.num_left_out == 2
    assert not found.problems


def test_a_coroutine_is_awaited_and_arguments_are_what_the_function_takes():
    async def judge(completions):
        await asyncio.sleep(0)
        return [True, 0, 1.5]

    assert scores_of(judge, other=[1, 2, 3]).total == (1.0, 0.0, 1.5)


def test_a_coroutine_is_awaited_where_a_loop_runs_already():
    async def judge(completions):
        return [1, 2, 3]

    async def notebook():
        return scores_of(judge).total

    assert asyncio.run(notebook()) == (1, 2, 3)


def fails_on_bad(what):
    """A reward that does something wrong if "bad" is among the answers, also if it is alone."""

    def reward(completions, **_):
        if "bad" in completions:
            return what()
        return [1.0] * len(completions)

    return reward


def spin():
    while True:
        try:
            while True:
                pass
        except Exception:
            pass


async def sleep():
    await asyncio.sleep(1000)


HOSTILE = {
    "raises": lambda: 1 / 0,
    "exits": lambda: exit(3),
    "spins": spin,
    "sleeps": lambda: time.sleep(1000),
    "matches for ever": lambda: re.match(r"(a+)+$", "a" * 40 + "b"),
    "awaits": sleep,
    "too few": list,
    "too many": lambda: [1.0] * 50,
    "no list": lambda: "abc",
    "a number": lambda: 7,
}


@pytest.mark.parametrize("name", HOSTILE)
def test_only_the_answer_that_a_reward_fails_on_is_left_out(name):
    found = scores_of(fails_on_bad(HOSTILE[name]))
    assert [math.isnan(total) for total in found.total] == [False, True, False]
    assert sum(found.problems.values()) == 1


@pytest.mark.parametrize("value", [math.nan, math.inf, "word", [1], 10**400])
def test_a_value_that_is_no_finite_number_leaves_out_its_answer(value):
    found = scores_of(lambda completions: [value if a == "bad" else 1 for a in completions])
    assert [math.isnan(total) for total in found.total] == [False, True, False]
    assert sum(found.problems.values()) == 1


def test_a_sum_that_overflows_leaves_out_its_answer():
    assert scores_of(lambda completions: [1e308] * 3, weights=[10]).num_left_out == 3


@pytest.mark.parametrize("in_thread", [False, True])
def test_a_reward_that_always_hangs_ends_in_time(in_thread):
    def hang(completions):
        time.sleep(1000)

    found = []
    run = lambda: found.append(scores_of(hang, time_limit_s=0.1))  # noqa: E731
    if in_thread:
        thread = threading.Thread(target=run)
        thread.start()
        thread.join(60)
    else:
        run()
    assert found[0].num_left_out == 3


def test_what_a_reward_prints_is_counted_and_not_shown(capfd):
    def loud(completions):
        for _ in range(40):
            print("x" * 100_000)
        return [1] * len(completions)

    found = scores_of(loud, time_limit_s=20)
    assert found.total == (1, 1, 1)
    num, beginning = found.printed["loud"]
    assert num == 40 * 100_001
    assert set(beginning) == {"x"}
    assert capfd.readouterr() == ("", "")


def test_a_reward_cannot_change_the_answers_for_the_next():
    def clear(completions, **_):
        completions.clear()
        return [0, 0, 0]

    assert scores_of(clear, lengths).total == (1, 3, 3)


def test_an_interrupt_of_the_user_passes():
    def interrupted(completions):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        scores_of(interrupted)


@pytest.mark.parametrize("limit", [0, -1, math.inf, math.nan])
def test_a_time_limit_is_positive(limit):
    with pytest.raises(UserError, match="time limit"):
        scores_of(lengths, time_limit_s=limit)
