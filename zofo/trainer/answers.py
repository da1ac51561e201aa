"""Prompts, the answers that a model writes to them, and the rewards of these.

    source = RewardSource(rows, rewards, tokenizer, RewardOptions(num_answers=8), seed=0)
    optimizer.step(zeroth_loss=lambda: source.population(model, step))

Which prompts a step has, and the draws of its answers, are pure functions of the seed and of the
step. A resumed run therefore writes the same answers.
"""

from __future__ import annotations

import math
import statistics
import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from zofo.errors import UserError, shown
from zofo.models.sequence_limits import limits_of
from zofo.optim.population import Population
from zofo.optim.reshuffle import Turns
from zofo.rewards.functions import Given, load_rewards
from zofo.rewards.options import RewardOptions, checked
from zofo.rewards.score import Scorer
from zofo.scoring.generate import Writer, batches_of
from zofo.tasks.generate import rendered, turn_ends
from zofo.tasks.whole_text import WholeText

_PATIENCE = 5  # populations without any difference, after which a warning says so


@dataclass(frozen=True)
class Answered:
    """Prompts, answers and rewards, one of each a row; a reward is NaN if there is none."""

    prompts: Sequence[Any]
    texts: Sequence[str]
    rewards: Sequence[float]
    by_reward: Mapping[str, Sequence[float]] = field(default_factory=dict)

    def figures(self, num_answers: int) -> dict[str, float]:
        """The mean, the spread and other figures of the rewards, for a log."""
        kept = [r for r in self.rewards if math.isfinite(r)]
        groups = range(0, len(self.texts), num_answers)
        spreads = [
            statistics.pstdev([r for r in self.rewards[i : i + num_answers] if math.isfinite(r)])
            for i in groups
            if any(map(math.isfinite, self.rewards[i : i + num_answers]))
        ]
        distinct = [len(set(self.texts[i : i + num_answers])) - 1 for i in groups]
        found = {
            "reward": statistics.fmean(kept) if kept else math.nan,
            "reward_spread": statistics.fmean(spreads) if spreads else math.nan,
            "reward_best": max(kept, default=math.nan),
            "answers_differ": statistics.fmean(distinct) / max(num_answers - 1, 1),
            "answer_words": statistics.fmean(len(text.split()) for text in self.texts),
            "answers_left_out": float(len(self.rewards) - len(kept)),
        }
        if len(self.by_reward) > 1:
            for name, values in self.by_reward.items():
                given = [value for value in values if math.isfinite(value)]
                found[f"reward {name}"] = statistics.fmean(given) if given else math.nan
        return found


class RewardSource:
    """Turns prompts into populations.

    Args:
        rows: each a mapping with the key "prompt", a text or a list of chat messages; the rewards
            get its other keys as columns.
        rewards: as for `load_rewards`; naming code here allows it to run.
        tokenizer: the model's tokenizer.
        options: how answers are written and compared.
        seed: seed of the order of the prompts and of the draws.
        weights: of the rewards.

    Attributes:
        last: the prompts, answers and rewards of the newest population.

    Raises:
        UserError: if a row has no prompt, or for wrong options or rewards.
    """

    def __init__(
        self,
        rows: Sequence[Mapping[str, Any]],
        rewards: Given,
        tokenizer: Any,
        options: RewardOptions | None = None,
        *,
        seed: int = 0,
        weights: Sequence[float] | None = None,
    ) -> None:
        self.options = options = checked(options or RewardOptions())
        if not len(rows):
            raise UserError("there are no prompts to answer; give at least one row")
        if tokenizer is None:
            raise UserError(
                "answers to prompts need the model's tokenizer; pass processing_class=tokenizer"
            )
        self.scorer = Scorer(load_rewards(rewards, weights, is_allowed=True), options.time_limit_s)
        self.rows = [_checked_row(i, dict(row)) for i, row in enumerate(rows, start=1)]
        self.seed, self.tokenizer = seed, tokenizer
        if tokenizer.pad_token_id is None:
            raise UserError("the tokenizer has no padding token; set tokenizer.pad_token")
        is_chat = any(not isinstance(row["prompt"], str) for row in self.rows)
        ends = turn_ends(tokenizer) if is_chat else ()
        self.writer = Writer(
            tokenizer, options.max_new_tokens, ends=ends, temperature=options.temperature
        )
        encode = WholeText(tokenizer)
        self.ids = [_ids_of(row["prompt"], i, encode) for i, row in enumerate(self.rows, start=1)]
        self.last: Answered | None = None
        self.num_tokens = 0  # that the model has processed, padding included
        self._said: set[str] = set()
        self._num_flat = 0  # newest populations in a row whose rewards are all alike
        self._turns = Turns(len(self.rows), options.batch_size, seed)

    def check(self, model: Any) -> None:
        """Raise UserError if the model cannot read the longest prompt and write its answer."""
        if not hasattr(model, "generate") or model.config.is_encoder_decoder:
            raise UserError(
                f"{type(model).__name__} is no decoder that generates text, which rewards need; "
                "choose a causal language model"
            )
        limits = limits_of(model)
        needed = max(map(len, self.ids)) + self.options.max_new_tokens + limits.virtual
        if limits.positions is not None and needed > limits.positions:
            raise UserError(
                f"the longest prompt has {max(map(len, self.ids))} tokens and an answer up to "
                f"{self.options.max_new_tokens}, more than the {limits.positions} positions of the "
                "model; shorten the prompts or lower max_new_tokens"
            )

    def batch(self, number: int) -> list[int]:
        """The rows of a micro-batch of prompts, by its number in the run, from 0."""
        return self._turns(number)

    def population(
        self,
        model: Any,
        number: int,
        *,
        weight: float = 1.0,
        tokens_per_forward: int | None = None,
        context: Callable[[], AbstractContextManager[Any]] = nullcontext,
    ) -> Population:
        """The population of a micro-batch of prompts.

        Args:
            model: writes the answers, in evaluation mode.
            number: number of the micro-batch in the run, from 0.
            weight: as for `Population`.
            tokens_per_forward: tokens of one forward-equivalent; None: those of the prompts.
            context: makes what stands around the model's calls, such as autocast.
        """
        options, rows = self.options, self.batch(number)
        answered = [row for row in rows for _ in range(options.num_answers)]
        prompts = [self.ids[row] for row in answered]
        unit = tokens_per_forward or sum(len(self.ids[row]) for row in rows)
        before, seen = self.num_tokens, list[Answered]()

        def respond(part: Sequence[int]) -> Sequence[str]:
            was_training = model.training
            model.eval()
            try:
                with context():
                    written = self.writer.write_batch(
                        model, [prompts[i] for i in part], [self._draws(number, i) for i in part]
                    )
            finally:
                model.train(was_training)
            self.num_tokens += written.num_tokens
            return written.texts

        return Population(
            respond,
            lambda texts: self._score(answered, texts, seen),
            len(rows),
            options.num_answers,
            batches_of(model, prompts, rows_at_once(model, prompts, options)),
            options.scale,
            weight,
            lambda: (self.num_tokens - before) / unit,
        )

    def answer_all(self, model: Any) -> Answered:
        """The most likely answer to every prompt, at the weights as they are."""
        writer = replace(self.writer, temperature=0.0)
        size = rows_at_once(model, self.ids, self.options)
        written = writer(model, self.ids, batch_size=size)
        self._score(range(len(self.rows)), written.texts, [])
        assert self.last is not None
        return self.last

    def _draws(self, number: int, row: int) -> int:
        """The seed of an answer's draws."""
        words = np.random.SeedSequence((self.seed, number, row)).generate_state(1, np.uint64)
        return int(words[0] >> np.uint64(1))

    def _score(self, answered: Sequence[int], texts: Sequence[str], seen: list[Answered]) -> Tensor:
        """Score answers; `seen` holds those of the other side of the antithetic pairs."""
        rows = [self.rows[i] for i in answered]
        names = dict.fromkeys(name for row in rows for name in row if name != "prompt")
        columns = {name: [row.get(name) for row in rows] for name in names}
        completions = [
            text if isinstance(row["prompt"], str) else [{"role": "assistant", "content": text}]
            for row, text in zip(rows, texts, strict=True)
        ]
        prompts = [row["prompt"] for row in rows]
        scores = self.scorer(prompts, completions, columns)
        self._say(scores.problems, scores.printed)
        seen.append(Answered(prompts, texts, scores.total, scores.by_reward))
        self.last = Answered(
            [p for side in seen for p in side.prompts],
            [t for side in seen for t in side.texts],
            [r for side in seen for r in side.rewards],
            {n: [v for side in seen for v in side.by_reward[n]] for n in scores.by_reward},
        )
        self._say_if_flat()
        return torch.tensor(scores.total, dtype=torch.float64)

    def _say_if_flat(self) -> None:
        """Warn once if the rewards of several steps compare no answers."""
        num = self.options.num_answers
        assert self.last is not None
        if num == 1 or self.last.figures(num)["reward_spread"] != 0:
            self._num_flat = 0
            return
        self._num_flat += 1
        if self._num_flat == _PATIENCE and "flat" not in self._said:
            self._said.add("flat")
            warnings.warn(
                f"all answers to a prompt had the same reward in {_PATIENCE} steps, which does not "
                "move the base; if answers_differ is near 0, raise eps, otherwise choose a reward "
                "that also rewards parts, or raise num_answers",
                stacklevel=2,
            )

    def _say(self, problems: Mapping[str, int], printed: Mapping[str, tuple[int, str]]) -> None:
        """Warn of each problem of a reward once in a run; the log counts the answers left out."""
        found = {
            text: f"the reward {text} on {num} answers, which are left out"
            for text, num in problems.items()
        }
        for name, (num, beginning) in printed.items():
            found[f"{name} prints"] = (
                f"the reward {name} prints, which is not shown ({num} characters, such as "
                f"{shown(beginning)})"
            )
        for key, text in found.items():
            if key not in self._said:
                self._said.add(key)
                warnings.warn(text, stacklevel=2)


def bytes_of_answer(model: Any, num_tokens: int) -> int:
    """Memory of an answer while it is written: keys and values, and scores with two copies.

    Args:
        model: the model, which may be without weights.
        num_tokens: of prompt and answer.
    """
    config = model.config.get_text_config()
    heads = getattr(config, "num_attention_heads", 1)
    width = getattr(config, "head_dim", None) or getattr(config, "hidden_size", 1024) // heads
    held = 2 * getattr(config, "num_hidden_layers", 1) * width
    held *= getattr(config, "num_key_value_heads", None) or heads
    size = next(model.parameters()).element_size()
    return int(held * num_tokens * size + 12 * getattr(config, "vocab_size", 0))


def rows_at_once(model: Any, prompts: Sequence[Sequence[int]], options: RewardOptions) -> int:
    """Answers that the budget of memory allows to be written together."""
    one = bytes_of_answer(model, max(map(len, prompts)) + options.max_new_tokens)
    return max(1, int(options.memory_gib * 2**30 / one))


def _checked_row(number: int, row: dict[str, Any]) -> dict[str, Any]:
    prompt = row.get("prompt")
    is_chat = isinstance(prompt, list) and all(isinstance(m, Mapping) for m in prompt)
    if not prompt or not (isinstance(prompt, str) or is_chat):
        raise UserError(
            f"row {number} has prompt {shown(prompt)}; give a text or a list of chat messages"
        )
    if "completions" in row:
        raise UserError("a column is named completions, as the answers are; give it another name")
    return row


def _ids_of(prompt: Any, number: int, encode: WholeText) -> list[int]:
    try:
        if isinstance(prompt, str):
            ids = encode.open_ids(prompt)
        else:
            ids = encode.ids(rendered(prompt, encode.tokenizer, opened=True), special=False)
    except ValueError as error:
        raise UserError(f"row {number}: {error}") from error
    if not ids:
        raise UserError(f"row {number} has a prompt without any token; write one")
    return ids
