"""Find the learning rates and the smoothing radius of a run from a few hundred forward passes.

    1  losses on a ladder of radii along directions of the zeroth-order block     eps.py
    2  slopes and curvatures along directions, at the start                       moments.py
    3  short trainings of the first-order block at a few rates                    short_trainings.py
    4  slopes and curvatures again, after the best short training, one group of modules at a time
    5  rates, the theorem's caps, expected progress, verdict

A hybrid run moves its base at points where the adapter has already learned something. The base is
therefore measured before and after a short training. The advised rate gives the lowest expected
loss on average over the two points. It never exceeds half of the stable rate at either point.

Weights, buffers, flags and random generators are restored bit for bit.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, Final

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from zofo.advice.caps import cap, epochs_to
from zofo.advice.curvature import AlongUpdate, along_update, measure_directions
from zofo.advice.eps import MOST_FORWARDS as LADDER_FORWARDS
from zofo.advice.eps import Plateau, measure_ladder, plateau, weight_scale
from zofo.advice.groups import NUM_KINDS, groups_of, split_rates
from zofo.advice.moments import Moments, moments, total
from zofo.advice.probe import NUM_HELD, LossAndRows, Probe, untouched
from zofo.advice.rates import ZerothRate, compromise, progress_at, zeroth_rate
from zofo.advice.setting import Advice, Setting, remarks_of
from zofo.advice.short_trainings import (
    MAX_RATES,
    RATIO,
    Beginning,
    FirstRate,
    VirtualRun,
    num_virtual_steps,
    search_rate,
    virtual_training,
)
from zofo.errors import UserError
from zofo.noise.combine import Distribution
from zofo.optim.cost import num_moves
from zofo.optim.generators import seed_generators
from zofo.optim.methods import METHODS, param_groups
from zofo.perturb.view import Perturbation
from zofo.statistics.resampling import Interval

NUM_DIRECTIONS: Final = 6
"""Directions at each of the two points. Each direction takes three forward passes."""
DIRECTIONS_A_GROUP: Final = 4
MIN_ROWS: Final = 16


def advise(
    model: nn.Module,
    loss: LossAndRows,
    batch_of: Callable[[Sequence[int]], Any],
    num_rows: int,
    setting: Setting,
    *,
    split: bool = True,
    report: Callable[[str, float], None] | None = None,
) -> Advice:
    """Find what the setting leaves "auto".

    Args:
        model: the model with its adapter, on its device. It is restored bit for bit.
        loss: gives the loss of a batch and the loss of each row.
        batch_of: row indices -> batch.
        num_rows: rows of the training set.
        setting: the run.
        split: whether to look for one rate per group of modules.
        report: receives the name of each phase as it begins, and the forward-equivalents so far.

    Returns:
        The advice. On one machine it depends only on the weights, the rows and the setting.

    Raises:
        UserError: if the training set has fewer than `MIN_ROWS` rows, if the loss is not finite, or
            if the method does not suit the model.
    """
    if num_rows < MIN_ROWS:
        raise UserError(
            f"the training set has {num_rows} rows; auto needs at least {MIN_ROWS} to separate "
            "signal from noise; give base_lr, adapter_lr and eps as numbers"
        )
    seed = _advice_seed(setting.seed)
    flags = [(p, p.requires_grad) for p in model.parameters()]
    try:
        probe = Probe(
            model,
            loss,
            batch_of,
            num_rows=num_rows,
            batch_size=min(setting.batch_size, num_rows // 2),
            seed=seed,
            backward_share=setting.backward_share,
        )
        advisor = _Advisor(probe, setting, split, report)
        with untouched(model, advisor.first, seed=seed % 2**63):
            model.train()
            return advisor.run()
    finally:
        for parameter, flag in flags:
            parameter.requires_grad_(flag)


def most_forwards(setting: Setting) -> int:
    """Upper bound of the forward-equivalents that an advice costs.

    A small model or training set costs less. One unit is the forward pass of a micro-batch.
    """
    zeroth, first = setting.zeroth, setting.first
    forwards = METHODS[setting.method].forwards_per_gradient
    gradient = 1 + (forwards - 1) * setting.backward_share
    steps, held = num_virtual_steps(setting.num_steps), math.ceil(NUM_HELD / setting.batch_size)
    training = steps * setting.accumulation * gradient + held
    at_the_start = (steps - steps // 2) * setting.accumulation + held
    most = 0.0
    if zeroth is not None and (setting.asks(zeroth) or setting.eps == "auto"):
        most += LADDER_FORWARDS
    if setting.asks(first):
        # The curvature along the update takes two gradients of two batches at each of two points.
        most += MAX_RATES * training + at_the_start + 8 * gradient
    if setting.asks(zeroth):
        most += 3 * NUM_DIRECTIONS
        if first is not None:
            most += 3 * max(NUM_DIRECTIONS, NUM_KINDS * DIRECTIONS_A_GROUP)
            # The search may have skipped the short training that this point needs.
            most += training if setting.asks(first) else training + at_the_start
    return math.ceil(most)


class _Advisor:
    """The measurements of one advice, and the state that they share."""

    def __init__(
        self,
        probe: Probe,
        setting: Setting,
        split: bool,
        report: Callable[[str, float], None] | None,
    ) -> None:
        self.probe, self.setting, self.wants_split = probe, setting, split
        self.model, self.seed = probe.model, probe.seed
        self.report = report
        groups = param_groups(
            probe.model,
            setting.method,
            base_lr=setting.base_lr if isinstance(setting.base_lr, dict) else 0.0,
            adapter_lr=0.0,
        )
        self.zeroth: dict[str, tuple[nn.Parameter, int]] = {}
        self.first: list[nn.Parameter] = []
        for group in groups:
            if group["order"] == "first":
                self.first += group["params"]
            else:
                pairs = zip(group["params"], group["tensors"], strict=True)
                self.zeroth |= dict(zip(group["names"], pairs, strict=True))
        self.scale = weight_scale([parameter for parameter, _ in self.zeroth.values()])
        self.num_moves = num_moves(setting.num_steps, setting.base_every)
        rows = setting.batch_size if setting.base_rows is None else setting.base_rows
        self.batch_rows = rows * setting.accumulation
        self.start = [p.detach().clone() for p in self.first]
        self.ends: dict[float, list[Tensor]] = {}
        self.beginning: Beginning | None = None
        self.steps = num_virtual_steps(setting.num_steps)

    def run(self) -> Advice:
        setting, advice = self.setting, Advice(self.setting)
        zeroth, first = setting.zeroth, setting.first
        advice.base_lr = None if setting.base_lr == "auto" else setting.base_lr
        advice.adapter_lr = None if setting.adapter_lr == "auto" else setting.adapter_lr
        advice.eps = None if setting.eps == "auto" or zeroth is None else setting.eps
        asks_zeroth = setting.asks(zeroth)
        radius = 0.0
        if zeroth is not None and (asks_zeroth or setting.eps == "auto"):
            self._announce("eps")
            advice.plateau, radius = self._eps()
            advice.eps = _rounded(advice.plateau.eps) if setting.eps == "auto" else setting.eps
        if asks_zeroth:
            self._announce(f"{zeroth}: curvature")
            advice.at_start = self._moments(self._view(), radius, NUM_DIRECTIONS, 100)
        if setting.asks(first):
            self._announce(f"{first}: short trainings")
            advice.first = self._search(advice)
            setattr(advice, f"{first}_lr", _rounded(advice.first.rate))
        if asks_zeroth:
            if first is not None:
                self._announce(f"{zeroth}: curvature after a short training")
                self._train_first_block(advice)
                advice.at_later = self._moments_after_training(advice, radius)
                self._set(self.start)
            self._zeroth_rate(advice)
        advice.cost = self.probe.cost
        self._caps(advice)
        advice.remarks = remarks_of(advice)
        return advice

    def _announce(self, what: str) -> None:
        if self.report is not None:
            self.report(what, self.probe.cost)

    def _view(
        self, names: Sequence[str] | None = None, *, distribution: Distribution | None = None
    ) -> Perturbation:
        """The model at x + scale · v, where v covers some weights of the zeroth-order block."""
        # `zofo.advice.moments` says which directions moments have.
        if distribution is None:
            distribution = "rank-one" if self.setting.distribution == "rank-one" else "gaussian"
        chosen = [self.zeroth[name] for name in (self.zeroth if names is None else names)]
        return Perturbation(
            self.model,
            [parameter for parameter, _ in chosen],
            [tensor for _, tensor in chosen],
            seed=self.seed,
            distribution=distribution,
        )

    def _eps(self) -> tuple[Plateau, float]:
        weights = [parameter for parameter, _ in self.zeroth.values()]
        ladder = measure_ladder(
            self.probe,
            self._view(distribution=self.setting.distribution),
            scale=self.scale,
            estimator=self.setting.estimator,
            is_16_bit=any(p.element_size() == 2 for p in weights),
        )
        if not math.isfinite(float(ladder.at.sum())):
            raise UserError(
                "the loss of the untrained model is not finite, so nothing can be advised; check "
                "the data and the dtype"
            )
        found = plateau(ladder, self.setting.estimator)
        # Second differences need a larger radius than slopes, because rounding grows as 1 / ε².
        radius = max(found.eps, min(found.high, found.quadratic_to))
        return found, radius

    def _moments(self, view: Perturbation, radius: float, num: int, first: int) -> Moments:
        found = measure_directions(self.probe, view, radius=radius, num_directions=num, first=first)
        return moments(found, seed=self.seed % 2**32)

    def _moments_after_training(self, advice: Advice, radius: float) -> Moments:
        groups = {}
        if self.wants_split and self.setting.zeroth == "base" and self.setting.base_lr == "auto":
            groups = groups_of(list(self.zeroth))
        if len(groups) < 2:
            return self._moments(self._view(), radius, NUM_DIRECTIONS, 200)
        parts = {}
        for i, (group, names) in enumerate(groups.items()):
            view = self._view(names)
            parts[group] = self._moments(view, radius, DIRECTIONS_A_GROUP, 200 + 20 * i)
        whole = total(list(parts.values()))
        advice.split = split_rates(
            parts,
            groups,
            batch_rows=self.batch_rows,
            rate=self._rate_of(whole, advice).rate,
            **self.setting.directions(self.batch_rows),
        )
        return whole

    def _rate_of(self, found: Moments, advice: Advice) -> ZerothRate:
        assert advice.plateau is not None
        return zeroth_rate(
            found,
            batch_rows=self.batch_rows,
            num_steps=self.num_moves,
            trusted_to=advice.plateau.quadratic_to,
            **self.setting.directions(self.batch_rows),
            pretrained_scale=self.scale if self.setting.zeroth == "base" else 0.0,
        )

    def _zeroth_rate(self, advice: Advice) -> None:
        assert advice.at_start is not None
        advice.zeroth_start = self._rate_of(advice.at_start, advice)
        points = [(advice.at_start, advice.zeroth_start)]
        if advice.at_later is not None:
            advice.zeroth_later = self._rate_of(advice.at_later, advice)
            points.append((advice.at_later, advice.zeroth_later))
        rate = _rounded(points[0][1].rate if len(points) == 1 else compromise(points))
        advice.progress = self._progress(points[-1][0], rate)
        if self.setting.zeroth == "adapter":
            advice.adapter_lr = rate
            return
        advice.base_lr = rate
        if advice.split is not None and advice.split.rates:
            assert advice.zeroth_later is not None
            scale = rate / advice.zeroth_later.rate
            # All groups share one scalar s, so each rate must stay within the measured range and
            # the allowed drift.
            most = min(min(point.reach, point.drift) for _, point in points)
            advice.base_lr = {
                p: _rounded(min(r * scale, most)) for p, r in advice.split.rates.items()
            }

    def _progress(self, found: Moments, rate: float) -> Interval:
        return progress_at(
            found,
            rate,
            batch_rows=self.batch_rows,
            num_steps=self.num_moves,
            **self.setting.directions(self.batch_rows),
        )

    def _search(self, advice: Advice) -> FirstRate:
        setting = self.setting
        is_full = setting.first == "base"
        rows = [self.probe.draw() for _ in range(2)]

        # The same rows and dropout masks at every call, so that only the weights differ.
        def gradient() -> None:
            for batch in rows:
                seed_generators(self.seed % 2**63)
                self.probe.backward(batch, is_full=is_full, share=1 / len(rows))

        is_sign = setting.optimizer == "adamw"
        along = along_update(self.first, gradient, is_sign=is_sign)
        advice.along = (along,)
        start = self._start_rate(along)
        found = search_rate(
            self._train, start=start, num_steps=self.steps, horizon=setting.num_steps
        )
        if all(run.blew_up for run in found.runs):
            rates = ", ".join(f"{run.rate:.1e}" for run in found.runs)
            raise UserError(
                f"no rate of the {setting.first} can be advised: the loss is not finite within "
                f"{self.steps} steps at any of {rates}; check the data and the dtype, or give "
                f"{setting.first}_lr as a number"
            )
        # The first step of LoRA meets another curvature than the later ones, so both are measured.
        if found.best in self.ends:
            self._set(self.ends[found.best])
            advice.along = (along, along_update(self.first, gradient, is_sign=is_sign))
            self._set(self.start)
        return found

    def _start_rate(self, along: AlongUpdate) -> float:
        setting = self.setting
        best = along.best_rate
        if setting.optimizer == "adamw":
            usual = setting.usual_rate
            return min(max(best, usual / RATIO), usual * RATIO) if math.isfinite(best) else usual
        norm = math.sqrt(max(along.square, 0.0))
        if not math.isfinite(best):
            size = weight_scale(self.first) * math.sqrt(sum(p.numel() for p in self.first)) or 1.0
            best = 0.01 * size / norm if norm > 0 else setting.usual_rate
        # A clipped gradient is shorter by norm / clip, so the same step needs a larger rate.
        clip = setting.max_grad_norm
        return best * max(1.0, norm / clip) if clip else best

    def _train(self, rate: float) -> VirtualRun:
        setting = self.setting
        self._set(self.start)
        run = virtual_training(
            self.probe,
            self.first,
            rate,
            optimizer=self._optimizer,
            num_steps=self.steps,
            accumulation=setting.accumulation,
            max_grad_norm=setting.max_grad_norm,
            is_full=setting.first == "base",
            start=self.beginning,
            seed=self.seed % 2**63,
        )
        self.beginning = run.start  # evaluated by the first training, then shared by all
        # A full base is too large to keep the end of every training.
        if setting.first == "adapter" and not run.blew_up:
            self.ends[rate] = [p.detach().clone() for p in self.first]
        self._set(self.start)
        return run

    def _optimizer(self, parameters: Sequence[nn.Parameter], rate: float) -> Optimizer:
        kind = torch.optim.SGD if self.setting.optimizer == "sgd" else torch.optim.AdamW
        return kind(parameters, lr=rate, weight_decay=self.setting.adapter_weight_decay)

    def _train_first_block(self, advice: Advice) -> None:
        """Set the first-order block to the end of a short training."""
        rate = advice.first.best if advice.first is not None else float(advice.adapter_lr or 0.0)
        if rate not in self.ends:
            self._train(rate)
        if rate in self.ends:
            self._set(self.ends[rate])

    @torch.no_grad()
    def _set(self, values: Sequence[Tensor]) -> None:
        for parameter, value in zip(self.first, values, strict=True):
            parameter.copy_(value)

    def _caps(self, advice: Advice) -> None:
        setting = self.setting
        batches = max(1, self.probe.num_rows // (setting.batch_size * setting.accumulation))
        epochs = max(1.0, setting.num_steps / batches)
        if setting.target is not None:
            epochs = max(epochs, epochs_to(setting.target, batches=batches))
        found = advice.at_later or advice.at_start
        smoothness: dict[str, tuple[float, int | None]] = {}
        if found is not None and setting.zeroth is not None:
            # λ_max is at least any Rayleigh quotient and at least the mean eigenvalue.
            least = max(found.rayleigh, found.trace / found.num_weights)
            smoothness[setting.zeroth] = least, found.num_weights
        if setting.first is not None and advice.along:
            found_along = [a.rayleigh for a in advice.along if math.isfinite(a.rayleigh)]
            smoothness[setting.first] = max(found_along, default=0.0), None
        for block, (constant, num_weights) in smoothness.items():
            for reading in ("sqrt(Tn)", "sqrt(T)n"):
                advice.caps[f"{block} {reading}"] = cap(
                    constant,
                    batches=batches,
                    epochs=epochs,
                    num_weights=num_weights,
                    reading=reading,
                )
            limit = advice.caps[f"{block} sqrt(Tn)"].rate
            if setting.caps == "apply" and setting.asks(block) and _apply(advice, block, limit):
                advice.capped.append(block)
                if block == setting.zeroth and found is not None:
                    advice.progress = self._progress(found, _rounded_down(limit))


def _apply(advice: Advice, block: str, limit: float) -> bool:
    """Lower the rates of a block to a limit. Return whether any rate exceeded it."""
    rate = getattr(advice, f"{block}_lr")
    if rate is None or max(rate.values() if isinstance(rate, dict) else [rate]) <= limit:
        return False
    limit = _rounded_down(limit)
    lower = {n: min(r, limit) for n, r in rate.items()} if isinstance(rate, dict) else limit
    setattr(advice, f"{block}_lr", lower)
    return True


def _advice_seed(seed: int) -> int:
    """A seed whose directions and row order differ from the run's; the factor is invertible."""
    return (seed * 0x9E3779B97F4A7C15 + 0xD1B54A32D192ED03) % 2**64


def _rounded(value: float) -> float:
    """Keep two digits, since the measurement supports no more."""
    return float(f"{value:.2g}")


def _rounded_down(value: float) -> float:
    power = 10.0 ** (math.floor(math.log10(value)) - 1)  # keeps two digits
    return _rounded(math.floor(value / power) * power)
