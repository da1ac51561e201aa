"""The hybrid step as a torch optimizer.

    loss = f(x, y)                          forward and backward pass, gradients for y only
    s_k  = (f(x + eps v_k, y) − loss) / eps without gradients; or the central difference
    x ← (1 − lr_x · weight_decay) x − lr_x · mean_k s_k v_k      after x ← x + lr_x λ (x_0 − x)
    y ← optimizer(y, ∇_y loss)              any torch optimizer

x is the zeroth-order block and y the first-order block. Both are updated at the end of the step,
from the same point and the same batch (Jacobi). Every method in `zofo.optim.methods.METHODS` is
this step with other orders of the blocks.

References:
    arXiv 2604.09940, the hybrid algorithm. We add: any first-order optimizer for y, several
    directions, Rademacher directions, central differences, weight decay, rates by module.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from zofo.errors import UserError
from zofo.optim.buffers import MovingBuffers
from zofo.optim.closures import SCALED, check_repeats, refusing_scalers
from zofo.optim.estimator import forwards_per_direction, projected_gradients, unperturbed
from zofo.optim.generators import GeneratorState
from zofo.optim.methods import check_groups
from zofo.optim.moved import mark_moved
from zofo.optim.options import (
    StepOptions,
    checked_options,
    optimizer_class,
    optimizer_problems,
    step_values,
)
from zofo.optim.population import Population
from zofo.optim.processes import Processes
from zofo.optim.reports import StepLog, StepNumbers, StepReport
from zofo.optim.rows import RowPlan, row_gradients, shares_of
from zofo.optim.state import StatefulOptimizer
from zofo.optim.trajectory import Trajectory, Update
from zofo.optim.zeroth_loss import ZerothLoss
from zofo.perturb.shards import local_part


class HybridOptimizer(StatefulOptimizer):
    """Update each parameter group by its order.

    Args:
        groups: as from `zofo.optim.methods.param_groups`: dicts with `params`, `order` ("first" or
            "zeroth"), `lr`, `weight_decay`, and for zeroth-order groups `names` and `tensors`.
        model: the module in whose forward pass the zeroth-order groups are perturbed.
        optimizer: the optimizer of the first-order groups: a `torch.optim.Optimizer` class, or the
            name of one in `torch.optim` ("SGD", "AdamW", ...; case is ignored).
        optimizer_kwargs: its further arguments.
        seed: seed of the directions, in [0, 2^64).
        max_grad_norm: clip the first-order gradient to this norm; None: do not clip.
        process_group: a `torch.distributed` group whose processes take each step together; see
            `zofo.optim.processes`. The caller averages the adapter's gradients. None: one process.
        reads_late: keep the scalars s_k of a step on the device and read them one step later, so
            that the host never waits. The results are the same. None: True on CUDA. `last_step`,
            `trajectory` and `state_dict` wait for the newest scalars.
        original: the base before training, name in the model without adapter -> tensor, read one at
            a time if a group has an `anchor`; None: a temporary file takes a copy of the base.
        options: the step options. The optimizer holds a checked copy as `options`. With
            `base_every` k, zeroth-order groups are evaluated and updated only in steps 0, k, 2k.
        **changes: fields of `StepOptions`, such as `eps=1e-3`; they take precedence over `options`.

    Raises:
        UserError: for values outside their ranges; it lists all of them.
    """

    def __init__(
        self,
        groups: Sequence[Mapping[str, Any]],
        model: nn.Module,
        *,
        optimizer: str | type[Optimizer] = "SGD",
        optimizer_kwargs: Mapping[str, Any] | None = None,
        seed: int = 0,
        max_grad_norm: float | None = None,
        process_group: Any = None,
        reads_late: bool | None = None,
        original: Mapping[str, Tensor] | None = None,
        options: StepOptions | None = None,
        **changes: Any,
    ) -> None:
        given = {} if options is None else step_values(options)
        self.options = options = checked_options(
            StepOptions(**(given | changes)), optimizer_problems(optimizer, seed, max_grad_norm)
        )
        super().__init__([dict(group) for group in groups], {"weight_decay": 0.0})
        check_groups(self.param_groups, options.base_every)
        self.model, self.seed, self.max_grad_norm = model, seed, max_grad_norm
        self._self_check = options.self_check

        # The inner optimizer shares the group dicts and the state, so that learning-rate schedulers
        # and checkpoints see one optimizer.
        first = self._groups("first")
        self.inner = (
            optimizer_class(optimizer)(first, **dict(optimizer_kwargs or {})) if first else None
        )
        self._share_state()
        if self.inner is not None:
            self.defaults |= {k: v for k, v in self.inner.defaults.items() if k != "lr"}
        self.perturbation = self._new_perturbation()
        self.buffers = MovingBuffers(model)
        self._log = StepLog(self._new_trajectory())
        self._reads_late = reads_late
        self.processes = Processes.of(process_group, model)
        if self.processes is not None:
            self._log.part_in_words = self.processes.part_in_words
        self._has_stepped = self._ran_backward = self._has_moved_base = False
        self.base_fingerprint, self.original = None, original
        self.step_count = self.num_forwards = 0
        self.discard_measurements()
        self._check_anchor()
        self._is_built = True

    @property
    def _step_supports_amp_scaling(self) -> bool:
        """Whether this optimizer unscales its gradients itself; `GradScaler.step` asks it first."""
        if self._ran_backward or self._loss is None:
            raise UserError(SCALED)
        return False

    @property
    def last_step(self) -> StepReport | None:
        """Report of the last step; waits for its numbers."""
        self._log.read_pending()
        return self._log.last

    @property
    def last_read(self) -> StepReport | None:
        """The newest report that is available without waiting."""
        return self._log.last

    @property
    def last_measured(self) -> StepReport | None:
        """Report of the last step with projected gradients; waits for its numbers."""
        self._log.read_pending()
        return self._log.last_measured

    @property
    def trajectory(self) -> Trajectory:
        """All updates of the zeroth-order base; waits for the numbers of the last step."""
        self._log.read_pending()
        return self._log.trajectory

    @trajectory.setter
    def trajectory(self, trajectory: Trajectory) -> None:
        self._log.pending, self._log.trajectory = None, trajectory
        self._keep_units(trajectory.units)
        self._keep_kinds(trajectory.rank_one, [t for g in trajectory.groups for t in g.tensors])
        self._has_moved_base = trajectory.moves_weights
        mark_moved(self.model, has_moved=self._has_moved_base)

    @property
    def zeroth_is_due(self) -> bool:
        """Whether the current step evaluates and updates zeroth-order groups."""
        return self.perturbation is not None and self.step_count % self.options.base_every == 0

    @property
    def evaluates_with_graph(self) -> bool:
        """Whether perturbed losses are computed in gradient mode, as the first-order loss is."""
        is_compiled = self.perturbation is not None and self.perturbation.is_compiled
        return is_compiled and self.inner is not None

    def before_pass(self) -> GeneratorState:
        """Note the state that all evaluations of the coming micro-batch start from.

        Returns:
            The state of the generators, for `measure`.
        """
        self.buffers.note()
        return GeneratorState.capture()

    def unchanged_by(self, closure: Callable[[], Any]) -> Callable[[], Any]:
        """The closure, run with the buffers as `before_pass` found them; it leaves them as is."""
        return self.buffers.unchanged_by(closure)

    def measure(
        self,
        closure: Callable[[], Tensor],
        loss: Tensor | None,
        generators: GeneratorState | None = None,
        zeroth_loss: ZerothLoss | Population | None = None,
        examples: Tensor | None = None,
    ) -> None:
        """Add the loss differences of one micro-batch to the current step.

        Use it in loops that run forward and backward themselves; `accumulate` does all three.

        Args:
            closure: returns the loss of the micro-batch, scaled as `loss` is. If rows have
                directions of their own, it returns their shares of the loss, [rows].
            loss: the unperturbed loss of the micro-batch, shape [] or [rows].
            generators: what `before_pass` returned before `loss` was computed; None: do not
                replay masks.
            zeroth_loss: the loss or the population to evaluate; None: `closure`.
            examples: the number of the share that each row of the model's input belongs to, int64
                [rows of the input]; None: one row for each share.

        Raises:
            UserError: in the first step, if the loss is another one when it is computed again, or
                if rows act on each other's loss.
        """
        # The sums change only after all evaluations, so an interrupted call has no effect.
        if isinstance(zeroth_loss, Population):
            self._measure_population(zeroth_loss)
        elif self.perturbation is not None and self.zeroth_is_due:
            generators = generators if self.options.replay_dropout else None
            options = self.options
            per_direction = forwards_per_direction(options.estimator)
            each = self.perturbation.forwards_per_evaluation
            evaluations = options.num_directions * per_direction * each
            instead = zeroth_loss or ZerothLoss(closure, 1.0, loss)
            instead = replace(instead, closure=self.unchanged_by(instead.closure))
            reference, before = instead.loss, instead.cost_so_far()
            by_rows = options.directions_per_step != 1
            is_needed = options.estimator == "forward" or by_rows  # whose number it tells
            if zeroth_loss is not None and reference is None and is_needed:
                reference = unperturbed(
                    instead.closure, generators, with_graph=self.evaluates_with_graph
                )
                evaluations += 1
            if self._self_check and generators is not None:
                spent = instead.cost_so_far()
                with refusing_scalers():
                    check_repeats(
                        instead.closure,
                        reference,
                        generators,
                        self.perturbation.parameters,
                        with_graph=self.evaluates_with_graph,
                    )
                before += instead.cost_so_far() - spent
            examples = examples if instead.examples is None else instead.examples
            scalars, counts, left_out = self._difference(
                instead.closure, reference, generators, examples
            )
            self._self_check = False
            if loss is not None:  # a loss of another kind may lie on another device
                scalars = scalars.to(loss.device)
            cost = instead.cost_since(before, evaluations)
            self.add_scalars(scalars, cost, left_out, counts)
            self.buffers.forget()
        if loss is not None:
            value = loss.detach().double().sum()
            self._loss = value + (0.0 if self._loss is None else self._loss)

    def _difference(
        self,
        closure: Callable[[], Tensor | float],
        reference: Tensor | None,
        generators: GeneratorState | None,
        examples: Tensor | None,
    ) -> tuple[Tensor, list[int], Tensor | None]:
        """The scalars s_k, each process's number of rows with directions, and rows left out."""
        assert self.perturbation is not None
        options, self_check = self.options, self._self_check
        evaluate = functools.partial(
            projected_gradients,
            closure,
            self.perturbation,
            eps=options.eps,
            step=self.step_count,
            estimator=options.estimator,
            generators=generators,
            with_graph=self.inner is not None,
        )
        if options.directions_per_step == 1:
            loss, num = None if reference is None else reference.sum(), options.num_directions
            return evaluate(loss, num_directions=num, self_check=self_check), [], None
        shares = shares_of(reference)
        counts, rank = [len(shares)], 0
        if self.processes is not None:
            # A difference in length would break the exchange of the scalars, so it is asked for.
            is_sure = options.directions_per_step != "rows" and self.processes.has_even_rows
            counts, rank = self.processes.counts(len(shares), is_sure), self.processes.rank
        start = sum(map(sum, self._rows)) + sum(counts[:rank])  # number of the first row
        plan = RowPlan.of(options.directions_per_step, start, shares, examples)
        scalars, left_out = row_gradients(
            evaluate,
            plan,
            shares,
            self.perturbation,
            eps=options.eps,
            self_check=self_check,
            has_moved=self._has_moved_base,
        )
        return scalars, counts, left_out

    def accumulate(
        self,
        closure: Callable[[], Tensor],
        zeroth_loss: Callable[[], ZerothLoss | Population] | None = None,
    ) -> Tensor:
        """Run forward, backward and loss differences of one micro-batch, without an update.

        Args:
            closure: computes and returns the loss. It must not call backward. With n micro-batches
                per step, it divides its loss by n.
            zeroth_loss: called after `closure`; returns the loss for the differences, with its
                unperturbed value if `closure` stored it; None: the loss of `closure`.

        Returns:
            The unperturbed loss, detached, in the shape that the closure gave it.
        """
        generators = self.before_pass() if self.zeroth_is_due else None
        try:
            watch = refusing_scalers() if self._self_check else nullcontext()
            with torch.set_grad_enabled(self.inner is not None), watch:
                loss = closure()
            if not isinstance(loss, Tensor):
                raise ValueError(
                    f"the closure returned {type(loss).__name__}; return the loss tensor itself"
                )
            if self.inner is not None:
                if not loss.requires_grad:
                    raise ValueError(
                        "the closure's loss has no gradient for the first-order group; return the "
                        "loss tensor itself, not detached, and let the optimizer run backward"
                    )
                loss.sum().backward()
                self._ran_backward = True
            is_asked = zeroth_loss is not None and self.zeroth_is_due
            self.measure(closure, loss, generators, zeroth_loss() if is_asked else None)  # type: ignore[misc]
        except RuntimeError as error:
            # The closure freed its graph, or called backward in an evaluation without gradients.
            if any(sign in str(error) for sign in ("second time", "does not require grad")):
                raise ValueError(
                    "the closure called backward; it must only return the loss: the optimizer "
                    "runs backward, and evaluates the closure again without gradients"
                ) from error
            raise
        return loss.detach()

    @torch.no_grad()
    def step(  # type: ignore[override]
        self,
        closure: Callable[[], Tensor] | None = None,
        zeroth_loss: Callable[[], ZerothLoss | Population] | None = None,
    ) -> Tensor | None:
        """Update both blocks.

        Args:
            closure: as for `accumulate`, which is called first if a closure is given. Gradients are
                zeroed before it unless micro-batches were accumulated.
            zeroth_loss: as for `accumulate`; it may stand without a closure.

        Returns:
            The unperturbed loss of the closure, or None without a closure.
        """
        loss = None
        if closure is not None:
            if self._loss is None:
                self.zero_grad()
            with torch.enable_grad():
                loss = self.accumulate(closure, zeroth_loss)
        elif zeroth_loss is not None:
            self.measure(lambda: torch.zeros(()), None, zeroth_loss=zeroth_loss())
        elif self.zeroth_is_due and self._scalars is None:
            raise ValueError(
                "nothing was measured for the zeroth-order block; pass a closure to step(), or "
                "call accumulate(closure) for each micro-batch first"
            )
        self._move()
        self.num_forwards += self._num_forwards
        self.step_count += 1
        self._has_stepped = True
        self.discard_measurements()
        return loss

    def _move(self) -> None:
        """Update both blocks with the losses and scalars of the step, and report it."""
        # The wait costs little: the forwards of this step are queued behind the previous step, so
        # the device stays busy.
        self._log.read_pending()
        differs = None
        if self.processes is not None:
            self._loss, self._scalars, differs = self.processes.joined(
                self._loss,
                self._scalars,
                self._rows if self.options.directions_per_step == "rows" else (),
                step=self.step_count,
                settings=self._settings,
            )
        numbers = StepNumbers(self._loss, self._scalars, reads_late=self._is_read_late())
        numbers.note("differs", differs)
        numbers.note("grad_norm", self._clip())
        numbers.note("rows_left_out", self._left_out)
        if self.inner is not None:
            first = self._first_parameters()
            states = [v for p in first for v in self.state.get(p, {}).values()]
            before = [p.clone() for p in self._first_parameters("adapter")]
            numbers.step_first(
                self.inner.step,
                [local_part(t)[0] for t in [*first, *states] if isinstance(t, Tensor)],
            )
            numbers.note("adapter_norm", self._distance_from(before) if before else None)
        zeroth = self._groups("zeroth") if numbers.moves_zeroth else []
        if not self._has_moved_base and any(
            group["lr"] != 0 and group.get("block", "base") == "base" for group in zeroth
        ):
            self._note_first_move()
        for group in zeroth:
            anchor = float(group.get("anchor", 0.0))
            rates = float(group["lr"]), float(group["weight_decay"]), anchor
            Update(self.step_count, numbers.projected_grad, *rates).apply(
                group["params"],
                group["tensors"],
                seed=self.seed,
                distribution=self.options.distribution,
                rank_one=self.rank_one,
                unread=numbers.unread,
                original=map((self.original or {}).__getitem__, group["names"] if anchor else ()),
            )
        self._log.trajectory.rank_one = self.rank_one
        self._log.add(self.step_count, self._num_forwards, self._rates(), numbers)

    def _is_read_late(self) -> bool:
        """Whether to read later; never in the first step, which may create optimizer state."""
        has_small_first = all(g.get("block") == "adapter" for g in self._groups("first"))
        measured = self._scalars if self._loss is None else self._loss
        device = None if measured is None else measured.device
        is_early = not self._has_stepped or self._has_anchor  # whose weights the host reads anyway
        if device is None or is_early or not has_small_first:
            return False
        return device.type == "cuda" if self._reads_late is None else self._reads_late
