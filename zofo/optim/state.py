"""The state of `HybridOptimizer`: saving, restoring and copying it.

The inner optimizer shares its state and its group dicts with the outer one. The perturbation
belongs to the weights at their addresses. Both are joined anew whenever the state changes.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict
from typing import Any, Final

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from zofo.disk.copied import CopyOnDisk
from zofo.disk.files import fingerprint, refusing
from zofo.errors import UserError
from zofo.optim.anchor import OriginalBase
from zofo.optim.blocks import set_units, split_parameters, units_of
from zofo.optim.buffers import MovingBuffers
from zofo.optim.moved import mark_moved
from zofo.optim.norms import clip_gradients, norm_of
from zofo.optim.options import StepOptions, step_values
from zofo.optim.population import Population, population_gradients
from zofo.optim.processes import Processes
from zofo.optim.reports import GroupRate, StepLog, StepReport
from zofo.optim.trajectory import GroupSpec, Trajectory
from zofo.perturb.quantized import Scales
from zofo.perturb.shards import Whole, is_sharded, sharded_as
from zofo.perturb.view import Perturbation

_COPIED: Final = (
    "model", "options", "seed", "max_grad_norm", "inner", "step_count", "num_forwards",
    "base_fingerprint", "_self_check", "buffers", "_log", "_reads_late", "_has_stepped",
    "_is_built", "_ran_backward", "_has_moved_base", "_loss", "_scalars", "_num_forwards",
    "_rows", "_left_out", "original",
)  # fmt: skip
"""Attributes that a copy or a pickle of the optimizer keeps, beside torch's own."""


class StatefulOptimizer(Optimizer):
    """What `HybridOptimizer` saves, restores and copies; its constructor sets the attributes."""

    model: nn.Module
    options: StepOptions
    seed: int
    inner: Optimizer | None
    perturbation: Perturbation | None
    base_fingerprint: str | None
    _has_moved_base: bool
    step_count: int
    num_forwards: float
    _log: StepLog
    buffers: MovingBuffers
    processes: Processes | None = None  # a copy or a pickle has none
    original: Mapping[str, Tensor] | None  # the base before training, read for an anchor
    max_grad_norm: float | None
    _is_built: bool = False
    _ran_backward: bool  # whether `accumulate` has run a backward pass in this step
    _loss: Tensor | None  # of this step, float64, []
    _scalars: Tensor | None  # of this step, float64, [directions]
    _num_forwards: float  # of this step
    _rows: list[list[int]]  # of this step: rows with directions, [micro-batches][processes]
    _left_out: Tensor | None  # of this step: rows whose difference is not finite, []
    _self_check: bool  # whether the next evaluation is checked

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Refuse a group that was not given to the constructor, which calls this for its groups.

        Raises:
            UserError: after construction.
        """
        if self._is_built:
            raise UserError(
                "add_param_group: the perturbation, the trajectory and the inner optimizer are "
                "made for the groups that HybridOptimizer is given; make a new one with all groups"
            )
        super().add_param_group(param_group)

    def __getstate__(self) -> dict[str, Any]:
        self._log.read_pending()
        return super().__getstate__() | {name: getattr(self, name) for name in _COPIED}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        # A perturbation holds addresses of the weights, so that of a copy is made anew.
        self.perturbation = self._new_perturbation()
        self._share_state()

    def state_dict(self) -> dict[str, Any]:
        """Torch's optimizer state, and the step count that addresses the directions.

        The state of sharded parameters is that of the whole ones: all processes call this, get the
        same, and any number of processes can load it.
        """
        self._log.read_pending()
        measured = self._log.last_measured
        saved = super().state_dict()
        saved["state"] = {key: dict(Whole(state)) for key, state in saved["state"].items()}
        return {
            **saved,
            "zofo": {
                "step_count": self.step_count,
                "num_forwards": self.num_forwards,
                "base_fingerprint": self.base_fingerprint,
                **self._fixed_options(),
                "rank_one": sorted(self.rank_one),
                "last_measured": None if measured is None else asdict(measured),
            },
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the state; weights and trajectory are restored separately.

        Raises:
            UserError: if another optimizer saved the state, or one with other step options.
        """
        own = state_dict.get("zofo")
        if own is None:
            raise UserError(
                "the state is not that of a HybridOptimizer, because it has no entry 'zofo'; load "
                "what HybridOptimizer.state_dict returned, or begin with a new optimizer"
            )
        for key, value in self._fixed_options().items():
            if own.get(key, value) != value:
                raise UserError(
                    f"the state was saved with {key} {own[key]!r}, but this optimizer has "
                    f"{value!r}, and a run keeps its step options; use the saved value"
                )
        saved = own.get("base_fingerprint")
        if None not in (saved, self.base_fingerprint) and saved != self.base_fingerprint:
            raise UserError(
                f"the state belongs to a base with fingerprint {saved}, but this base had "
                f"{self.base_fingerprint} before training; load the base that the run began with"
            )
        fits = "load it into an optimizer with the same groups and the same inner optimizer"
        with refusing("the state does not fit this optimizer", fits):
            super().load_state_dict({k: v for k, v in state_dict.items() if k != "zofo"})
        self._share_state()
        self._shard_state()
        self._check_anchor()
        self.step_count, self.num_forwards = own["step_count"], own["num_forwards"]
        self.base_fingerprint = saved or self.base_fingerprint
        self._keep_kinds(own.get("rank_one", ()), self._zeroth_tensors())
        measured = own.get("last_measured")
        self._log.pending = None
        self._log.last_measured = None if measured is None else StepReport(**measured)
        self.discard_measurements()

    def _fixed_options(self) -> dict[str, Any]:
        """The seed, and the options that a run cannot change, because its record has one value."""
        fixed = ("distribution", "num_directions", "directions_per_step", "eps", "estimator")
        return {"seed": self.seed, **{key: getattr(self.options, key) for key in fixed}}

    def original_fingerprint(self) -> str:
        """Fingerprint of the base before training. If it is sharded, all processes call this.

        Raises:
            UserError: if the base has moved and its fingerprint was not computed before.
        """
        if self.base_fingerprint is None and self._has_moved_base:
            raise UserError(
                "the fingerprint of the base before training is not known; restore the optimizer "
                "with load_state_dict, or set base_fingerprint to that of the trajectory's header"
            )
        if self.base_fingerprint is None:
            self.base_fingerprint = fingerprint(Whole(split_parameters(self.model).base))
        return self.base_fingerprint

    @property
    def _has_anchor(self) -> bool:
        """Whether a group is pulled towards its original weights."""
        return any(group.get("anchor") for group in self._groups("zeroth"))

    def _check_anchor(self) -> None:
        """Make sure that the original weights are at hand, if a group has an anchor.

        Raises:
            UserError: if they are not, or these weights cannot have an anchor.
        """
        groups = [group for group in self._groups("zeroth") if group.get("anchor")]
        if not groups:
            return
        weights = [p for group in groups for p in group["params"]]
        wrong = {
            "several processes, start one": self.processes is not None,
            "sharded weights, leave the sharding out": any(map(is_sharded, weights)),
            "scales of quantised weights, load the base without quantization": any(
                isinstance(p, Scales) for p in weights
            ),
        }
        for what, is_so in wrong.items():
            if is_so:
                raise UserError(f"base_anchor does not work with {what}, or set base_anchor=0")
        if self.original is None:
            if self._has_moved_base:
                raise UserError(
                    "base_anchor needs the base before training, and this base has moved; pass "
                    "original, name -> tensor, such as what safetensors files hold"
                )
            self.original = CopyOnDisk(split_parameters(self.model).base)
        if self.base_fingerprint is None:  # so that a state of another base is refused
            self.original = OriginalBase(self.original, split_parameters(self.model).base)
            self.base_fingerprint = fingerprint(self.original)

    def _settings(self) -> dict[str, Any]:
        """What the processes of a group must agree on, besides the weights."""
        known = {"seed": self.seed, "step_count": self.step_count, **step_values(self.options)}
        for i, group in enumerate(self.param_groups):
            known |= {f"{key} of group {i}": group[key] for key in ("lr", "weight_decay", "order")}
        return known | {"rank-one tensors": sorted(self.rank_one)}

    def _new_perturbation(self) -> Perturbation | None:
        zeroth = self._groups("zeroth")
        if not zeroth:
            return None
        return Perturbation(
            self.model,
            [p for group in zeroth for p in group["params"]],
            [t for group in zeroth for t in group["tensors"]],
            seed=self.seed,
            distribution=self.options.distribution,
            overlap=self.options.overlap,
        )

    def _new_trajectory(self) -> Trajectory:
        # Only the base has a trajectory: a checkpoint holds the adapter itself.
        base = [g for g in self._groups("zeroth") if g.get("block", "base") == "base"]
        recorded = tuple(GroupSpec(tuple(g["names"]), tuple(g["tensors"])) for g in base)
        options, units = self.options, units_of(base)
        drawing = self.seed, options.distribution, options.eps, options.estimator
        return Trajectory(*drawing, recorded, units=units)

    @property
    def rank_one(self) -> frozenset[int]:
        """Tensor indices of the zeroth-order weights whose directions are rank-one."""
        return frozenset() if self.perturbation is None else self.perturbation.rank_one

    def _zeroth_tensors(self) -> list[int]:
        return [t for group in self._groups("zeroth") for t in group["tensors"]]

    def _keep_kinds(self, rank_one: Collection[int], tensors: Sequence[int]) -> None:
        """Restore which of some tensors have rank-one directions.

        Raises:
            UserError: if this model cannot evaluate one of them on a side path.
        """
        if self.perturbation is not None:
            self.perturbation.only_rank_one(self.rank_one.difference(tensors).union(rank_one))
        if missing := set(rank_one).intersection(tensors) - self.rank_one:
            raise UserError(
                f"{len(missing)} weights were trained with rank-one directions, which this model "
                "cannot evaluate on a side path; continue with the model that the run began with, "
                "not compiled"
            )

    def _keep_units(self, units: Mapping[int, float]) -> None:
        """Measure the directions of scales in the units of a trajectory, as its run did."""
        groups = self._groups("zeroth")
        if self.perturbation is not None and units != units_of(groups):
            set_units(groups, units)
            self.perturbation.follow(self.model)

    def _rates(self) -> tuple[GroupRate, ...]:
        def num_of(group: Mapping[str, Any], wanted: Collection[int] | None = None) -> int:
            pairs = zip(group["params"], group["tensors"], strict=True)
            return sum(p.numel() for p, t in pairs if wanted is None or t in wanted)

        return tuple(
            GroupRate(
                group.get("block", "base"),
                num_of(group),
                num_of(group, self.rank_one),
                float(group["lr"]),
                float(group["weight_decay"]),
                float(group.get("anchor", 0.0)),
            )
            for group in self._groups("zeroth")
        )

    def _groups(self, order: str) -> list[dict[str, Any]]:
        return [group for group in self.param_groups if group["order"] == order]

    def _first_parameters(self, block: str | None = None) -> list[Tensor]:
        groups = [g for g in self._groups("first") if block in (None, g.get("block"))]
        return [p for group in groups for p in group["params"]]

    def _distance_from(self, before: list[Tensor]) -> Tensor:
        return norm_of(torch._foreach_sub(self._first_parameters("adapter"), before))

    def _note_first_move(self) -> None:
        """Note which base this run began with, and keep peft from saving an adapter alone."""
        if hasattr(self.model, "peft_config"):
            self.original_fingerprint()
        base = Whole(split_parameters(self.model).base)
        if self._has_anchor and fingerprint(base) != self.base_fingerprint:
            raise UserError(
                "the base is not the original of its anchor; load the base that the run began "
                "with, or set optimizer.trajectory to the updates that it has had since"
            )
        mark_moved(self.model)
        self._has_moved_base = True

    def _clip(self) -> Tensor | None:
        if self.max_grad_norm is None or self.inner is None:
            return None
        return clip_gradients(self._first_parameters(), self.max_grad_norm)

    def _share_state(self) -> None:
        if self.inner is not None:
            self.inner.state = self.state
            self.inner.param_groups = self._groups("first")
            # Schedulers such as OneCycleLR change the momentum of every group, and the zeroth-order
            # groups ignore it.
            for key in self.inner.defaults.keys() & {"momentum", "betas"}:
                for group in self._groups("zeroth"):
                    group.setdefault(key, self.inner.defaults[key])

    def _shard_state(self) -> None:
        """Divide the state of sharded parameters as they are divided."""
        for parameter, state in self.state.items():
            for key, value in state.items():
                if isinstance(value, Tensor) and value.shape == parameter.shape:
                    state[key] = sharded_as(value, parameter)

    def add_scalars(
        self,
        scalars: Tensor,
        cost: float,
        left_out: Tensor | None = None,
        counts: Sequence[int] = (),
    ) -> None:
        """Add the scalars of one micro-batch to the current step.

        Args:
            scalars: s_k, float64 [directions]. If each row has one, those of further micro-batches
                are further directions; otherwise they belong to the same directions.
            cost: of their evaluations, in forward-equivalents of the micro-batch.
            left_out: number of rows without a finite value, shape []; None: rows are not counted.
            counts: each process's number of rows with directions.
        """
        if self._scalars is None:
            self._scalars = scalars
        elif self.options.directions_per_step == "rows":
            self._scalars = torch.cat((self._scalars, scalars))
        else:
            self._scalars = self._scalars + scalars
        self._rows += [list(counts)] if counts else []
        if left_out is not None:
            self._left_out = left_out if self._left_out is None else self._left_out + left_out
        self._num_forwards += cost

    def _measure_population(self, population: Population) -> None:
        """Add the scalars of a population, if the step has any."""
        if self.perturbation is None or self.step_count % self.options.base_every:
            return
        if self.options.directions_per_step != "rows" or self.processes is not None:
            raise UserError(
                f"rewards need directions_per_step='rows' and one process, and here "
                f"directions_per_step is {self.options.directions_per_step!r} and the number of "
                f"processes {1 if self.processes is None else self.processes.size}"
            )
        before = population.cost()
        scalars, left_out = population_gradients(
            population,
            self.perturbation,
            eps=self.options.eps,
            step=self.step_count,
            first=0 if self._scalars is None else len(self._scalars),
            estimator=self.options.estimator,
            self_check=self._self_check,
            has_moved=self._has_moved_base,
        )
        self._self_check = False
        if self._loss is not None:  # a loss that was computed elsewhere
            scalars, left_out = scalars.to(self._loss.device), left_out.to(self._loss.device)
        self.add_scalars(scalars, population.cost() - before, left_out)

    def discard_measurements(self) -> None:
        """Discard the losses and scalars of the current step, so that it starts again."""
        self._loss, self._scalars, self._num_forwards = None, None, 0
        self._rows, self._left_out = [], None
        self._ran_backward = False
        self.buffers.forget()
        if self.processes is not None:
            self.processes.settle()
