"""What is asked of the advisor, and what it answers."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Final, Literal

from zofo.advice.caps import Cap
from zofo.advice.curvature import AlongUpdate
from zofo.advice.eps import Plateau
from zofo.advice.groups import Split
from zofo.advice.moments import Moments
from zofo.advice.rates import ZerothRate
from zofo.advice.short_trainings import FirstRate
from zofo.optim.cost import forward_equivalents, forwards_of_a_move, num_moves
from zofo.optim.methods import METHODS, Block
from zofo.optim.options import StepOptions
from zofo.statistics.resampling import Interval

HOPELESS: Final = 0.01
"""Share of the loss below which the zeroth-order part is said not to be worth its forwards."""
Caps = Literal["ignore", "apply"]


@dataclass(kw_only=True)
class Setting(StepOptions):
    """The run that is advised on.

    Attributes:
        method: a name in `METHODS`.
        num_steps: optimiser steps.
        batch_size: rows of a micro-batch.
        accumulation: micro-batches a step.
        base_rows: rows of a micro-batch that the difference is taken on; None: all.
        optimizer: of the first-order block: "adamw" or "sgd".
        adapter_weight_decay: handed to it.
        max_grad_norm: clipping of its gradient.
        eps, base_lr, adapter_lr: "auto", or what is given.
        usual_rate: where the first-order search begins if curvature says nothing, and within half a
            decade of which Adam's begins otherwise.
        seed: of the run.
        caps: whether the theorem's caps are applied; they are always shown.
        target: ε of the theorem, for the epochs that it asks for.
    """

    method: str = "hybrid"
    num_steps: int = 200
    batch_size: int = 8
    accumulation: int = 1
    base_rows: int | None = None
    optimizer: str = "adamw"
    adapter_weight_decay: float = 0.0
    max_grad_norm: float | None = 1.0
    eps: float | Literal["auto"] = "auto"  # type: ignore[assignment]
    base_lr: float | dict[str, float] | Literal["auto"] | None = "auto"
    adapter_lr: float | Literal["auto"] | None = "auto"
    usual_rate: float = 1e-3
    seed: int = 0
    caps: Caps = "ignore"
    target: float | None = None

    @property
    def zeroth(self) -> Block | None:
        """The block that moves by loss differences."""
        return METHODS[self.method].zeroth

    @property
    def first(self) -> Block | None:
        """The block that moves by its gradient."""
        return METHODS[self.method].first

    def asks(self, block: str | None) -> bool:
        """Whether a block's rate is to be found."""
        return block is not None and getattr(self, f"{block}_lr") == "auto"

    @property
    def forwards_of_run(self) -> float:
        """Forward-equivalents of its training."""
        share = 1.0 if self.base_rows is None else self.base_rows / self.batch_size
        a_move = forwards_of_a_move(self.estimator, self.num_directions, share)
        moves = num_moves(self.num_steps, self.base_every) if self.zeroth else 0
        return forward_equivalents(
            self.accumulation * self.num_steps,
            METHODS[self.method].forwards_per_gradient,
            self.accumulation * moves * a_move,
        )


@dataclass
class Advice:
    """What is advised, and what it rests on.

    Attributes:
        setting: the run.
        eps, base_lr, adapter_lr: numbers: advised where "auto" was asked, else as given; None where
            the method has no use for one.
        plateau: of eps; None without a zeroth-order block, or where nothing of it was asked.
        at_start, at_later: moments of the zeroth-order block before and after a short training of
            the first-order block; `at_later` is None where there is none.
        zeroth_start, zeroth_later: rates that follow from each.
        split: rates by group; None where groups were not measured.
        first: of the first-order block; None where its rate was given.
        along: of the first-order block: along its first update, at the start and later.
        caps: block and reading -> the theorem's cap; infinite where no curvature was found.
        capped: blocks whose rate a cap has lowered.
        progress: expected decrease of the loss by the zeroth-order part over the run.
        cost: forward-equivalents that the advice took.
        remarks: sentences, most important first.
    """

    setting: Setting
    eps: float | None = None
    base_lr: float | dict[str, float] | None = None
    adapter_lr: float | None = None
    plateau: Plateau | None = None
    at_start: Moments | None = None
    at_later: Moments | None = None
    zeroth_start: ZerothRate | None = None
    zeroth_later: ZerothRate | None = None
    split: Split | None = None
    first: FirstRate | None = None
    along: tuple[AlongUpdate, ...] = ()
    caps: dict[str, Cap] = field(default_factory=dict)
    capped: list[str] = field(default_factory=list)
    progress: Interval | None = None
    cost: float = 0.0
    remarks: list[str] = field(default_factory=list)

    @property
    def is_hopeless(self) -> bool:
        """Whether the zeroth-order part is not expected to move the loss within the run."""
        later = self.at_later or self.at_start
        if self.progress is None or later is None:
            return False
        return not self.progress.high > HOPELESS * later.loss


def remarks_of(advice: Advice) -> list[str]:
    """What a reader should know before the numbers."""
    setting, found = advice.setting, []
    later = advice.at_later or advice.at_start
    if advice.progress is not None and later is not None:
        what = (
            f"the zeroth-order part is expected to lower the loss by {advice.progress:.2g} of "
            f"{later.loss:.3g} in {setting.num_steps} steps"
        )
        if advice.is_hopeless:
            most = advice.progress.high
            what = "is not expected to lower the loss"
            if most > 0:
                what = f"is expected to lower the loss by less than {most:.2g}"
            what = (
                f"hopeless: the zeroth-order part {what} of {later.loss:.3g} in "
                f"{setting.num_steps} steps ({advice.progress:.2g})"
            )
            if setting.first and setting.zeroth:
                what += "; method fo-peft costs a third less"
        elif advice.progress.low <= 0:
            what += "; the interval holds 0, so it may do nothing"
        found.append(what)
    if advice.plateau is not None and not advice.plateau.exists:
        found.append(
            f"there is no plateau of eps: at the best, {advice.plateau.eps:.2g}, the difference is "
            f"off by {advice.plateau.error:.0%}; a wider dtype or estimator central helps"
        )
    if advice.first is not None and not advice.first.moved:
        found.append(
            "the best harmless rate did not lower the loss beyond its noise within "
            f"{advice.first.num_steps} steps; the first-order rate rests on what does no harm"
        )
    return found
