"""Steps whose zeroth-order block has rows of its own: rewards of answers, or preference pairs.

The first-order block, if there is one, follows the loss of its examples as ever. Without it, a step
consists of these rows alone, and the logged loss is minus their mean reward or their mean
preference loss.
"""

from __future__ import annotations

import json
import math
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset
from transformers import TrainerCallback

from zofo.disk.files import write_text
from zofo.errors import UserError
from zofo.optim.cost import num_moves
from zofo.optim.methods import get_method, methods_that
from zofo.optim.population import Population
from zofo.optim.zeroth_loss import ZerothLoss
from zofo.results.answers import ANSWERS_FILE
from zofo.rewards.functions import Given
from zofo.rewards.options import RewardOptions
from zofo.saved.layout import REFERENCE_FILE
from zofo.tasks.preference import PreferenceOptions
from zofo.trainer.answers import RewardSource
from zofo.trainer.pairs import PairSource
from zofo.trainer.trainer_mixin import TrainerMixin

_SAMPLES: Final = 4  # answers of a step that the file keeps


class SourceMixin(TrainerMixin):
    """Gives `HybridMixin` what its zeroth-order block follows in place of the examples' loss."""

    reward_tokenizer: Any = None
    """Reads prompts and pairs; None: `processing_class` does."""
    _rewards: RewardSource | None = None
    _pairs: PairSource | None = None
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
        chosen = self.hybrid_options
        wrong = []
        if chosen.distribution == "gaussian" or chosen.num_directions > 1:
            wrong.append(
                "each answer has a rank-one direction: leave distribution and "
                "num_directions at their defaults"
            )
        self._check_source("reward_funcs", wrong)
        data: Any = self.train_dataset if rows is None else rows
        if data is None:
            raise UserError("reward_funcs need prompts; pass reward_dataset, or train_dataset")
        self._rewards = RewardSource(
            data,
            functions,
            self.reward_tokenizer or self.processing_class,
            options,
            seed=self.args.seed if seed is None else seed,
            weights=weights,
        )
        self._rewards.check(self.model)
        self._replace_examples(len(self._rewards.ids))
        self.add_callback(SampleAnswers(self._output_folder / ANSWERS_FILE, self._rewards))

    def _take_pairs(self, rows: Any, options: PreferenceOptions | None, seed: int | None) -> None:
        """Make the source of preference pairs, unless `rows` is one."""
        self._check_source("preference_dataset", [])
        if self._rewards is not None:
            raise UserError("reward_funcs and preference_dataset are both given; keep one")
        if not isinstance(rows, PairSource):
            is_encoder_decoder = getattr(self.model.config, "is_encoder_decoder", False)
            rows = PairSource(
                rows,
                self.reward_tokenizer or self.processing_class,
                options,
                seed=self.args.seed if seed is None else seed,
                head="seq2seq" if is_encoder_decoder else "causal-lm",
            )
            for note in rows.notes:
                warnings.warn(note, stacklevel=4)
        self._pairs = rows
        self._pairs.check(self.model)
        self._replace_examples(len(self._pairs.pairs))
        self.add_callback(MeasureReference(self))

    def _check_source(self, name: str, wrong: Sequence[str]) -> None:
        """Raise UserError if the zeroth-order block cannot have rows of its own."""
        wrong = list(wrong)
        if not get_method(self.hybrid_options.method).zeroth:
            wrong.append(
                f"method {self.hybrid_options.method!r} has no zeroth-order block, which they "
                f"move: choose {methods_that(lambda m: bool(m.zeroth))}"
            )
        if self.hybrid_options.base_batch_fraction < 1:
            wrong.append("base_batch_fraction is a share of examples: leave it at 1")
        if self.args.world_size > 1:
            wrong.append("one process evaluates them: start only one")
        if wrong:
            raise UserError(f"{name} does not fit here: " + "; ".join(wrong))

    def _replace_examples(self, num: int) -> None:
        """Put numbers in place of examples if no block learns from them."""
        if not get_method(self.hybrid_options.method).first:
            self.train_dataset, self.data_collator = _Numbers(num), _numbers

    @property
    def has_source(self) -> bool:
        """Whether the zeroth-order block has rows of its own."""
        return self._rewards is not None or self._pairs is not None

    @property
    def has_examples(self) -> bool:
        """Whether a step needs the loss of its examples."""
        return not self.has_source or bool(get_method(self.hybrid_options.method).first)

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

    def _of_source(self, model: nn.Module, inputs: Mapping[str, Any]) -> Population | ZerothLoss:
        """What the zeroth-order block follows in the current micro-batch."""
        optimizer = self.hybrid_optimizer
        move = optimizer.step_count // optimizer.options.base_every
        ids = inputs.get("input_ids") if self.has_examples else None
        source: Any = self._pairs
        make = source.loss if self._rewards is None else self._rewards.population
        found: Population | ZerothLoss = make(
            model,
            move * self.args.gradient_accumulation_steps + self._number_in_step,
            weight=1 / self.current_gradient_accumulation_steps,
            tokens_per_forward=ids.numel() if isinstance(ids, Tensor) else None,
            context=self.compute_loss_context_manager,
        )
        return found

    @property
    def _source_loss(self) -> Tensor | float:
        """The loss of the newest rows of the source."""
        if self._pairs is not None and self._pairs.last is not None:
            return self._pairs.last.losses.mean()
        return -self._source_logs()["reward"]

    def _source_logs(self) -> dict[str, float]:
        """The figures of the newest rows of the source."""
        if self._pairs is not None and self._pairs.last is not None:
            return self._pairs.last.figures()
        source = self._rewards
        if source is None or source.last is None:
            return {}
        return source.last.figures(source.options.num_answers)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Save the model, and the reference of the pairs in a checkpoint."""
        super().save_model(output_dir, _internal_call)
        if self._pairs is not None and self.args.should_save:
            self._pairs.save_reference(Path(output_dir or self._output_folder) / REFERENCE_FILE)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)
        if self._pairs is not None and checkpoint is not None:  # The model has moved since.
            self._pairs.load_reference(Path(checkpoint) / REFERENCE_FILE)

    def measure_reference(self) -> None:
        """Measure the reference of the pairs that the run will use."""
        assert self._pairs is not None
        moves = num_moves(self.state.max_steps, self.hybrid_optimizer.options.base_every)
        self._pairs.measure_reference(
            self.model,
            moves * self.args.gradient_accumulation_steps,
            context=self.compute_loss_context_manager,
        )


class _Numbers(Dataset[dict[str, Any]]):
    """Numbers in place of examples, so that Trainer has batches to count."""

    def __init__(self, num: int) -> None:
        self.num = num

    def __len__(self) -> int:
        return self.num

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {"input_ids": index}  # Trainer drops keys that the model does not take.


def _numbers(items: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """A batch of `_Numbers`, of which nothing is read: the source chooses the rows of a step."""
    return {"input_ids": torch.tensor([item["input_ids"] for item in items])}


class MeasureReference(TrainerCallback):
    """Measures the reference of preference pairs before the first step."""

    def __init__(self, trainer: SourceMixin) -> None:
        self.trainer = trainer

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Measure it, unless the run is continued."""
        if state.global_step == 0:
            self.trainer.measure_reference()


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
