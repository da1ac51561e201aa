"""End a run before its last step: one that is hopeless, or one that no longer improves.

With early_stopping = m, a dev loss ends the run if it is not finite. In the second half of the
steps, it also ends the run if it exceeds the dev loss before training by more than m nats. The rule
uses only the run's own history, so other runs have no influence. The record `stopped.json` is
written before the last checkpoint, so that a run killed in between is not continued by mistake.

With patience = n, a run also ends once n evaluations in a row have brought no better dev score.
Such a run is complete: it has a result as if it had made all its steps.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from transformers import TrainerCallback

from zofo.disk.files import read_json, write_json
from zofo.saved.layout import STOPPED_FILE


def is_hopeless(loss: float, start: float, margin: float, step: int, num_steps: int) -> bool:
    """Whether the dev loss after `step` of `num_steps` steps ends the run.

    `start` is the dev loss before training. All losses and the margin are in nats.
    """
    return not math.isfinite(loss) or (2 * step >= num_steps and loss > start + margin)


def is_out_of_patience(
    history: Sequence[Mapping[str, Any]], metric: str, *, larger_is_better: bool, patience: int
) -> bool:
    """Whether the last `patience` evaluations of a log brought no better score than those before.

    Args:
        history: the log of the run; its entries with `metric` are the evaluations.
        metric: name of the dev score.
        larger_is_better: whether a larger score is a better one. An equal score is no better one.
        patience: number of evaluations.
    """
    sign = -1 if larger_is_better else 1
    scores = [sign * float(entry[metric]) for entry in history if metric in entry]
    # NaN compares with nothing, so it counts as the worst score.
    scores = [math.inf if math.isnan(score) else score for score in scores]
    return len(scores) > patience and min(scores) in scores[:-patience]


class Patience(TrainerCallback):
    """Ends a run whose dev score no longer improves.

    It reads the log that the checkpoints keep, so a resumed run ends where the other would have.

    Args:
        trainer: the trainer, whose arguments name the score that selects the best step.
        patience: number of evaluations without a better score that end the run.
        note: told what happened, in words.
    """

    def __init__(self, trainer: Any, patience: int, note: Callable[[str], None]) -> None:
        self.trainer, self.patience, self.note = trainer, patience, note

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Make no further step if the run has been killed after its last one."""
        if self._has_ended(state):
            state.max_steps = state.global_step

    def on_evaluate(self, args: Any, state: Any, control: Any, **kwargs: Any) -> Any:
        """End the run after an evaluation."""
        if state.global_step < state.max_steps and self._has_ended(state):
            self.note(
                f"ended at step {state.global_step} of {state.max_steps}: the last "
                f"{self.patience} evaluations on dev brought no better score (patience)"
            )
            control.should_training_stop = control.should_save = True
        return control

    def _has_ended(self, state: Any) -> bool:
        return is_out_of_patience(
            state.log_history,
            self.trainer.args.metric_for_best_model,
            larger_is_better=self.trainer.args.greater_is_better,
            patience=self.patience,
        )


class StopEarly(TrainerCallback):
    """Applies the rule of early stopping, and records the reason of every early end.

    Args:
        trainer: the trainer, whose `watch` stops at a loss that is not finite.
        folder: the run folder.
        margin: margin of the rule in nats; None switches the rule off.
        start: the dev loss before training, which the rule needs.
    """

    def __init__(
        self, trainer: Any, folder: Path, margin: float | None, start: float | None
    ) -> None:
        self.trainer, self.folder, self.margin, self.start = trainer, folder, margin, start
        self.reason: str | None = None

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Record a step at which the watch has found a value that is not finite."""
        if self.trainer.watch.stopped_at is not None and self.reason is None:
            found = "the loss or the projected gradient is not finite"
            if self.trainer.lacks_rewards:
                found = "no answer has a reward"
            self._record(
                state.global_step,
                f"stopped at step {self.trainer.watch.stopped_at}: {found}, and the base was not "
                "moved by it",
            )

    def on_evaluate(
        self,
        args: Any,
        state: Any,
        control: Any,
        metrics: dict[str, float] | None = None,
        **kwargs: Any,
    ) -> Any:
        """Apply the rule to a dev loss."""
        loss, step = (metrics or {}).get("eval_loss"), state.global_step
        if self.margin is None or self.start is None or loss is None or step >= state.max_steps:
            return control
        if is_hopeless(loss, self.start, self.margin, step, state.max_steps):
            self._record(
                step,
                f"stopped at step {step}: the dev loss is {loss:.4g}, {self.start:.4g} before "
                f"training, and early_stopping allows {self.margin:g} more",
            )
            control.should_training_stop = True
        return control

    def _record(self, step: int, reason: str) -> None:
        self.reason = reason
        if self.trainer.args.should_save:  # one of several processes
            write_json(self.folder / STOPPED_FILE, {"step": step, "reason": reason})


def stop_reason(folder: Path) -> str | None:
    """The reason why a run ended early; None if it did not.

    Raises:
        UserError: if the record is damaged.
    """
    path = folder / STOPPED_FILE
    return str(read_json(path)["reason"]) if path.exists() else None
