"""A training loss on fixed rows, as a function of the weights, and its first two derivatives.

    f(w) = Σ_b share_b · loss(batch_b; w)      in evaluation mode: without dropout, the same f twice

Whatever is measured is measured away from the weights themselves: the model is called with other
tensors in their place in the modules' tables, which share their memory where the point is the
present one. No weight is written, none has to require a gradient, no gradient is left behind, and
what was drawn from the global generators is given back. (`torch.func.functional_call` swaps by
name, and leaves its own tensor behind in a module that has two names, as the embedding of prompt
learning has.)

Attention is computed by its plain formula throughout: the fused kernels have no second derivative,
and their rounding is another one.
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
        model: what the loss calls.
        loss: batch -> mean loss of its rows, a scalar; it may only depend on batch and model.
        batches: what it is called with.
        shares: of each batch in f, adding up to 1; None: equal ones.
        around: context to evaluate in, such as a trainer's autocast.
    """

    def __init__(
        self,
        model: nn.Module,
        loss: Callable[[Any], Tensor],
        batches: Sequence[Any],
        shares: Sequence[float] | None = None,
        around: Callable[[], Any] = nullcontext,
    ) -> None:
        self.model, self.batches, self._around = model, list(batches), around
        self.shares = list(shares) if shares is not None else [1 / len(batches)] * len(batches)
        self._function = loss
        self._places: dict[int, list[tuple[dict[str, Any], str]]] = {}
        for module in model.modules():
            for name, parameter in module._parameters.items():
                place = (module._parameters, name)
                self._places.setdefault(id(parameter), []).append(place)
        self.num_forwards = 0.0

    @contextmanager
    def measuring(self) -> Iterator[None]:
        """Within the context the model is as f wants it; afterwards as it was."""
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
        """f, without gradients.

        Args:
            at: parameters that take other values.
        """
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
        """F and its gradient.

        Args:
            parameters: what to differentiate for.
            at: parameters, among these or others, that take other values.
            scale: of the loss in the backward pass; the gradient is divided by it again.

        Returns:
            f, and name -> gradient, in the dtype of the parameters.
        """
        check_differentiable(parameters)
        value, total = 0.0, {n: torch.zeros_like(p.detach()) for n, p in parameters.items()}
        with self.measuring(), torch.enable_grad():
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

    def graph(
        self,
        parameters: Mapping[str, nn.Parameter],
        at: Mapping[nn.Parameter, Tensor] | None = None,
    ) -> GradientGraph:
        """The gradient as something to differentiate once more."""
        return GradientGraph(self, parameters, at)

    def rounding(self, parameters: Mapping[str, nn.Parameter]) -> float:
        """Relative error of the gradient by the rounding of its backward pass.

        The same gradient with the loss scaled by 1/3, which rounds every product anew:
        ‖3 ∇(f/3) − ∇f‖ / ‖∇f‖. The forward pass rounds as before, so it is a lower estimate.
        """
        _, plain = self.gradient(parameters)
        _, scaled = self.gradient(parameters, scale=1 / 3)
        size = norm(plain)
        return norm(minus(scaled, plain)) / size if size else 0.0

    def _leaves(
        self,
        parameters: Mapping[str, nn.Parameter],
        at: Mapping[nn.Parameter, Tensor] | None,
    ) -> dict[nn.Parameter, Tensor]:
        point = at or {}
        return {p: point.get(p, p).detach().requires_grad_() for p in parameters.values()}

    def _loss(self, batch: Any, at: Mapping[nn.Parameter, Tensor]) -> Tensor:
        """The loss of a batch with other tensors in the places of some parameters."""
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
            for table, name, parameter, _ in places:
                table[name] = parameter


GRADIENT_COST = 3.0
"""Forwards that a gradient costs: one, and a backward of about two."""
PRODUCT_COST = 6.0
"""Forwards that a product with the Hessian costs, its graph being there; measured on MiniLM."""


class GradientGraph:
    """∇f with its graph, to multiply the Hessian with vectors: Hv = ∇(∇f · v).

    With one batch the graph is kept, and a product costs one backward through it; with several it
    is made anew for each product, so that the memory is that of one batch.

    Args:
        objective: f.
        parameters: what to differentiate for.
        at: parameters that take other values.
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
        """F and ∇f."""
        if self._kept is None:
            return self.objective.gradient(self.parameters, self.at)
        _, gradient, value = self._kept
        return value, {name: g.detach() for name, g in gradient.items()}

    def product(self, vector: Mapping[str, Tensor], wanted: Sequence[str] | None = None) -> Vector:
        """Rows of H v.

        Args:
            vector: name -> tensor; parameters that are missing count as 0.
            wanted: names of the rows; None: all parameters.
        """
        names = list(self.parameters) if wanted is None else list(wanted)
        total = {n: torch.zeros_like(self.parameters[n].detach()) for n in names}
        objective = self.objective
        with objective.measuring(), torch.enable_grad():
            for batch, share in zip(objective.batches, objective.shares, strict=True):
                leaves, gradient, _ = self._kept or self._derive(batch)
                used = [n for n in vector if gradient[n].requires_grad]
                found = torch.autograd.grad(
                    [gradient[n] for n in used],
                    [leaves[n] for n in names],
                    [vector[n] for n in used],
                    retain_graph=self._kept is not None,
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
    """A trainer's loss on some of its training rows.

    Args:
        trainer: any `transformers.Trainer`.
        num_rows: how many rows; all, if there are fewer.
        seed: of their choice, which draws nothing from the global generators.
        batch_size: rows a forward; default: all in one.

    Raises:
        UserError: if the training data cannot be indexed.
    """
    from zofo.trainer.losses import metrics_set_aside

    dataset = trainer.train_dataset
    if not hasattr(dataset, "__len__") or not hasattr(dataset, "__getitem__"):
        raise UserError(
            f"{type(dataset).__name__} cannot be indexed, so no rows can be set aside to measure "
            "on; give the trainer a dataset with __len__ and __getitem__"
        )
    if hasattr(dataset, "column_names"):
        dataset = trainer._remove_unused_columns(dataset, description="measured")
    order = np.random.default_rng(seed).permutation(len(dataset))[:num_rows]
    rows = [dataset[int(i)] for i in sorted(order)]
    size = batch_size or len(rows)
    generators = GeneratorState.capture()
    parts = [rows[i : i + size] for i in range(0, len(rows), size)]
    batches = [dict(trainer._prepare_inputs(dict(trainer.data_collator(p)))) for p in parts]
    generators.restore()

    def loss(batch: Any) -> Tensor:
        with metrics_set_aside(trainer):
            found: Tensor = trainer.compute_loss(trainer.model, dict(batch))
        return found

    return Objective(
        trainer.model,
        loss,
        batches,
        [len(p) / len(rows) for p in parts],
        trainer.compute_loss_context_manager,
    )


def check_differentiable(parameters: Mapping[str, nn.Parameter]) -> None:
    """Refuse weights whose rounding would drown what is measured.

    Raises:
        UserError: for 16-bit and quantized weights.
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
    """A − b."""
    return {n: a[n] - b[n] for n in a}


def scaled(vector: Mapping[str, Tensor], factor: float) -> Vector:
    """Factor · vector."""
    return {n: t * factor for n, t in vector.items()}
