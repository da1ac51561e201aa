"""The prompts and the rewards of a run, and the answers to held-out prompts before and after it.

answers.jsonl           some answers of each logged step, at perturbed weights
held_out_answers.jsonl  each held-out prompt, with the answers and rewards before and after training
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import numpy as np

from zofo.config.schema import RunConfig
from zofo.disk.files import write_text
from zofo.errors import UserError
from zofo.results.answers import HELD_OUT_FILE
from zofo.rewards.options import RewardOptions
from zofo.tasks.files import SUFFIXES
from zofo.tasks.reasoning import is_generated
from zofo.tasks.rows import Table, read_table, require_columns
from zofo.tasks.spec import Completion, Example, Splits, TaskSpec
from zofo.trainer.answers import Answered, RewardSource

Rows = list[dict[str, Any]]


def has_rewards(config: RunConfig) -> bool:
    """Whether the zeroth-order block follows rewards."""
    return config.zo_objective == "reward"


def reward_options(config: RunConfig) -> RewardOptions:
    """The options that are not those of the configuration only."""
    names = [field.name for field in fields(RewardOptions)]
    return RewardOptions(**{name: getattr(config.reward, name) for name in names})


def reward_rows(config: RunConfig, splits: Splits) -> tuple[Rows, Rows]:
    """The rows with the prompts of the run, and those that are held out.

    Raises:
        UserError: if a file is missing or lacks the column of the prompts.
    """
    chosen, num = config.reward, config.reward.num_held_out
    if chosen.data is None:
        return _of_task(config, splits.train), _of_task(config, splits.dev[:num], config.task.dev)
    table = read_table(chosen.data)
    require_columns(table, [chosen.prompt], "Name yours with reward.prompt")
    rows = [{**row, "prompt": _plain(row[chosen.prompt])} for _, row in table.rows]
    order = np.random.default_rng(config.seed).permutation(len(rows))
    num = min(num, len(rows) // 5)
    return [rows[i] for i in order[num:]], [rows[i] for i in order[:num]]


def _of_task(config: RunConfig, examples: Sequence[Any], part: str | None = None) -> Rows:
    """The prompts of a task's rows, with the columns of their file, or else the right answer.

    Args:
        config: of the run.
        examples: the rows.
        part: the file or the split of the hub that they come from; None: that of the training rows.
    """
    task = config.task
    if task.name not in ("completion", "chat"):
        return [{"prompt": _prompt_of(row), "answer": _answer_of(row)} for row in examples]
    columns = dict(table_of(task, part).rows)
    found = []
    for example in examples:
        row = dict(columns[example.row])
        if task.name == "completion":
            row |= {"prompt": _prompt_of(example), "answer": _answer_of(example)}
        else:
            row["prompt"] = [dict(message) for message in example.chat.messages[:-1]]
        found.append(row)
    return found


def table_of(task: TaskSpec, part: str | None = None) -> Table:
    """The rows of a part of the user's own task, with all columns; None: those of training."""
    if part is None or part.lower().endswith(SUFFIXES) or is_generated(part):
        return read_table(part or task.train or "", subset=task.subset)
    return read_table(task.train or "", subset=task.subset, split=part)


def _prompt_of(example: Example | Completion) -> str:
    if isinstance(example, Example):
        return example.prompt
    return example.segments[0][0]


def _answer_of(example: Example | Completion) -> str:
    if isinstance(example, Example):
        return example.candidates[example.gold].strip()
    return "".join(text for text, is_learnt in example.segments if is_learnt).strip()


def _plain(prompt: Any) -> Any:
    prompt = prompt.tolist() if hasattr(prompt, "tolist") else prompt
    return [dict(m) for m in prompt] if isinstance(prompt, list) else prompt


class RewardRows:
    """The prompts of a run, and answers to held-out ones before and after it.

    The latter are written without perturbation and with the likeliest tokens. If the run follows
    another objective, they are all that it has: the rewards are then a score.

    Args:
        config: of the run.
        splits: the rows of the task.
        tokenizer: the model's tokenizer.
        head: the head of the model.

    Raises:
        UserError: if the rows cannot be read or used, or the model writes no text.
    """

    notes: tuple[str, ...] = ()

    def __init__(self, config: RunConfig, splits: Splits, tokenizer: Any, head: str) -> None:
        if head != "causal-lm":
            raise UserError(
                f"reward is given and the head of the model is {head}; rewards need a decoder that "
                "writes text, such as model=smollm2-135m"
            )
        options = replace(reward_options(config), temperature=0.0, num_answers=1)
        functions: Any = config.reward.functions
        self._config, (self._prompts, held) = config, reward_rows(config, splits)
        self._source = RewardSource(held, functions, tokenizer, options) if held else None
        self.found: dict[str, Answered] = {}

    @property
    def arguments(self) -> dict[str, Any]:
        """Arguments of the trainer."""
        if not has_rewards(self._config):
            return {}
        return {
            "reward_funcs": self._config.reward.functions,
            "reward_dataset": self._prompts,
            "reward": reward_options(self._config),
        }

    def at_evaluation(self, model: Any) -> dict[str, float]:
        """Nothing, because answers are long to write."""
        return {}

    def check(self, model: Any) -> None:
        """Raise UserError if the model cannot answer the held-out prompts."""
        if self._source is not None:
            self._source.check(model)

    def measure(self, model: Any, when: str) -> None:
        """Answer the prompts, "before" or "after" training."""
        if self._source is not None:
            self.found[when] = self._source.answer_all(model)

    def figures(self) -> dict[str, dict[str, dict[str, float | None]]]:
        """The figures of the rewards before and after training, by the name of the rows."""
        found = {
            when: {
                key: value if math.isfinite(value) else None
                for key, value in answered.figures(1).items()
                if key not in ("reward_spread", "answers_differ")
            }
            for when, answered in self.found.items()
        }
        return {"rewards": found} if found else {}

    def write(self, folder: Path) -> None:
        """Write the answers, one prompt a line."""
        if not self.found:
            return
        lines = []
        for i, prompt in enumerate(next(iter(self.found.values())).prompts):
            entry: dict[str, Any] = {"prompt": prompt}
            for when, answered in self.found.items():
                reward = answered.rewards[i]
                entry[when] = answered.texts[i]
                entry[f"reward_{when}"] = reward if math.isfinite(reward) else None
            lines.append(json.dumps(entry, ensure_ascii=False) + "\n")
        write_text(folder / HELD_OUT_FILE, "".join(lines))
