"""What runs with rewards have written: figures of each logged step, and sample answers.

answers.jsonl           some answers of each logged step, at perturbed weights
held_out_answers.jsonl  each held-out prompt, with the answers and rewards before and after training

As in `zofo.results.table`, a line that cannot be read is left out.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from zofo.results.log import log_lines, number_of

ANSWERS_FILE: Final = "answers.jsonl"
HELD_OUT_FILE: Final = "held_out_answers.jsonl"
TIMES: Final = ("before", "after")
FIGURES: Final[dict[str, str]] = {
    "reward": "mean reward of the step's answers, at the perturbed weights",
    "reward_spread": "standard deviation of the rewards within a prompt",
    "reward_best": "best reward of the step",
    "answers_differ": "share of a prompt's further answers that differ",
    "answer_words": "mean length of the answers",
    "answers_left_out": "number of answers without a score",
    "eval_drift": "KL divergence of the next token from the model before training, nats per token",
}
"""Figures in the log of a run with rewards, and what they mean."""
_COSTS: Final = frozenset(("forward_equivalents", "elapsed_s"))


@dataclass(frozen=True)
class Answer:
    """An answer and its reward; None if it has no score."""

    text: str
    reward: float | None


@dataclass(frozen=True)
class Sample:
    """A prompt with an answer of training, and the step of it."""

    step: int
    prompt: str
    answer: Answer


@dataclass(frozen=True)
class HeldOutSample:
    """A held-out prompt with the answers of `TIMES`; a run that goes on has no file of these."""

    prompt: str
    answers: Mapping[str, Answer]


def read_samples(folder: Path) -> list[Sample]:
    """The sample answers of training in a run folder, in their order."""
    return [
        Sample(int(step), prompt_text(entry.get("prompt")), _answer(entry, "answer", "reward"))
        for entry in log_lines(folder / ANSWERS_FILE)
        if (step := number_of(entry.get("step"))) is not None
    ]


def read_held_out(folder: Path) -> list[HeldOutSample]:
    """The held-out prompts of a run folder with their answers, in their order."""
    return [
        HeldOutSample(
            prompt_text(entry.get("prompt")),
            {when: _answer(entry, when, f"reward_{when}") for when in TIMES if when in entry},
        )
        for entry in log_lines(folder / HELD_OUT_FILE)
        if "prompt" in entry
    ]


def reward_points(log: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The figures of the rewards by step, from the entries of a log; empty without rewards."""
    points: dict[float, dict[str, Any]] = {}  # If a step was logged twice, the last entry counts.
    if not any("reward" in entry for entry in log):
        return []
    for entry in log:
        step, known = number_of(entry.get("step")), FIGURES.keys() & entry.keys()
        if step is None or not known:
            continue
        point = points.setdefault(step, {"step": step, **dict.fromkeys(FIGURES)})
        for key in (*known, *(_COSTS & entry.keys())):
            point[key] = number_of(entry[key])
    return [points[step] for step in sorted(points)]


def prompt_text(prompt: Any) -> str:
    """A prompt as text: a single message of a chat without its role, several with their roles."""
    if isinstance(prompt, list):
        messages = [x for x in prompt if isinstance(x, Mapping)]
        parts = [(str(x.get("role")), _text(x.get("content"))) for x in messages]
        if len(parts) == 1:
            return parts[0][1]
        return "\n".join(f"{role}: {text}" for role, text in parts)
    return _text(prompt)


def reward_text(reward: float | None) -> str:
    """A reward for readers; "none" if there is no score."""
    return "none" if reward is None else f"{reward:.4g}"


def _answer(entry: Mapping[str, Any], text: str, reward: str) -> Answer:
    return Answer(_text(entry.get(text)), number_of(entry.get(reward)))


def _text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)
