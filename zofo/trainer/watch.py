"""Warnings about a run that goes wrong, computed from the numbers of each step.

    signal to rounding   |f(x + eps v) − f(x)| / (u |f|), where u is the unit roundoff of the loss's
                         dtype. If it is near 1, eps is too small and the difference is noise.
    movement             |lr s| over the spacing of the weights. Below 2^-16 (bfloat16) or 2^-13
                         (float16), the float32 sum before stochastic rounding loses the update, and
                         a 16-bit base stops moving.
    zeros                the share of differences that are exactly 0, if the zeroth-order block has
                         a loss of its own, such as accuracy. Such steps do not move it.
    divergence           the running mean of the loss over its lowest value so far

A step whose loss or scalar is not finite is never applied. The run then stops, or it continues with
the next step if `on_non_finite` is "skip".
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
from zofo.perturb.shards import Whole

OnNonFinite = Literal["stop", "skip"]
_WINDOW: Final = 20  # Steps per check. One unusual batch hardly changes a median of twenty.
_MIN_SIGNAL: Final = 10.0  # Below it, rounding causes a tenth of the difference or more.
_MANY_ZEROS: Final = 0.5  # Above this share, most evaluations give no information.
_DIVERGED: Final = 2.0  # Chance does not double the mean loss of twenty batches.


@dataclass
class Watch:
    """Checks one step after another."""

    loss_dtype: torch.dtype  # of the model's arithmetic, which rounds the loss
    weight_dtype: torch.dtype  # of the base
    weight_scale: float  # typical absolute value of a weight
    eps: float  # smoothing radius
    has_own_loss: bool = False  # whether the differences are of another loss than the observed one
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
            loss: the unperturbed loss.
            projected_grad: the scalar s_k of each direction; empty if the step measured none.
            base_lr: learning rate of the zeroth-order base; None if the base does not move.
        """
        found: dict[str, str] = {}
        if loss is not None:
            self._losses.append(loss)
        # The rounding of the observed loss tells nothing about differences of another loss.
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
                    f"the loss differences are only {signal:.1f} times the rounding of a "
                    f"{str(self.loss_dtype).removeprefix('torch.')} loss, so a tenth of each or "
                    f"more is rounding error; raise eps ({self.eps:g}) tenfold"
                )
        if len(self._zeros) == _WINDOW and (share := statistics.fmean(self._zeros)) > _MANY_ZEROS:
            found["zeros"] = (
                f"{share:.0%} of the last {_WINDOW} steps' differences are exactly 0, because a "
                f"score changes in jumps and often does not react to eps {self.eps:g}; such steps "
                "do not move the block: raise eps, the batch size or num_directions"
            )
        if len(self._moves) == _WINDOW:
            move = statistics.median(self._moves)
            # Stochastic rounding adds the update in float32 first. There, an update below the
            # spacing of float32 is lost.
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
            # Below 0.1 nats, even a doubled loss is small.
            if mean > _DIVERGED * max(self._lowest, 0.1):
                found["divergence"] = (
                    f"the loss diverges: {mean:.3g} on average over {_WINDOW} steps, and "
                    f"{self._lowest:.3g} before; lower the learning rates"
                )
        new = [text for kind, text in found.items() if kind not in self._said]
        self._said |= found.keys()
        return new


class StopOnNonFinite(TrainerCallback):
    """Emits the warnings of `Watch`, and stops training if a loss or scalar is not finite.

    It stops with a checkpoint. A step that is not finite never changes the base, so the checkpoint
    holds the base of the last good step.

    Args:
        trainer: a `HybridMixin` trainer.
        on_non_finite: "stop" or "skip".
    """

    def __init__(self, trainer: Any, on_non_finite: OnNonFinite = "stop") -> None:
        self.trainer, self.on_non_finite = trainer, on_non_finite
        self.watch: Watch | None = None
        self.stopped_at: int | None = None  # number of the step that was not finite, from 1
        self._judged: StepReport | None = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Measure the scale of the weights and start a new `Watch`."""
        optimizer = self.trainer.hybrid_optimizer
        self.watch, self.stopped_at = None, None
        zeroth = [g for g in optimizer.param_groups if g["order"] == "zeroth"]
        sample = zeroth[0]["params"] if zeroth else []
        if sample:
            largest = Whole({"": max(sample, key=lambda p: p.numel())})[""]
            self.watch = Watch(
                # The loss is float32, but the arithmetic before it rounds as the weights do.
                loss_dtype=largest.dtype,
                weight_dtype=largest.dtype,
                weight_scale=float(largest.detach().flatten()[:65536].float().abs().median()),
                eps=optimizer.options.eps,
                has_own_loss=self.trainer.has_zeroth_loss,
            )

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> Any:
        """Check the newest report that has been read; on CUDA it is that of the previous step."""
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
            group = next(g for g in optimizer.param_groups if g["order"] == "zeroth")
            rate = float(group["lr"]) if group.get("block", "base") == "base" else None
            for text in self.watch.observe(report.loss, report.projected_grad, rate):
                warnings.warn(f"step {state.global_step}: {text}", stacklevel=2)
        return control
