"""Warnings about a run that goes wrong, computed from the numbers of each step.

    signal to rounding   |f(x + eps v) − f(x)| / (u |f|), with u the unit roundoff of the loss's
                         dtype. Near 1 the difference is noise, because eps is too small.
    movement             |lr s| over the spacing of the weights. Below 2^-16 (bfloat16) or 2^-13
                         (float16), the float32 sum before stochastic rounding loses the update, so
                         a 16-bit base stops moving.
    zeros                for a zeroth-order loss of its own, such as accuracy: the share of
                         differences that are exactly 0. If most are, most steps change nothing.
    divergence           the running mean of the loss over its lowest value so far

A loss or scalar that is not finite is never applied. The run then stops, unless told to skip it.
"""

from __future__ import annotations

import math
import statistics
import warnings
from collections import deque
from dataclasses import dataclass, field
from typing import Any, Final, Literal

import torch
from transformers import TrainerCallback

from zofo.optim.reports import StepReport

OnNonFinite = Literal["stop", "skip"]
_WINDOW: Final = 20
"""Steps per judgement: one unusual batch barely changes a median of twenty."""
_MIN_SIGNAL: Final = 10.0
"""Below this ratio, rounding causes a tenth of the difference or more."""
_MANY_ZEROS: Final = 0.5
"""Above this share, most evaluations teach nothing."""
_DIVERGED: Final = 2.0
"""Limit of mean loss over lowest mean: chance does not double a mean of twenty batches."""


@dataclass
class Watch:
    """Checks one step after another.

    Args:
        loss_dtype: dtype of the model's arithmetic, whose rounding is the noise of a difference.
        weight_dtype: dtype of the base.
        weight_scale: typical absolute value of a weight.
        eps: smoothing radius.
        has_own_loss: whether the differences are of another loss than the observed one, whose
            rounding then does not apply to them.
    """

    loss_dtype: torch.dtype
    weight_dtype: torch.dtype
    weight_scale: float
    eps: float
    has_own_loss: bool = False
    _zeros: deque[float] = field(default_factory=lambda: deque(maxlen=_WINDOW))
    _losses: deque[float] = field(default_factory=lambda: deque(maxlen=_WINDOW))
    _signals: deque[float] = field(default_factory=lambda: deque(maxlen=_WINDOW))
    _moves: deque[float] = field(default_factory=lambda: deque(maxlen=_WINDOW))
    _lowest: float = math.inf
    _said: set[str] = field(default_factory=set)

    def signal_to_rounding(self, loss: float, projected_grad: tuple[float, ...]) -> float:
        """Median absolute loss difference, |s| eps, over the rounding of the loss, u |f|."""
        noise = torch.finfo(self.loss_dtype).eps / 2 * max(abs(loss), 1e-30)
        return statistics.median(abs(s) * self.eps for s in projected_grad) / noise

    def observe(
        self, loss: float | None, projected_grad: tuple[float, ...], base_lr: float | None
    ) -> list[str]:
        """Add a finite step and return new warnings, each kind at most once per run.

        Args:
            loss: unperturbed loss.
            projected_grad: s_k, one per direction; empty without zeroth-order groups.
            base_lr: learning rate of the zeroth-order base; None: it does not move.
        """
        found: dict[str, str] = {}
        if loss is not None:
            self._losses.append(loss)
        if self.has_own_loss and projected_grad:
            self._zeros.append(sum(s == 0 for s in projected_grad) / len(projected_grad))
        elif loss is not None and projected_grad:
            self._signals.append(self.signal_to_rounding(loss, projected_grad))
        if base_lr and projected_grad and self.weight_dtype in (torch.bfloat16, torch.float16):
            spacing = torch.finfo(self.weight_dtype).eps * max(self.weight_scale, 1e-30)
            moved = base_lr * statistics.fmean(abs(s) for s in projected_grad)
            self._moves.append(moved / spacing)
        if len(self._signals) == _WINDOW:
            signal = statistics.median(self._signals)
            if signal < _MIN_SIGNAL:
                found["signal"] = (
                    f"the loss differences are {signal:.1f} times the rounding of a "
                    f"{str(self.loss_dtype).removeprefix('torch.')} loss: mostly noise; raise eps "
                    f"({self.eps:g}) tenfold"
                )
        if len(self._zeros) == _WINDOW and (share := statistics.fmean(self._zeros)) > _MANY_ZEROS:
            found["zeros"] = (
                f"{share:.0%} of the last {_WINDOW} steps' differences are exactly 0: a score "
                f"that changes in jumps does not react to eps {self.eps:g}, and then the block "
                "stands still; raise eps, the batch, or num_directions"
            )
        if len(self._moves) == _WINDOW:
            move = statistics.median(self._moves)
            # One float32 spacing over one weight spacing: the least that stochastic rounding sees.
            float32, stored = torch.finfo(torch.float32), torch.finfo(self.weight_dtype)
            if move < float32.eps / stored.eps:
                found["movement"] = (
                    f"an update is {move:.1e} of the spacing of "
                    f"{str(self.weight_dtype).removeprefix('torch.')} weights, less than "
                    "stochastic rounding resolves, so the base stands still; raise base_lr or use "
                    "float32"
                )
        if len(self._losses) == _WINDOW:
            mean = statistics.fmean(self._losses)
            self._lowest = min(self._lowest, mean)
            if mean > _DIVERGED * max(self._lowest, 0.1):
                found["divergence"] = (
                    f"the loss diverges: {mean:.3g} on average over {_WINDOW} steps, after "
                    f"{self._lowest:.3g}; lower the learning rates"
                )
        new = [text for kind, text in found.items() if kind not in self._said]
        self._said |= found.keys()
        return new


class StopOnNonFinite(TrainerCallback):
    """Stops training, with a checkpoint, at a loss or scalar that is not finite; prints warnings.

    Such a step never changes the base, so the checkpoint holds the base of the last good step.

    Args:
        trainer: a `HybridMixin` trainer.
        on_non_finite: "stop" or "skip".
    """

    def __init__(self, trainer: Any, on_non_finite: OnNonFinite = "stop") -> None:
        self.trainer, self.on_non_finite = trainer, on_non_finite
        self.watch: Watch | None = None
        self.stopped_at: int | None = None
        self._judged: StepReport | None = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Measure the scale of the weights and start a new `Watch`."""
        optimizer = self.trainer.hybrid_optimizer
        self.watch, self.stopped_at = None, None
        zeroth = [g for g in optimizer.param_groups if g["order"] == "zeroth"]
        sample = zeroth[0]["params"] if zeroth else []
        if sample:
            largest = max(sample, key=lambda p: p.numel())
            self.watch = Watch(
                # The loss is float32, but the arithmetic before it rounds as the weights do.
                loss_dtype=largest.dtype,
                weight_dtype=largest.dtype,
                weight_scale=float(largest.detach().flatten()[:65536].float().abs().median()),
                eps=optimizer.options.eps,
                has_own_loss=self.trainer.has_zeroth_loss,
            )

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> Any:
        """Check the newest report that is read: on CUDA that of the previous step."""
        optimizer = self.trainer.hybrid_optimizer
        is_last = state.global_step >= state.max_steps
        report = optimizer.last_step if is_last else optimizer.last_read
        if report is None or report is self._judged:
            return control
        self._judged = report
        if report.non_finite:
            if self.on_non_finite == "stop":
                self.stopped_at = report.step + 1
                control.should_training_stop = control.should_save = control.should_log = True
            return control
        if self.watch is not None:
            base = [g for g in optimizer.param_groups if g["order"] == "zeroth"]
            moves_base = base[0].get("block", "base") == "base"
            rate = float(base[0]["lr"]) if moves_base else None
            for text in self.watch.observe(report.loss, report.projected_grad, rate):
                warnings.warn(f"step {state.global_step}: {text}", stacklevel=2)
        return control
