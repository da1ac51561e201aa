"""Local gradient-Lipschitz constants along the path of a training run.

At chosen steps t, with w = (x, y), Δ = w_{t+1} − w_t and f the loss on rows that never change:

    whole     ‖∇_b f(w_t + γΔ) − ∇_b f(w_t)‖ / (γ ‖Δ‖)       b = base, adapter, or both
    alone     the same with only b moved, over γ ‖Δ_b‖      mean of H_bb along Δ_b
    gradient  ‖H_bb g_b‖ / ‖g_b‖,  g_b = ∇_b f(w_t)         no step: the block along its gradient

‖∇f‖, ‖∇_x f‖, ‖∇_y f‖ and f are recorded too, and Δᵀ(∇f(w_t + γΔ) − ∇f(w_t)) / γ = ΔᵀH̄Δ, which
tests the diagonal majoriser on the step.

Zhang et al. measured `whole` along a path. Here each block has its own gradient, as in figure 1 of
the hybrid paper. `whole` mixes H_bb with the cross term. `alone` has no cross term, so it measures
what ℓ_x and ℓ_y bound. Each of the three takes one direction, so each is a lower bound of the
operator norm. A zeroth-order base moves in a random direction. Its `whole` and `alone` then show a
typical eigenvalue, √(tr H_xx² / d_x), instead of the largest. `gradient` favours the eigenvalues
that descent meets.

Rounding of the gradients limits a finite difference. `floor` is the constant that rounding alone
would give.

References:
    Zhang, He, Sra, Jadbabaie, 2020, arXiv 1905.11881, experiments: points γ on each step.
    arXiv 2604.09940, figure 1.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from transformers import TrainerCallback

from zofo.errors import UserError
from zofo.smoothness.blocks import Block, Split, blocks_of
from zofo.smoothness.objective import (
    GradientGraph,
    Objective,
    Vector,
    dot,
    minus,
    norm,
    objective_of_trainer,
)
from zofo.smoothness.records import Records

Point = Mapping[nn.Parameter, Tensor]


def local_constants(
    objective: Objective,
    blocks: Mapping[str, Block],
    before: Point,
    after: Point,
    *,
    gammas: Sequence[float] = (1.0,),
    along_gradient: bool = True,
    rounding: Mapping[str, float] | None = None,
) -> dict[str, Any]:
    """The local constants of one step, as plain values.

    Args:
        objective: f.
        blocks: name -> block, as from `blocks_of`.
        before: every parameter of base and adapter -> its value before the step.
        after: every parameter of base and adapter -> its value after the step.
        gammas: points on the step, in (0, 1].
        along_gradient: whether to measure `gradient` too, which needs second derivatives.
        rounding: block -> relative error of its gradient, for `floor`.

    Returns:
        `loss`. `grad_norm` and `step_norm`, for each block and "full". `whole` and `alone`, with an
        entry for each γ. `gradient`: block -> `norm` ‖H_bb g_b‖/‖g_b‖ and `curvature`
        gᵀ_b H_bb g_b/‖g_b‖². A block that did not move has None. `floor` for `alone`, and
        `floor_whole` for `whole`, which divides by the length of the whole step. A part of the base
        takes the relative error of the base.
    """
    mains = {name: block for name, block in blocks.items() if not block.is_part}
    everything = {n: p for block in mains.values() for n, p in block.parameters.items()}
    step = {n: after[p] - before[p] for n, p in everything.items()}
    found: dict[str, Any] = {}
    if along_gradient:
        loss, start, found["gradient"] = _along_gradient(objective, mains, everything, before)
    else:
        loss, start = objective.gradient(everything, before)
    found["loss"] = loss
    found["grad_norm"] = _norms(start, blocks)
    lengths = found["step_norm"] = _norms(step, blocks)
    found["whole"], found["alone"] = [], []
    for gamma in gammas if lengths["full"] else ():
        point: Point = after  # before + step would round once more
        if gamma != 1:
            point = {p: before[p] + gamma * step[n] for n, p in everything.items()}
        _, end = objective.gradient(everything, point)
        change = minus(end, start)
        size = gamma * lengths["full"]
        whole = {name: value / size for name, value in _norms(change, blocks).items()}
        whole["step_curvature"] = dot(step, change) / gamma  # ΔᵀH̄Δ
        found["whole"].append({"gamma": gamma, **whole})
        alone: dict[str, Any] = {"gamma": gamma}
        for name, block in mains.items():
            if not lengths[name]:
                alone[name] = None
                continue
            own_change = _of(change, block)
            if len(mains) > 1 and lengths[name] != lengths["full"]:  # the other block moved too
                of_block = {p: point[p] for p in block.parameters.values()}
                _, end_of_block = objective.gradient(block.parameters, {**before, **of_block})
                own_change = minus(end_of_block, _of(start, block))
            alone[name] = norm(own_change) / (gamma * lengths[name])
        found["alone"].append(alone)
    if rounding is not None and lengths["full"]:
        smallest = min(gammas)  # the shortest step divides the error by the least
        errors = {
            name: rounding["base" if block.is_part else name] * found["grad_norm"][name]
            for name, block in blocks.items()
            if block.is_part or name in rounding
        }
        moved = {name: lengths[name] for name in mains if name in errors and lengths[name]}
        found["floor"] = {n: errors[n] / (smallest * length) for n, length in moved.items()}
        found["floor_whole"] = {n: e / (smallest * lengths["full"]) for n, e in errors.items()}
    return found


def _along_gradient(
    objective: Objective,
    mains: Mapping[str, Block],
    parameters: Mapping[str, nn.Parameter],
    at: Point,
) -> tuple[float, Vector, dict[str, Any]]:
    """f, its gradient, and the curvature of each block along its own gradient."""
    graph = GradientGraph(objective, parameters, at)
    loss, gradient = graph.gradient()
    found: dict[str, Any] = {}
    for name, block in mains.items():
        own = _of(gradient, block)
        found[name] = None
        if size := norm(own):
            unit = {n: g * (1 / size) for n, g in own.items()}
            image = graph.product(unit, list(block.parameters))
            found[name] = {"norm": norm(image), "curvature": dot(unit, image)}
    return loss, gradient, found


def _of(vector: Mapping[str, Tensor], block: Block) -> Vector:
    return {n: vector[n] for n in block.parameters}


def _norms(vector: Mapping[str, Tensor], blocks: Mapping[str, Block]) -> dict[str, float]:
    own = {name: norm(_of(vector, block)) for name, block in blocks.items()}
    return {"full": norm(vector), **own}


class SmoothnessRecorder(TrainerCallback):
    """Measures `local_constants` while a trainer trains, without any effect on the training.

        recorder = SmoothnessRecorder(trainer, num_rows=16, every=5)
        trainer.add_callback(recorder)
        trainer.train()
        recorder.points          # one dict for each measured step

    Losses, weights and the order of the rows have the same bits as without the recorder: it writes
    no weight, leaves no gradient and restores the random generators. During a measurement it holds
    a copy of the weights before the step, and up to three more tensors of that size.

    Args:
        trainer: any `transformers.Trainer` on one process.
        num_rows: number of training rows in f, which are chosen once.
        every: number of steps from one measurement to the next.
        gammas, along_gradient: as for `local_constants`.
        split: parts of the base to measure too, in `whole`.
        seed: seed of the choice of rows.
        objective: returns another f; it is called when training begins.
        path: JSON-lines file for the points. Points in it are kept and not measured again.
        records: replaces `path`, to share it with other measurements.
        on_point: called with each point.

    Raises:
        UserError: if an option is out of range, or if the trainer runs on several processes.
    """

    def __init__(
        self,
        trainer: Any,
        *,
        num_rows: int = 16,
        every: int = 1,
        gammas: Sequence[float] = (1.0,),
        along_gradient: bool = True,
        split: Split = "none",
        seed: int = 0,
        objective: Callable[[], Objective] | None = None,
        path: str | Path | None = None,
        records: Records | None = None,
        on_point: Callable[[dict[str, Any]], None] | None = None,
    ) -> None:
        problems = []
        if num_rows < 1:
            problems.append(f"num_rows is {num_rows}; measure on at least 1 row")
        if every < 1:
            problems.append(f"every is {every}; it must be at least 1")
        if not gammas or not all(0 < g <= 1 for g in gammas):
            problems.append(f"gammas is {list(gammas)}; they must lie in (0, 1], such as [1.0]")
        if getattr(trainer.args, "world_size", 1) > 1:
            problems.append("the trainer runs on several processes; measure on one")
        if problems:
            raise UserError("; ".join(problems))
        self.trainer, self.every, self.gammas = trainer, every, tuple(gammas)
        self.along_gradient, self.split, self.on_point = along_gradient, split, on_point
        self._make_objective = objective or (
            lambda: objective_of_trainer(trainer, num_rows=num_rows, seed=seed)
        )
        self.records = records or Records(None if path is None else Path(path))
        self._objective: Objective | None = None
        self._blocks: dict[str, Block] = {}
        self._before: dict[nn.Parameter, Tensor] | None = None

    @property
    def points(self) -> list[dict[str, Any]]:
        """The measured points, ordered by step."""
        return self.records.of("path")

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Choose the rows."""
        # A trainer may train twice, and an interrupted step leaves its copy behind.
        self._before = None
        self._blocks = blocks_of(self.trainer.model, self.split)
        self._objective = self._make_objective()

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Copy the weights before a step that will be measured."""
        is_due = state.global_step % self.every == 0
        if is_due and not self.records.has("path", state.global_step):
            self._before = {
                p: p.detach().clone()
                for block in self._blocks.values()
                if not block.is_part
                for p in block.parameters.values()
            }

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Measure the step."""
        before, self._before = self._before, None  # frees the copy when the method returns
        if before is None:
            return
        assert self._objective is not None
        clock = getattr(self.trainer, "clock", None)
        with nullcontext() if clock is None else clock.paused():
            rounding = self._rounding(state.global_step - 1)
            spent = self._objective.num_forwards
            found = local_constants(
                self._objective,
                self._blocks,
                before,
                {p: p.detach() for p in before},
                gammas=self.gammas,
                along_gradient=self.along_gradient,
                rounding=rounding,
            )
        spent = self._objective.num_forwards - spent
        point = {"kind": "path", "step": state.global_step - 1, **found, "forwards": spent}
        self.records.add(point)
        if self.on_point is not None:
            self.on_point(point)

    def _rounding(self, step: int) -> dict[str, float]:
        """Relative error of each block's gradient, measured once, at the first measured step."""
        assert self._objective is not None
        for record in self.records.of("rounding"):
            return dict(record["relative"])
        spent = self._objective.num_forwards
        found = {
            name: self._objective.rounding(block.parameters)
            for name, block in self._blocks.items()
            if not block.is_part
        }
        spent = self._objective.num_forwards - spent
        self.records.add({"kind": "rounding", "step": step, "relative": found, "forwards": spent})
        return found
