"""The hybrid step as a torch optimizer.

    loss = f(x, y)                          with gradients for the first-order groups
    s_k  = differences of f along v_k       no gradients, only zeroth-order groups perturbed
    x ← (1 − lr_x · decay) x − lr_x mean_k s_k v_k
    y ← any torch optimizer's step

Both blocks move at the end, from the same point and batch (Jacobi). Every method in
`zofo.methods.METHODS` is this step with another table of orders.

References:
    arXiv 2604.09940, the hybrid algorithm. Beyond it: any first-order optimizer for y, several
    directions, Rademacher directions, central differences, weight decay, rates by module.
"""

from __future__ import annotations

import difflib
import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from zofo.errors import UserError
from zofo.estimator import (
    ESTIMATORS,
    Estimator,
    GeneratorState,
    forwards_per_direction,
    projected_gradients,
)
from zofo.noise import DISTRIBUTIONS, Distribution
from zofo.perturb import Perturbation
from zofo.trajectory import GroupSpec, Trajectory, Update


@dataclass(frozen=True)
class StepReport:
    """What the last step did.

    Attributes:
        step: its number, from 0.
        loss: unperturbed loss, summed over micro-batches; None where none was measured.
        projected_grad: s_k, one a direction; empty without zeroth-order groups.
        grad_norm: norm of the first-order gradient before clipping; None without `max_grad_norm`.
        non_finite: whether a loss or scalar was not finite, so that it was not applied.
        num_forwards: forwards spent on the zeroth-order estimate.
        update_norms: block -> norm of its update. Of a zeroth-order block its expectation over the
            directions, lr sqrt(d Σ s_k²) / K, exact for one direction of signs; of a first-order
            adapter measured; weight decay apart.
    """

    step: int
    loss: float | None
    projected_grad: tuple[float, ...]
    grad_norm: float | None
    non_finite: bool
    num_forwards: int
    update_norms: Mapping[str, float] = field(default_factory=dict)


class HybridOptimizer(Optimizer):
    """Moves each parameter group by the order it carries.

    Args:
        groups: as from `zofo.methods.param_groups`: dicts with `params`, `order` ("first" or
            "zeroth"), `lr`, `weight_decay`, and for zeroth-order groups `names` and `tensors`.
        model: the module whose forwards the zeroth-order groups are perturbed in.
        optimizer: what steps the first-order groups: a `torch.optim.Optimizer` class, or the name
            of one in `torch.optim` ("SGD", "AdamW", ...; case does not matter).
        optimizer_kwargs: its further arguments.
        eps: smoothing radius; 1e-3 as in MeZO.
        estimator: "forward" (the paper's) or "central".
        num_directions: directions a step; the paper takes 1.
        distribution: "rademacher" (default by choice: unbiased, and fast) or "gaussian" (paper).
        seed: of the directions, in [0, 2^64).
        max_grad_norm: clip the first-order gradient to this norm; None: do not.
        replay_dropout: give every evaluation of a step the same dropout masks.
        self_check: watch the first perturbed forward for weights read around the perturbation.

    Raises:
        UserError: for values outside their ranges, all of them at once.
    """

    def __init__(
        self,
        groups: Sequence[Mapping[str, Any]],
        model: nn.Module,
        *,
        optimizer: str | type[Optimizer] = "SGD",
        optimizer_kwargs: Mapping[str, Any] | None = None,
        eps: float = 1e-3,
        estimator: Estimator = "forward",
        num_directions: int = 1,
        distribution: Distribution = "rademacher",
        seed: int = 0,
        max_grad_norm: float | None = None,
        replay_dropout: bool = True,
        self_check: bool = True,
    ) -> None:
        _check_options(optimizer, eps, estimator, num_directions, distribution, seed, max_grad_norm)
        super().__init__([dict(group) for group in groups], {"weight_decay": 0.0})
        _check_groups(self.param_groups)
        self.eps, self.estimator, self.num_directions = eps, estimator, num_directions
        self.distribution, self.seed = distribution, seed
        self.max_grad_norm, self.replay_dropout = max_grad_norm, replay_dropout
        self._self_check = self_check

        # The inner optimizer holds the same group dicts and the same state: schedulers and
        # checkpoints see one optimizer.
        first = self._groups("first")
        self.inner = (
            _optimizer_class(optimizer)(first, **dict(optimizer_kwargs or {})) if first else None
        )
        self._share_state()

        zeroth = self._groups("zeroth")
        self.perturbation = (
            Perturbation(
                model,
                [p for group in zeroth for p in group["params"]],
                [t for group in zeroth for t in group["tensors"]],
                seed=seed,
                distribution=distribution,
            )
            if zeroth
            else None
        )
        recorded = tuple(
            GroupSpec(tuple(group["names"]), tuple(group["tensors"]))
            for group in zeroth
            if group.get("block", "base") == "base"
        )
        self.trajectory = Trajectory(seed, distribution, eps, estimator, recorded)
        self.step_count = 0
        self.num_forwards = 0
        self.last_step: StepReport | None = None
        self._loss: Tensor | None = None
        self._scalars: Tensor | None = None
        self._num_forwards = 0
        self._forget_measurements()

    @property
    def evaluates_with_graph(self) -> bool:
        """Whether perturbed losses are computed as the first-order loss is, for a backward."""
        is_compiled = self.perturbation is not None and self.perturbation.is_compiled
        return is_compiled and self.inner is not None

    def measure(
        self,
        closure: Callable[[], Tensor],
        loss: Tensor | None,
        generators: GeneratorState | None = None,
    ) -> None:
        """Add one micro-batch's loss differences to the step under way.

        For loops that do forward and backward themselves; `accumulate` does all three.

        Args:
            closure: returns the micro-batch's loss, scaled as `loss` is.
            loss: the unperturbed loss of the micro-batch.
            generators: their state before `loss` was computed; None: masks are not replayed.
        """
        # Noted only once all is evaluated: an interrupted measurement leaves nothing behind.
        if self.perturbation is not None:
            scalars = projected_gradients(
                closure,
                self.perturbation,
                loss,
                eps=self.eps,
                step=self.step_count,
                num_directions=self.num_directions,
                estimator=self.estimator,
                generators=generators if self.replay_dropout else None,
                self_check=self._self_check,
                with_graph=self.inner is not None,
            )
            self._self_check = False
            self._scalars = scalars if self._scalars is None else self._scalars + scalars
            self._num_forwards += self.num_directions * forwards_per_direction(self.estimator)
        if loss is not None:
            self._loss = loss.detach().double() + (0.0 if self._loss is None else self._loss)

    def accumulate(self, closure: Callable[[], Tensor]) -> Tensor:
        """Forward, backward and loss differences of one micro-batch; moves nothing.

        Args:
            closure: computes and returns the loss. It must not call backward. With n micro-batches
                a step it divides its loss by n.

        Returns:
            The unperturbed loss, detached.
        """
        generators = GeneratorState.capture() if self.perturbation is not None else None
        try:
            with torch.set_grad_enabled(self.inner is not None):
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
                loss.backward()
            self.measure(closure, loss, generators)
        except RuntimeError as error:
            # A graph used twice, or a backward where the optimizer evaluates without gradients.
            if any(sign in str(error) for sign in ("second time", "does not require grad")):
                raise ValueError(
                    "the closure called backward; it must only return the loss: the optimizer "
                    "runs backward, and evaluates the closure again without gradients"
                ) from error
            raise
        return loss.detach()

    @torch.no_grad()
    def step(self, closure: Callable[[], Tensor] | None = None) -> Tensor | None:  # type: ignore[override]
        """Move both blocks.

        Args:
            closure: as for `accumulate`, called first when given (gradients are zeroed before it
                unless micro-batches were accumulated).

        Returns:
            The unperturbed loss of the closure, or None without one.
        """
        loss = None
        if closure is not None:
            if self._loss is None:
                self.zero_grad()
            with torch.enable_grad():
                loss = self.accumulate(closure)
        elif self.perturbation is not None and self._scalars is None:
            raise ValueError(
                "nothing was measured for the zeroth-order block; pass a closure to step(), or "
                "call accumulate(closure) for each micro-batch before it"
            )
        total = None if self._loss is None else float(self._loss)
        scalars = () if self._scalars is None else tuple(self._scalars.tolist())
        loss_is_finite = total is None or math.isfinite(total)
        scalars_are_finite = all(map(math.isfinite, scalars))
        grad_norm = self._clip()
        norms: dict[str, float] = {}
        if loss_is_finite and self.inner is not None:
            adapter = [
                p for g in self._groups("first") if g.get("block") == "adapter" for p in g["params"]
            ]
            before = [p.clone() for p in adapter]
            self.inner.step()
            if adapter:
                moved = torch._foreach_sub(adapter, before)
                norms["adapter"] = float(torch.stack(torch._foreach_norm(moved)).double().norm())
        if loss_is_finite and scalars_are_finite and self.perturbation is not None:
            self._move(scalars)
            norms |= self._expected_norms(scalars)
        non_finite = not (loss_is_finite and scalars_are_finite)
        if non_finite:
            warnings.warn(
                f"step {self.step_count}: loss {total}, projected gradient {scalars}: not finite, "
                "not applied. Lower the learning rates; in float16 raise eps or use bfloat16",
                stacklevel=2,
            )
        self.last_step = StepReport(
            self.step_count, total, scalars, grad_norm, non_finite, self._num_forwards, norms
        )
        self.num_forwards += self._num_forwards
        self.step_count += 1
        self._forget_measurements()
        return loss

    def state_dict(self) -> dict[str, Any]:
        """Torch's optimizer state, and the step count that addresses the directions."""
        return {
            **super().state_dict(),
            "zofo": {
                "step_count": self.step_count,
                "num_forwards": self.num_forwards,
                "seed": self.seed,
                "distribution": self.distribution,
                "num_directions": self.num_directions,
            },
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore; the weights themselves and the trajectory are restored apart.

        Raises:
            UserError: if the state was saved with other directions.
        """
        own = state_dict["zofo"]
        for key in ("seed", "distribution", "num_directions"):
            if own[key] != getattr(self, key):
                raise UserError(
                    f"the state was saved with {key} {own[key]!r}, this optimizer has "
                    f"{getattr(self, key)!r}; its directions would differ: use the saved one"
                )
        super().load_state_dict({k: v for k, v in state_dict.items() if k != "zofo"})
        self._share_state()
        self.step_count, self.num_forwards = own["step_count"], own["num_forwards"]
        self._forget_measurements()

    def _move(self, scalars: tuple[float, ...]) -> None:
        row = []
        for group in self._groups("zeroth"):
            update = Update(
                self.step_count, scalars, float(group["lr"]), float(group["weight_decay"])
            )
            update.apply(
                group["params"], group["tensors"], seed=self.seed, distribution=self.distribution
            )
            if group.get("block", "base") == "base":
                row.append(update)
        if row:
            self.trajectory.updates.append(tuple(row))

    def _expected_norms(self, scalars: tuple[float, ...]) -> dict[str, float]:
        squares: dict[str, float] = {}
        for group in self._groups("zeroth"):
            block = group.get("block", "base")
            num_weights = sum(p.numel() for p in group["params"])
            squares[block] = squares.get(block, 0.0) + float(group["lr"]) ** 2 * num_weights
        length = math.sqrt(math.fsum(s * s for s in scalars)) / len(scalars)
        return {block: math.sqrt(square) * length for block, square in squares.items()}

    def _clip(self) -> float | None:
        if self.max_grad_norm is None or self.inner is None:
            return None
        parameters = [p for group in self._groups("first") for p in group["params"]]
        return float(nn.utils.clip_grad_norm_(parameters, self.max_grad_norm))

    def _groups(self, order: str) -> list[dict[str, Any]]:
        return [group for group in self.param_groups if group["order"] == order]

    def _share_state(self) -> None:
        if self.inner is not None:
            self.inner.state = self.state
            self.inner.param_groups = self._groups("first")

    def _forget_measurements(self) -> None:
        self._loss, self._scalars, self._num_forwards = None, None, 0


def _known_optimizers() -> dict[str, type[Optimizer]]:
    """The optimizers of `torch.optim` by their names in lower case."""
    return {
        name.lower(): value
        for name, value in vars(torch.optim).items()
        if isinstance(value, type) and issubclass(value, Optimizer) and value is not Optimizer
    }


def _optimizer_class(optimizer: str | type[Optimizer]) -> type[Optimizer]:
    return _known_optimizers()[optimizer.lower()] if isinstance(optimizer, str) else optimizer


def _check_options(
    optimizer: str | type[Optimizer],
    eps: float,
    estimator: str,
    num_directions: int,
    distribution: str,
    seed: int,
    max_grad_norm: float | None,
) -> None:
    known = _known_optimizers()
    asked = optimizer.lower() if isinstance(optimizer, str) else None
    near = difflib.get_close_matches(asked, known, n=1) if asked else []
    hint = f"; did you mean {known[near[0]].__name__!r}?" if near else ""
    checks = (
        (
            asked is None or asked in known,
            f"optimizer is {optimizer!r}, which torch.optim does not have{hint}",
        ),
        (0 < eps < math.inf, f"eps is {eps}; it must be a positive number, 1e-3 is usual"),
        (
            estimator in ESTIMATORS,
            f"estimator is {estimator!r}; choose one of {', '.join(ESTIMATORS)}",
        ),
        (num_directions >= 1, f"num_directions is {num_directions}; it must be at least 1"),
        (
            distribution in DISTRIBUTIONS,
            f"distribution is {distribution!r}; choose one of {', '.join(DISTRIBUTIONS)}",
        ),
        (0 <= seed < 2**64, f"seed is {seed}; it must lie in [0, 2^64)"),
        (
            max_grad_norm is None or max_grad_norm > 0,
            f"max_grad_norm is {max_grad_norm}; it must be positive, or None for no clipping",
        ),
    )
    wrong = [message for holds, message in checks if not holds]
    if wrong:
        raise UserError("; ".join(wrong))


def _check_groups(groups: Sequence[Mapping[str, Any]]) -> None:
    for i, group in enumerate(groups):
        if group.get("order") not in ("first", "zeroth"):
            raise UserError(
                f"parameter group {i} has order {group.get('order')!r}; it must be 'first' or "
                "'zeroth' (zofo.methods.param_groups builds the groups)"
            )
        if "lr" not in group:
            raise UserError(f"parameter group {i} has no lr")
        if group["order"] == "zeroth":
            lengths = {len(group.get(key, ())) for key in ("params", "names", "tensors")}
            if len(lengths) != 1:
                raise UserError(
                    f"parameter group {i} is of zeroth order and needs one name and one tensor "
                    "index for each parameter (zofo.methods.param_groups builds the groups)"
                )
