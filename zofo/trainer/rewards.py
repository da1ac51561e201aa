"""Steps whose zeroth-order block follows the rewards of answers instead of a loss.

The first-order block, if there is one, follows the loss of its examples as ever. Without it, a step
consists of the answers alone, and the logged loss is minus their mean reward.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset
from transformers import TrainerCallback

from zofo.disk.files import write_text
from zofo.errors import UserError
from zofo.optim.methods import get_method, methods_that
from zofo.optim.population import Population
from zofo.results.answers import ANSWERS_FILE
from zofo.rewards.functions import Given
from zofo.rewards.options import RewardOptions
from zofo.trainer.answers import RewardSource
from zofo.trainer.trainer_mixin import TrainerMixin

_SAMPLES: Final = 4  # answers of a step that the file keeps


class RewardMixin(TrainerMixin):
    """Gives `HybridMixin` the populations of its steps."""

    reward_tokenizer: Any = None
    """Reads the prompts; None: `processing_class` does."""
    _rewards: RewardSource | None = None
    _number_in_step = 0  # of the micro-batch

    def _take_rewards(
        self,
        functions: Given,
        weights: Sequence[float] | None,
        rows: Any,
        options: RewardOptions | None,
        seed: int | None,
    ) -> None:
        """Make the source of rewards; rows None: those of the training data."""
        chosen, args = self.hybrid_options, self.args
        orders = get_method(chosen.method)
        wrong = []
        if not orders.zeroth:
            wrong.append(
                f"method {chosen.method!r} has no zeroth-order block, which rewards move: choose "
                f"{methods_that(lambda m: bool(m.zeroth))}"
            )
        if chosen.distribution == "gaussian" or chosen.num_directions > 1:
            wrong.append(
                "each answer has a rank-one direction: leave distribution and "
                "num_directions at their defaults"
            )
        if chosen.base_batch_fraction < 1:
            wrong.append("base_batch_fraction is a share of examples: leave it at 1")
        if args.world_size > 1:
            wrong.append("answers are written by one process: start only one")
        if wrong:
            raise UserError("reward_funcs do not fit here: " + "; ".join(wrong))
        data: Any = self.train_dataset if rows is None else rows
        if data is None:
            raise UserError("reward_funcs need prompts; pass reward_dataset, or train_dataset")
        self._rewards = RewardSource(
            data,
            functions,
            self.reward_tokenizer or self.processing_class,
            options,
            seed=args.seed if seed is None else seed,
            weights=weights,
        )
        self._rewards.check(self.model)
        if not orders.first:
            self.train_dataset, self.data_collator = _Prompts(self._rewards.ids), _numbers
        self.add_callback(SampleAnswers(self._output_folder / ANSWERS_FILE, self._rewards))

    @property
    def has_examples(self) -> bool:
        """Whether a step needs the loss of its examples."""
        return self._rewards is None or bool(get_method(self.hybrid_options.method).first)

    @property
    def lacks_rewards(self) -> bool:
        """Whether none of the newest answers has a reward."""
        found = None if self._rewards is None else self._rewards.last
        return found is not None and not any(map(math.isfinite, found.rewards))

    @property
    def reward_changes(self) -> dict[str, Any]:
        """The step options that rewards set."""
        if self._rewards is None:
            return {}
        return {"distribution": "rank-one", "directions_per_step": "rows"}

    def _population(self, model: nn.Module, inputs: Mapping[str, Any]) -> Population:
        """The population of the current micro-batch."""
        assert self._rewards is not None
        optimizer = self.hybrid_optimizer
        move = optimizer.step_count // optimizer.options.base_every
        ids = inputs.get("input_ids") if self.has_examples else None
        return self._rewards.population(
            model,
            move * self.args.gradient_accumulation_steps + self._number_in_step,
            weight=1 / self.current_gradient_accumulation_steps,
            tokens_per_forward=ids.numel() if isinstance(ids, Tensor) else None,
            context=self.compute_loss_context_manager,
        )

    def _reward_logs(self) -> dict[str, float]:
        """The figures of the newest rewards."""
        source = self._rewards
        if source is None or source.last is None:
            return {}
        return source.last.figures(source.options.num_answers)


class _Prompts(Dataset[dict[str, Any]]):
    """The prompts in place of examples, so that Trainer has batches to count."""

    def __init__(self, ids: Sequence[Sequence[int]]) -> None:
        self.ids = ids

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {"input_ids": index}  # Trainer drops keys that the model does not take.


def _numbers(items: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """A batch of `_Prompts`, of which nothing is read: the source chooses the prompts of a step."""
    return {"input_ids": torch.tensor([item["input_ids"] for item in items])}


class SampleAnswers(TrainerCallback):
    """Writes some answers of each logged step to a file, one JSON object a line.

    A resumed run first removes the answers of later steps.

    Args:
        path: the file.
        source: holds the newest answers.
    """

    def __init__(self, path: Path, source: RewardSource) -> None:
        self.path, self.source = path, source
        self._lines: list[str] = []

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Keep the answers of the finished steps."""
        self._lines = []
        if state.global_step and self.path.exists():
            # splitlines would also split at U+2028, which an answer may contain.
            lines = self.path.read_text(encoding="utf-8").split("\n")
            self._lines = [x for x in lines if x and json.loads(x)["step"] <= state.global_step]

    def on_log(
        self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any
    ) -> None:
        """Add answers of a training step."""
        found = self.source.last
        if found is None or "loss" not in (logs or {}) or not args.should_save:
            return
        for i in range(0, len(found.texts), max(1, len(found.texts) // _SAMPLES)):
            reward = found.rewards[i]
            entry = {
                "step": state.global_step,
                "prompt": found.prompts[i],
                "answer": found.texts[i],
                "reward": None if reward != reward else reward,
            }
            self._lines.append(json.dumps(entry, ensure_ascii=False))
        write_text(self.path, "".join(f"{line}\n" for line in self._lines))
