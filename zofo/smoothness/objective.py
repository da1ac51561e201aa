"""A training loss on fixed rows as a function of the weights, with its first two derivatives.

    f(w) = Σ_b share_b · loss(batch_b; w)      in evaluation mode: no dropout, so f is repeatable

A measurement leaves the model unchanged. For the call, other tensors take the place of the
parameters in the modules' tables; at the current point they share the memory of the parameters. So
no weight is written, no weight needs `requires_grad`, no `.grad` remains, and the global generators
return to their earlier state. (`torch.func.functional_call` swaps by name. It would leave its own
tensor in a module that has two names, as the embedding of prompt learning has.)

Attention always uses the plain formula, because the fused kernels have no second derivative and
round differently.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from zofo.errors import UserError
from zofo.optim.generators import GeneratorState

Vector = dict[str, Tensor]
"""Name of a parameter -> tensor of its shape."""


class Objective:
    """f on fixed rows.

    Args:
        model: the model that the loss calls.
        loss: batch -> mean loss of its rows, a scalar; it may depend on batch and model only.
        batches: the arguments of `loss`.
        num_rows: number of rows of each batch, which is its weight in f; None: equal weights.
        around: context for the evaluation, such as a trainer's autocast.
    """

    def __init__(
        self,
        model: nn.Module,
        loss: Callable[[Any], Tensor],
        batches: Sequence[Any],
        num_rows: Sequence[int] | None = None,
        around: Callable[[], Any] = nullcontext,
    ) -> None:
        self.model, self.batches, self._around = model, list(batches), around
        counts = num_rows or [1] * len(batches)
        self.shares = [count / sum(counts) for count in counts]
        self._function = loss
        # Tied weights have several places, and all of them must take the same other value.
        self._places: dict[int, list[tuple[dict[str, Any], str]]] = {}
        for module in model.modules():
            for name, parameter in module._parameters.items():
                place = (module._parameters, name)
                self._places.setdefault(id(parameter), []).append(place)
        self.num_forwards = 0.0

    @contextmanager
    def measuring(self) -> Iterator[None]:
        """A context in which the model computes f; afterwards the model is as before."""
        modes = [(module, module.training) for module in self.model.modules()]
        generators = GeneratorState.capture()
        self.model.eval()
        try:
            with self._around(), sdpa_kernel(SDPBackend.MATH):
                yield
        finally:
            for module, mode in modes:
                module.training = mode
            generators.restore()

    def value(self, at: Mapping[nn.Parameter, Tensor] | None = None) -> float:
        """f, without gradients; the parameters in `at` take other values."""
        with self.measuring(), torch.no_grad():
            losses = [self._loss(batch, at or {}).double() for batch in self.batches]
        self.num_forwards += 1
        return float(sum(s * x for s, x in zip(self.shares, losses, strict=True)))

    def gradient(
        self,
        parameters: Mapping[str, nn.Parameter],
        at: Mapping[nn.Parameter, Tensor] | None = None,
        *,
        scale: float = 1.0,
    ) -> tuple[float, Vector]:
        """The value f and its gradient.

        Args:
            parameters: name -> parameter of the gradient.
            at: parameters, of the gradient or not, that take other values.
            scale: factor of the loss in the backward pass; the gradient is divided by it again.

        Returns:
            f, and name -> gradient in the dtype of the parameter.
        """
        check_differentiable(parameters)
        value, total = 0.0, {n: torch.zeros_like(p.detach()) for n, p in parameters.items()}
        with self.measuring(), torch.enable_grad():
            # One batch at a time, so that only one graph is alive.
            for batch, share in zip(self.batches, self.shares, strict=True):
                leaves = self._leaves(parameters, at)
                loss = self._loss(batch, {**(at or {}), **leaves})
                found = torch.autograd.grad(
                    loss * scale, list(leaves.values()), allow_unused=True, materialize_grads=True
                )
                value += share * float(loss.detach().double())
                for slot, part in zip(total.values(), found, strict=True):
                    slot.add_(part, alpha=share / scale)
        self.num_forwards += GRADIENT_COST
        return value, total

    def rounding(self, parameters: Mapping[str, nn.Parameter]) -> float:
        """Relative error of the gradient by rounding in the backward pass.

        The gradient is computed again with the loss scaled by 1/3, which changes the rounding of
        every product: ‖3 ∇(f/3) − ∇f‖ / ‖∇f‖. The forward pass rounds in the same way both times,
        so this is a lower estimate.
        """
        _, plain = self.gradient(parameters)
        _, scaled = self.gradient(parameters, scale=1 / 3)
        size = norm(plain)
        return norm(minus(scaled, plain)) / size if size else 0.0

    def _leaves(
        self, parameters: Mapping[str, nn.Parameter], at: Mapping[nn.Parameter, Tensor] | None
    ) -> dict[nn.Parameter, Tensor]:
        point = at or {}
        # `detach` shares the memory, so a leaf at the current point is no copy of the weights.
        return {p: point.get(p, p).detach().requires_grad_() for p in parameters.values()}

    def _loss(self, batch: Any, at: Mapping[nn.Parameter, Tensor]) -> Tensor:
        """The loss of a batch with other tensors in place of some parameters."""
        places = [
            (table, name, p, value)
            for p, value in at.items()
            for table, name in self._places[id(p)]
        ]
        try:
            for table, name, _, value in places:
                table[name] = value
            return self._function(batch)
        finally:
            for table, name, parameter, _ in places:  # also after an error
                table[name] = parameter


GRADIENT_COST = 3.0
"""Forward passes that a gradient costs: one, and about two for the backward pass."""
PRODUCT_COST = 6.0
"""Forward passes that a Hessian-vector product costs with a kept graph, measured on MiniLM."""


class GradientGraph:
    """∇f with its graph, for products of the Hessian with vectors: Hv = ∇(∇f · v).

    With one batch the graph is kept, and a product costs one backward pass through it. With several
    batches each product builds the graph again, so that the memory is that of one batch.
    """

    def __init__(
        self,
        objective: Objective,
        parameters: Mapping[str, nn.Parameter],
        at: Mapping[nn.Parameter, Tensor] | None = None,
    ) -> None:
        check_differentiable(parameters)
        self.objective, self.parameters, self.at = objective, dict(parameters), dict(at or {})
        self._kept: tuple[dict[str, Tensor], dict[str, Tensor], float] | None = None
        if len(objective.batches) == 1:
            with objective.measuring(), torch.enable_grad():
                self._kept = self._derive(objective.batches[0])

    def gradient(self) -> tuple[float, Vector]:
        """The value f and its gradient."""
        if self._kept is None:
            return self.objective.gradient(self.parameters, self.at)
        _, gradient, value = self._kept
        return value, {name: g.detach() for name, g in gradient.items()}

    def product(self, vector: Mapping[str, Tensor], wanted: Sequence[str] | None = None) -> Vector:
        """Rows of H v.

        Args:
            vector: name -> tensor; missing parameters count as 0.
            wanted: names of the parameters whose rows are returned; None: all.
        """
        names = list(self.parameters) if wanted is None else list(wanted)
        total = {n: torch.zeros_like(self.parameters[n].detach()) for n in names}
        objective = self.objective
        with objective.measuring(), torch.enable_grad():
            for batch, share in zip(objective.batches, objective.shares, strict=True):
                leaves, gradient, _ = self._kept or self._derive(batch)
                # A constant gradient has no graph, and its part of H v is 0.
                used = [n for n in vector if gradient[n].requires_grad]
                found = torch.autograd.grad(
                    [gradient[n] for n in used],
                    [leaves[n] for n in names],
                    [vector[n] for n in used],
                    retain_graph=self._kept is not None,  # the next product needs it again
                    allow_unused=True,
                    materialize_grads=True,
                )
                for slot, part in zip(total.values(), found, strict=True):
                    slot.add_(part.detach(), alpha=share)
        objective.num_forwards += PRODUCT_COST
        return total

    def _derive(self, batch: Any) -> tuple[dict[str, Tensor], dict[str, Tensor], float]:
        leaves = self.objective._leaves(self.parameters, self.at)
        loss = self.objective._loss(batch, {**self.at, **leaves})
        found = torch.autograd.grad(
            loss, list(leaves.values()), create_graph=True, allow_unused=True
        )
        named = dict(zip(self.parameters, leaves.values(), strict=True))
        gradient = {
            name: torch.zeros_like(leaf) if g is None else g
            for (name, leaf), g in zip(named.items(), found, strict=True)
        }
        self.objective.num_forwards += GRADIENT_COST
        return named, gradient, float(loss.detach())


def objective_of_trainer(
    trainer: Any, *, num_rows: int = 16, seed: int = 0, batch_size: int | None = None
) -> Objective:
    """The loss of a trainer on random training rows.

    Args:
        trainer: any `transformers.Trainer`.
        num_rows: number of rows; all rows if there are fewer.
        seed: seed of the choice, which uses no global generator.
        batch_size: rows of a forward pass; None: all rows.

    Raises:
        UserError: if the training data cannot be indexed.
    """
    from zofo.trainer.losses import metrics_set_aside

    dataset = trainer.train_dataset
    if not hasattr(dataset, "__len__") or not hasattr(dataset, "__getitem__"):
        raise UserError(
            f"{type(dataset).__name__} cannot be indexed, so no rows can be chosen for the "
            "measurement; give the trainer a dataset with __len__ and __getitem__"
        )
    if hasattr(dataset, "column_names"):
        dataset = trainer._remove_unused_columns(dataset, description="measured")
    # A collator may draw random numbers. The training must draw the same as without this call.
    generators = GeneratorState.capture()
    parts = choose_rows(dataset, num_rows, seed, batch_size)
    batches = [dict(trainer._prepare_inputs(dict(trainer.data_collator(rows)))) for rows in parts]
    generators.restore()

    def loss(batch: Any) -> Tensor:
        with metrics_set_aside(trainer):
            found: Tensor = trainer.compute_loss(trainer.model, dict(batch))
        return found

    counts = [len(rows) for rows in parts]
    around = trainer.compute_loss_context_manager
    return Objective(trainer.model, loss, batches, counts, around)


def choose_rows(rows: Any, num: int, seed: int, batch_size: int | None) -> list[list[Any]]:
    """`num` random rows in their order, in batches; None puts all into one batch."""
    order = sorted(np.random.default_rng(seed).permutation(len(rows))[:num])
    chosen = [rows[int(i)] for i in order]
    size = batch_size or len(chosen)
    return [chosen[i : i + size] for i in range(0, len(chosen), size)]


def check_differentiable(parameters: Mapping[str, nn.Parameter]) -> None:
    """Refuse 16-bit and quantized weights, whose rounding is too large for derivatives.

    Raises:
        UserError: if a parameter is neither float32 nor float64.
    """
    for name, parameter in parameters.items():
        if parameter.dtype not in (torch.float32, torch.float64):
            raise UserError(
                f"{name} is {str(parameter.dtype).removeprefix('torch.')}, whose rounding is "
                "larger than what a step changes in a gradient; set model.dtype=float32, or "
                "measure the directional curvature alone"
            )


def norm(vector: Mapping[str, Tensor]) -> float:
    """Euclidean norm, accumulated in float64."""
    parts = [torch.linalg.vector_norm(t, dtype=torch.float64) for t in vector.values()]
    return math.sqrt(math.fsum(float(p) ** 2 for p in parts))


def dot(a: Mapping[str, Tensor], b: Mapping[str, Tensor]) -> float:
    """Inner product over the names of `a`, accumulated in float64."""
    return math.fsum(float((a[n].double() * b[n].double()).sum()) for n in a)


def minus(a: Mapping[str, Tensor], b: Mapping[str, Tensor]) -> Vector:
    """The difference a − b."""
    return {n: a[n] - b[n] for n in a}
