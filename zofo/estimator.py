"""Zeroth-order estimates: differences of the loss along random directions.

    forward:  s_k = (f(w + eps v_k) − f(w)) / eps                   one forward a direction
    central:  s_k = (f(w + eps v_k) − f(w − eps v_k)) / (2 eps)     two

The gradient's estimate is g = mean_k s_k v_k. All evaluations use one batch and, by replaying the
generators, the same dropout masks: two losses differ by the perturbation and nothing else.

References:
    arXiv 2604.09940, the hybrid algorithm's base step (forward difference, one direction).
    Malladi et al., "Fine-Tuning Language Models with Just Forward Passes", 2023 (central).
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Final, Literal, get_args

import numpy as np
import torch
from torch import Tensor

from zofo.perturb import Perturbation

Estimator = Literal["forward", "central"]
ESTIMATORS: Final[tuple[str, ...]] = get_args(Estimator)


def forwards_per_direction(estimator: Estimator) -> int:
    """Extra forwards that one direction costs beyond the unperturbed loss."""
    return 1 if estimator == "forward" else 2


@dataclass(frozen=True)
class GeneratorState:
    """The state of every global generator that a forward may draw dropout masks from."""

    torch_cpu: Tensor
    accelerator: dict[int, Tensor]
    numpy: Any
    python: Any

    @classmethod
    def capture(cls) -> GeneratorState:
        """Read the states; draws nothing."""
        accelerator = {}
        if torch.cuda.is_available() and torch.cuda.is_initialized():
            accelerator = dict(enumerate(torch.cuda.get_rng_state_all()))
        return cls(
            torch.get_rng_state(),
            accelerator,
            np.random.get_state(),
            random.getstate(),
        )

    def restore(self) -> None:
        """Set every generator back to this state."""
        torch.set_rng_state(self.torch_cpu)
        for device, state in self.accelerator.items():
            torch.cuda.set_rng_state(state, device)
        np.random.set_state(self.numpy)
        random.setstate(self.python)

    def is_current(self) -> bool:
        """Whether nothing was drawn since: no dropout was active."""
        present = GeneratorState.capture()
        return (
            torch.equal(self.torch_cpu, present.torch_cpu)
            and self.accelerator.keys() == present.accelerator.keys()
            and all(torch.equal(s, present.accelerator[d]) for d, s in self.accelerator.items())
            and all(np.array_equal(a, b) for a, b in zip(self.numpy, present.numpy, strict=True))
            and self.python == present.python
        )

    @contextmanager
    def replayed(self) -> Iterator[None]:
        """Within the context the generators start from this state; afterwards as if unused."""
        present = GeneratorState.capture()
        self.restore()
        try:
            yield
        finally:
            present.restore()


@torch.no_grad()
def projected_gradients(
    closure: Callable[[], Tensor],
    perturbation: Perturbation,
    loss: Tensor | None,
    *,
    eps: float,
    step: int,
    num_directions: int = 1,
    estimator: Estimator = "forward",
    generators: GeneratorState | None = None,
    self_check: bool = False,
) -> Tensor:
    """The scalars s_k.

    Args:
        closure: returns the loss of the batch, a scalar.
        perturbation: the view of the model at w + eps v.
        loss: f(w) on the same batch with the same masks; needed by the forward difference.
        eps: smoothing radius.
        step: the optimiser step; addresses the directions.
        num_directions: how many directions.
        estimator: "forward" or "central".
        generators: state before f(w) was computed; None: leave the generators alone.
        self_check: watch the first evaluation for reads around the perturbation.

    Returns:
        float64, shape [num_directions], on the loss's device.

    Raises:
        SelfCheckError: from the watched evaluation.
    """

    def evaluate(scale: float, direction: int, check: bool) -> Tensor:
        replay = generators.replayed() if generators is not None else _untouched()
        with replay, perturbation.at(scale, step=step, direction=direction, self_check=check):
            # Copied: a loss that is itself a weight lies in the scratch.
            return closure().detach().double().clone()

    scalars = []
    for k in range(num_directions):
        ahead = evaluate(eps, k, self_check and k == 0)
        if estimator == "forward":
            if loss is None:
                raise ValueError("the forward difference needs the unperturbed loss")
            scalars.append((ahead - loss.detach().double()) / eps)
        else:
            scalars.append((ahead - evaluate(-eps, k, False)) / (2 * eps))
    return torch.stack(scalars)


@torch.no_grad()
def unperturbed(closure: Callable[[], Tensor], generators: GeneratorState | None) -> Tensor:
    """The loss as it is, under the masks that a perturbed evaluation has."""
    with generators.replayed() if generators is not None else _untouched():
        return closure().detach()


@contextmanager
def _untouched() -> Iterator[None]:
    """The generators are left as they were found, but not replayed."""
    present = GeneratorState.capture()
    try:
        yield
    finally:
        present.restore()
