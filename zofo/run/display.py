"""The progress display of a run, and the file of its metrics."""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import Progress
from transformers import TrainerCallback

from zofo.console import duration_text, new_progress
from zofo.errors import UserError

_SHOWN = {
    "loss": "loss {:.4f}",
    "reward": "reward {:.4f}",
    "preference_margin": "margin {:+.3g}",
    "projected_grad": "s {:+.3g}",
    "learning_rate": "adapter_lr {:.2g}",
    "base_lr": "base_lr {:.2g}",
}


class TrainingDisplay(TrainerCallback):
    """Shows a live bar on a terminal, and elsewhere one line per log entry."""

    def __init__(self, console: Console, rows_per_step: int) -> None:
        self.console, self.rows_per_step = console, rows_per_step
        self._progress: Progress | None = None
        self._last: tuple[int, float] | None = None  # step and time of the last log entry

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Start the bar."""
        self._last = (state.global_step, time.monotonic())
        if self.console.is_terminal:
            self._progress = new_progress(self.console, "steps")
            self._task = self._progress.add_task("training", total=state.max_steps, text="")
            self._progress.update(self._task, completed=state.global_step)
            self._progress.start()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Advance the bar."""
        if self._progress is not None:
            self._progress.update(self._task, completed=state.global_step)

    def on_log(
        self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any
    ) -> None:
        """Show losses, projected gradient, learning rates and samples per second."""
        logs = logs or {}
        for what, prefix in (("dev", "eval_"), ("watch_task", "watch_")):
            if f"{prefix}loss" not in logs:
                continue
            line = f"step {state.global_step}: {what} loss {logs[f'{prefix}loss']:.4f}"
            for name, title in (("accuracy", "accuracy"), ("f1", "F1")):
                value = logs.get(f"{prefix}{name}")
                line += "" if value is None else f", {title} {value:.3f}"
            self.console.print(line, highlight=False, soft_wrap=True)
        if "loss" not in logs or self._last is None:
            return
        step, now = state.global_step, time.monotonic()
        done, since = step - self._last[0], now - self._last[1]
        self._last = (step, now)
        parts = [form.format(float(logs[key])) for key, form in _SHOWN.items() if key in logs]
        rate = done * self.rows_per_step / max(since, 1e-9)
        parts.append(f"{rate:.1f} samples/s")
        if self._progress is not None:
            self._progress.update(self._task, text="  ".join(parts))
            return
        remaining = (state.max_steps - step) * since / max(done, 1)
        parts = [f"step {step}/{state.max_steps}", *parts, f"{duration_text(remaining)} left"]
        self.console.print("  ".join(parts), highlight=False, soft_wrap=True)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Remove the bar."""
        self.close()

    def close(self) -> None:
        """Remove the bar. A run also calls this after an error in training."""
        if self._progress is not None:
            self._progress.stop()
            self._progress = None


class MetricsFile(TrainerCallback):
    """Writes every log entry to `metrics.jsonl`, as one JSON object per line.

    A resumed run first rewrites the entries that its checkpoint holds. The file therefore ends up
    equal to that of an uninterrupted run, whatever was lost or logged after the checkpoint.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Rewrite the entries of the finished steps."""
        from zofo.disk.files import write_text

        done = state.log_history if state.global_step else []
        write_text(self.path, "".join(_metrics_line(entry["step"], entry) for entry in done))

    def on_log(
        self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any
    ) -> None:
        """Append an entry.

        Raises:
            UserError: if the file cannot be written.
        """
        try:
            # This mode does not make the file again if the folder was removed meanwhile.
            with self.path.open("r+", encoding="utf-8") as file:
                file.seek(0, os.SEEK_END)
                file.write(_metrics_line(state.global_step, logs or {}))
        except OSError as error:
            raise UserError(
                f"cannot write {self.path}: {error.strerror or error}. The checkpoints are as they "
                "were: free space or bring the folder back, and continue the run"
            ) from error


def _metrics_line(step: int, logs: Mapping[str, Any]) -> str:
    # JSON has no NaN, so a value that is not finite is written as text.
    values = {
        key: str(value) if isinstance(value, float) and not math.isfinite(value) else value
        for key, value in logs.items()
    }
    return json.dumps({"step": step, **values}) + "\n"
