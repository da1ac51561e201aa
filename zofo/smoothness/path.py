"""Local gradient-Lipschitz constants along the path of a training run.

At chosen steps t, with w = (x, y), Δ = w_{t+1} − w_t and f the loss on rows that never change:

    whole     ‖∇_b f(w_t + γΔ) − ∇_b f(w_t)‖ / (γ ‖Δ‖)       b = base, adapter, or both
    alone     the same with only b moved, over γ ‖Δ_b‖      mean of H_bb along Δ_b
    gradient  ‖H_bb g_b‖ / ‖g_b‖,  g_b = ∇_b f(w_t)         no step: the block along its gradient

and beside them ‖∇f‖, ‖∇_x f‖, ‖∇_y f‖, f, and Δᵀ(∇f(w_t + γΔ) − ∇f(w_t)) / γ = ΔᵀH̄Δ, which tests
the diagonal majoriser on the step.

`whole` is what Zhang et al. measured along a path, with a gradient by block as in the hybrid
paper's figure 1; it mixes H_bb and the cross term. `alone` has no cross term: it is what ℓ_x and
ℓ_y are about. All three are lower bounds of the operator norms, along one direction. For a
zeroth-order base that direction is random, so `whole` and `alone` see a typical eigenvalue,
√(tr H_xx² / d_x), and not the largest; `gradient` weighs towards those that descent feels.

A finite difference is worth as much as the gradients are exact: `floor` is what rounding alone
would have shown.

References:
    Zhang, He, Sra, Jadbabaie, 2020, arXiv 1905.11881, experiments: points γ along each step.
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
    Objective,
    Vector,
    dot,
    minus,
    norm,
    objective_of_trainer,
    scaled,
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
        blocks: as from `blocks_of`: "base", "adapter" if there is one, and parts of the base.
        before: every parameter of base and adapter -> its value before the step.
        after: likewise after it.
        gammas: points on the step, in (0, 1].
        along_gradient: whether to measure `gradient` too, which needs second derivatives.
        rounding: block -> relative error of its gradient, for `floor`.

    Returns:
        `loss`; `grad_norm` and `step_norm`, by block and "full"; `whole` and `alone`, an entry a γ;
        `gradient`: block -> `norm` ‖H_bb g_b‖/‖g_b‖ and `curvature` gᵀ_b H_bb g_b/‖g_b‖²; `floor`.
        A block that did not move has None. `floor_whole`: likewise for `whole`, over the length of
        the whole step; a part of the base has the relative error of the base.
    """
    mains = {name: block for name, block in blocks.items() if not block.is_part}
    parts = {name: block for name, block in blocks.items() if block.is_part}
    everything = {n: p for block in mains.values() for n, p in block.parameters.items()}
    step = {n: after[p] - before[p] for n, p in everything.items()}

    def of(vector: Mapping[str, Tensor], block: Block) -> Vector:
        return {n: vector[n] for n in block.parameters}

    found: dict[str, Any] = {}
    if along_gradient:
        graph = objective.graph(everything, before)
        loss, start = graph.gradient()
        found["gradient"] = {}
        for name, block in mains.items():
            own = of(start, block)
            size = norm(own)
            if not size:
                found["gradient"][name] = None
                continue
            unit = scaled(own, 1 / size)
            image = graph.product(unit, list(block.parameters))
            found["gradient"][name] = {"norm": norm(image), "curvature": dot(unit, image)}
        del graph
    else:
        loss, start = objective.gradient(everything, before)
    found["loss"] = loss
    found["grad_norm"] = {"full": norm(start)} | {
        name: norm(of(start, block)) for name, block in blocks.items()
    }
    found["step_norm"] = {"full": norm(step)} | {
        name: norm(of(step, block)) for name, block in blocks.items()
    }
    lengths = found["step_norm"]
    found["whole"], found["alone"] = [], []
    for gamma in gammas:
        if not lengths["full"]:
            continue
        point = _between(everything, before, step, gamma, after)
        _, end = objective.gradient(everything, point)
        change = minus(end, start)
        whole = {"full": norm(change) / (gamma * lengths["full"])} | {
            name: norm(of(change, block)) / (gamma * lengths["full"])
            for name, block in (mains | parts).items()
        }
        curvature = dot(step, change) / gamma
        found["whole"].append({"gamma": gamma, **whole, "step_curvature": curvature})
        alone: dict[str, Any] = {"gamma": gamma}
        for name, block in mains.items():
            if not lengths[name]:
                alone[name] = None
                continue
            if len(mains) == 1 or lengths[name] == lengths["full"]:
                own_change = of(change, block)  # nothing else has moved
            else:
                moved = {p: point[p] for p in block.parameters.values()}
                _, end_of_block = objective.gradient(block.parameters, {**before, **moved})
                own_change = minus(end_of_block, of(start, block))
            alone[name] = norm(own_change) / (gamma * lengths[name])
        found["alone"].append(alone)
    if rounding is not None and lengths["full"]:
        smallest = min(gammas)
        errors = {
            name: rounding["base" if block.is_part else name] * found["grad_norm"][name]
            for name, block in blocks.items()
            if block.is_part or name in rounding
        }
        found["floor"] = {
            name: error / (smallest * lengths[name])
            for name, error in errors.items()
            if lengths[name] and name in mains
        }
        found["floor_whole"] = {
            name: error / (smallest * lengths["full"]) for name, error in errors.items()
        }
    return found


def _between(
    parameters: Mapping[str, nn.Parameter],
    before: Point,
    step: Mapping[str, Tensor],
    gamma: float,
    after: Point,
) -> Point:
    if gamma == 1:
        return after
    return {p: before[p] + gamma * step[n] for n, p in parameters.items()}


class SmoothnessRecorder(TrainerCallback):
    """Measures `local_constants` while a trainer trains, and changes nothing about the training.

        recorder = SmoothnessRecorder(trainer, num_rows=16, every=5)
        trainer.add_callback(recorder)
        trainer.train()
        recorder.points          # one dict a measured step

    Losses, weights and the order of the rows are what they are without it, bit for bit: it writes
    no weight, leaves no gradient and gives the random generators back. While it measures it holds a
    copy of the weights before the step, and up to three more of the size of the weights.

    Args:
        trainer: a `transformers.Trainer`, `HybridTrainer` or not, on one process.
        num_rows: training rows that f is the mean loss of, chosen once.
        every: steps from one measurement to the next.
        gammas: as for `local_constants`.
        along_gradient: likewise.
        split: parts of the base to measure too, in `whole`.
        seed: of the choice of rows.
        objective: returns f, once training begins, if it is not to be made of the trainer's rows.
        path: file to write the points to as they are measured, JSON lines; points in it are kept
            and not measured again.
        records: the same, shared with other measurements.
        on_point: called with each point.

    Raises:
        UserError: for options out of their range, or a trainer on several processes.
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
        self.num_rows, self.seed = num_rows, seed
        self._given = objective
        self.records = records or Records(None if path is None else Path(path))
        self._objective: Objective | None = None
        self._blocks: dict[str, Block] = {}
        self._before: dict[nn.Parameter, Tensor] | None = None

    @property
    def points(self) -> list[dict[str, Any]]:
        """What was measured, by step."""
        found = [r for r in self.records.all() if r["kind"] == "path"]
        return sorted(found, key=lambda r: r["step"])

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Choose the rows, and see how exact gradients are."""
        self._before = None
        self._blocks = blocks_of(self.trainer.model, self.split)
        if self._given is not None:
            self._objective = self._given()
        else:
            self._objective = objective_of_trainer(
                self.trainer, num_rows=self.num_rows, seed=self.seed
            )

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Keep the weights, before a step that is to be measured."""
        is_due = state.global_step % self.every == 0
        if is_due and not self.records.has("path", state.global_step):
            self._before = {
                p: p.detach().clone()
                for block in self._blocks.values()
                if not block.is_part
                for p in block.parameters.values()
            }

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Measure the step that was made."""
        before, self._before = self._before, None
        if before is None:
            return
        assert self._objective is not None
        clock = getattr(self.trainer, "clock", None)
        with nullcontext() if clock is None else clock.paused():
            mains = {n: b for n, b in self._blocks.items() if not b.is_part}
            rounding = self._rounding(state.global_step - 1, mains)
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

    def _rounding(self, step: int, blocks: Mapping[str, Block]) -> dict[str, float]:
        """How exact gradients are: measured once, at the first step that is."""
        assert self._objective is not None
        for record in self.records.of("rounding"):
            return dict(record["relative"])
        before = self._objective.num_forwards
        found = {name: self._objective.rounding(b.parameters) for name, b in blocks.items()}
        spent = self._objective.num_forwards - before
        self.records.add({"kind": "rounding", "step": step, "relative": found, "forwards": spent})
        return found
