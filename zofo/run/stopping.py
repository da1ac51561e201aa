"""End a run before its last step, and record the reason.

With early_stopping = m, a dev loss ends the run if it is not finite. In the second half of the
steps, it also ends the run if it exceeds the dev loss before training by more than m nats. The rule
uses only the run's own history, so other runs have no influence. The record `stopped.json` is
written before the last checkpoint, so that a run killed in between is not continued by mistake.
"""

from __future__ import annotations

import math
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
