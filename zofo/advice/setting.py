"""The question to the advisor, `Setting`, and its answer, `Advice`."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Final, Literal

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
"""A choice: an expected decrease below this share of the loss is not worth its forward passes."""
Caps = Literal["ignore", "apply"]


@dataclass(kw_only=True)
class Setting(StepOptions):
    """The run that needs advice.

    Attributes:
        method: a name in `METHODS`.
        num_steps: optimizer steps.
        batch_size: rows of a micro-batch.
        accumulation: micro-batches per step.
        base_rows: rows of a micro-batch that the loss difference uses; None: all rows.
        optimizer: optimizer of the first-order block, "adamw" or "sgd".
        adapter_weight_decay: weight decay of that optimizer.
        max_grad_norm: limit of that block's gradient norm; None: no clipping.
        eps, base_lr, adapter_lr: the given numbers, or "auto" for those to find.
        usual_rate: first rate of the search if the measurements give none. Adam's search begins at
            most half a decade away from it.
        backward_share: share of the layers that a backward pass reaches, from 0 to 1.
        seed: seed of the run.
        caps: whether the theorem's caps lower the rates; they are always shown.
        target: the theorem's ε, which sets the number of epochs in the caps.
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
    backward_share: float = 1.0
    seed: int = 0
    caps: Caps = "ignore"
    target: float | None = None

    @property
    def zeroth(self) -> Block | None:
        """The block that is updated by loss differences."""
        return METHODS[self.method].zeroth

    @property
    def first(self) -> Block | None:
        """The block that is updated by its gradient."""
        return METHODS[self.method].first

    def asks(self, block: str | None) -> bool:
        """Whether the advisor must find the rate of a block."""
        return block is not None and getattr(self, f"{block}_lr") == "auto"

    def directions(self, num_rows: int) -> dict[str, Any]:
        """`num_directions` and `by_rows` of a step on `num_rows` rows, for `zeroth_rate`."""
        wanted, by_rows = self.directions_per_step, self.directions_per_step != 1
        num = num_rows if wanted == "rows" else min(int(wanted), num_rows)
        return {"num_directions": num if by_rows else self.num_directions, "by_rows": by_rows}

    @property
    def forwards_of_run(self) -> float:
        """Forward-equivalents of the whole training."""
        share = 1.0 if self.base_rows is None else self.base_rows / self.batch_size
        a_move = forwards_of_a_move(self.estimator, self.num_directions, share)
        moves = num_moves(self.num_steps, self.base_every) if self.zeroth else 0
        return forward_equivalents(
            self.accumulation * self.num_steps,
            METHODS[self.method].forwards_per_gradient,
            self.accumulation * moves * a_move,
            self.backward_share,
        )


@dataclass
class Advice:
    """The advised numbers, and the measurements behind them.

    Attributes:
        setting: the run.
        eps, base_lr, adapter_lr: the advised number if the setting has "auto", otherwise the given
            one; None if the method does not use it.
        plateau: suitable radii; None if neither `eps` nor the zeroth-order rate was asked for.
        at_start, at_later: moments of the zeroth-order block before and after a short training of
            the first-order block. Both are None if the zeroth-order rate was given, and `at_later`
            is None without a first-order block.
        zeroth_start, zeroth_later: the rates that follow from these moments.
        split: rates per group; None if groups were not measured.
        first: search for the first-order rate; None if that rate was given.
        along: curvature along the update of the first-order block, at the start and after a short
            training.
        caps: block and reading -> the theorem's cap; infinite if no curvature was found.
        capped: the blocks whose rate a cap lowered.
        progress: expected decrease of the loss by the zeroth-order block over the run.
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
        """Whether the expected decrease of the loss is too small to pay for the forward passes."""
        later = self.at_later or self.at_start
        if self.progress is None or later is None:
            return False
        # `not >` also covers NaN: an unknown upper end is no reason for hope.
        return not self.progress.high > HOPELESS * later.loss


def remarks_of(advice: Advice) -> list[str]:
    """Sentences that a reader should know before the numbers, most important first."""
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
            what += "; the interval contains 0, so it may have no effect"
        found.append(what)
    if advice.plateau is not None and not advice.plateau.exists:
        found.append(
            f"no eps keeps both errors small: at the best one, {advice.plateau.eps:.2g}, the error "
            f"of the loss difference is {advice.plateau.error:.0%}; use a dtype with more bits or "
            "estimator=central"
        )
    if advice.first is not None and not advice.first.moved:
        found.append(
            f"no first-order rate improved the loss measurably within {advice.first.num_steps} "
            "steps, so none can be preferred; the largest harmless one is taken"
        )
    return found
