"""Zeroth-order estimates of the gradient: loss differences along random directions.

    forward:  s_k = (f(w + eps v_k) − f(w)) / eps                   1 extra forward per direction
    central:  s_k = (f(w + eps v_k) − f(w − eps v_k)) / (2 eps)     2 extra forwards per direction

    g = mean_k s_k v_k                                              the estimate of ∇f(w)

All evaluations of a step use the same batch and, because the random generators are replayed, the
same dropout masks. Two losses therefore differ only by the perturbation.

References:
    arXiv 2604.09940, the hybrid algorithm's base step (forward difference, one direction).
    Malladi et al., "Fine-Tuning Language Models with Just Forward Passes", 2023 (central).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final, Literal, get_args

import torch
from torch import Tensor

from zofo.optim.generators import GeneratorState, untouched
from zofo.perturb.compiled import has_graphs
from zofo.perturb.side_path import RowDirections
from zofo.perturb.view import Perturbation

Estimator = Literal["forward", "central"]
ESTIMATORS: Final[tuple[str, ...]] = get_args(Estimator)


def forwards_per_direction(estimator: Estimator) -> int:
    """Forward passes per direction, beyond the one of the unperturbed loss."""
    return 1 if estimator == "forward" else 2


@torch.no_grad()
def projected_gradients(
    closure: Callable[[], Tensor | float],
    perturbation: Perturbation,
    loss: Tensor | None,
    *,
    eps: float,
    step: int,
    num_directions: int = 1,
    estimator: Estimator = "forward",
    generators: GeneratorState | None = None,
    self_check: bool = False,
    with_graph: bool = False,
    directions: RowDirections | None = None,
) -> Tensor:
    """Compute the projected gradients s_k.

    Args:
        closure: returns the loss of the batch, a scalar, or the rows' shares of it, [rows].
        perturbation: evaluates the model at w + eps v.
        loss: f(w) on the same batch with the same masks. The forward difference needs it.
        eps: smoothing radius.
        step: the optimizer step, which addresses the directions.
        num_directions: K.
        estimator: "forward" or "central".
        generators: the state before f(w) was computed; None: do not replay masks.
        self_check: check the first evaluation for weights that are read unperturbed. Compiled parts
            run eagerly during the check, so the evaluation is then repeated with the graph.
        with_graph: whether `loss` was computed in gradient mode. A compiled model then computes
            the perturbed losses in that mode too, because the graph without gradients rounds
            differently.
        directions: rank-one directions of the rows, which share one evaluation.

    Returns:
        s, float64, shape [num_directions], or [num_directions, rows] for the shares of rows, on the
        device of the loss.

    Raises:
        SelfCheckError: if a weight is read unperturbed.
        NotByRows: if each row has a direction and a layer cannot tell the rows apart.
    """

    def evaluate(scale: float, direction: int, *, check: bool = False, graph: bool) -> Tensor:
        replay = generators.replayed() if generators is not None else untouched()
        seen = perturbation.at(
            scale, step=step, direction=direction, self_check=check, directions=directions
        )
        with replay, torch.set_grad_enabled(graph), seen:
            # The clone is needed if the loss is itself a weight: it then lies in the scratch.
            value = _value(closure()).double().clone()
            return value if directions is not None else value.sum()

    graph = with_graph and perturbation.is_compiled
    if self_check:
        ahead = perturbation.checked(lambda: evaluate(eps, 0, check=True, graph=False))
        if has_graphs():
            expected = perturbation.entered
            ahead = evaluate(eps, 0, graph=with_graph)
            perturbation.check_entered(expected)
    scalars = []  # s_k, each of shape [] or [rows]
    for k in range(num_directions):
        if k > 0 or not self_check:
            ahead = evaluate(eps, k, graph=graph)
        if estimator == "forward":
            if loss is None:
                raise ValueError("the forward difference needs the unperturbed loss")
            scalars.append((ahead - loss.detach().double()) / eps)
        else:
            scalars.append((ahead - evaluate(-eps, k, graph=graph)) / (2 * eps))
    return torch.stack(scalars)


def unperturbed(
    closure: Callable[[], Tensor | float],
    generators: GeneratorState | None,
    *,
    with_graph: bool = False,
) -> Tensor:
    """Evaluate f(w) under the masks and in the gradient mode of a perturbed evaluation."""
    replay = generators.replayed() if generators is not None else untouched()
    with replay, torch.set_grad_enabled(with_graph):
        return _value(closure())


def _value(loss: Tensor | float) -> Tensor:
    return (loss if isinstance(loss, Tensor) else torch.tensor(loss, dtype=torch.float64)).detach()
