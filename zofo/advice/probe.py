"""Evaluations of the advisor: losses and gradients on training rows, with their cost.

    pass                     cost in forward-equivalents
    forward                  rows / batch_size
    forward and backward     three times as much for all weights; for an adapter, 1 + the share of
                             the layers that its backward pass reaches

Rows come in one permutation of the training set, drawn from the advisor's own seed. The first rows
are held aside. The others are drawn batch by batch. No evaluation changes the model: the base is
perturbed only while it is used, and a trained adapter, generators, gradients, flags and modes are
restored bit for bit.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Final

import numpy as np
import torch
from torch import Tensor, nn

from zofo.optim.generators import GeneratorState, seed_generators
from zofo.perturb.view import Perturbation

LossAndRows = Callable[[nn.Module, Any], tuple[Tensor, Tensor]]
"""Model and batch -> the loss, a scalar with its graph, and the loss of each row, [rows]. The mean
over rows is the loss."""
NUM_HELD: Final = 48
"""Largest number of rows held aside. At most a quarter of all rows is held aside."""


class Probe:
    """Evaluate a model on rows of a training set.

    Args:
        model: in training mode.
        loss: gives the loss of a batch and of its rows.
        batch_of: row indices -> batch.
        num_rows: rows of the training set.
        batch_size: rows of a micro-batch.
        seed: seed of the row order and of the dropout masks.
        backward_share: share of the layers that a backward pass to the adapter reaches.
    """

    def __init__(
        self,
        model: nn.Module,
        loss: LossAndRows,
        batch_of: Callable[[Sequence[int]], Any],
        *,
        num_rows: int,
        batch_size: int,
        seed: int = 0,
        backward_share: float = 1.0,
    ) -> None:
        self.model, self.loss, self.batch_of = model, loss, batch_of
        self.num_rows, self.batch_size, self.seed = num_rows, batch_size, seed
        generator = np.random.Generator(np.random.Philox(np.random.SeedSequence((seed, 1))))
        order = generator.permutation(num_rows).tolist()
        num_held = min(NUM_HELD, num_rows // 4)
        self.held, self.open = order[:num_held], order[num_held:]
        self.cost, self.backward_share = 0.0, backward_share
        self._next = 0

    def rewind(self) -> None:
        """Start again with the first batch."""
        self._next = 0

    def draw(self, num: int | None = None) -> list[int]:
        """The next rows. After the last row of the training set, the first follows."""
        num = self.batch_size if num is None else num
        chosen = [self.open[(self._next + i) % len(self.open)] for i in range(num)]
        self._next += num
        return chosen

    def masks(self, direction: int) -> GeneratorState:
        """The generator state that fixes the dropout masks of all evaluations along a direction."""
        seed_generators(self.seed % 2**63 + direction)
        return GeneratorState.capture()

    @torch.no_grad()
    def batch_loss(self, indices: Sequence[int]) -> tuple[float, np.ndarray]:
        """The loss in the dtype that a step computes, and the loss of each row, float64 [rows]."""
        self.cost += len(indices) / self.batch_size
        loss, shares = self.loss(self.model, self.batch_of(indices))
        return float(loss), shares.detach().double().cpu().numpy()

    def losses_at(
        self,
        view: Perturbation,
        scale: float,
        indices: Sequence[int],
        *,
        direction: int,
        masks: GeneratorState,
    ) -> tuple[float, np.ndarray]:
        """`batch_loss` at x + scale · v with given dropout masks."""

        def evaluate() -> tuple[float, np.ndarray]:
            with masks.replayed():
                return self.batch_loss(indices)

        # Using the direction's number as the step gives each direction fresh noise. The run's noise
        # differs, because its seed differs.
        return evaluate() if scale == 0 else view.value_at(evaluate, scale, step=direction)

    def backward(self, indices: Sequence[int], *, is_full: bool, share: float = 1.0) -> float:
        """Run forward and backward of share · loss. Gradients accumulate in the parameters.

        Args:
            indices: rows of a micro-batch.
            is_full: whether all weights have gradients, which sets the cost.
            share: factor of the loss.
        """
        # The gradient of an adapter needs no products for the base's weights.
        cost = 3 if is_full else 1 + self.backward_share
        self.cost += cost * len(indices) / self.batch_size
        with torch.enable_grad():
            loss = self.loss(self.model, self.batch_of(indices))[0]
            (loss * share).backward()
        return float(loss.detach())


@contextmanager
def untouched(model: nn.Module, moved: Sequence[nn.Parameter], *, seed: int) -> Iterator[None]:
    """Restore the model when the context ends, so that it may be trained within.

    Args:
        model: its buffers, modes, flags and gradients are restored, and torch's generators too.
        moved: parameters that may be written. They are copied and restored bit for bit.
        seed: seed of torch's generators within the context.
    """
    generators = GeneratorState.capture()
    modes = [(module, module.training) for module in model.modules()]
    flags = [(p, p.requires_grad, p.grad) for p in model.parameters()]
    held: list[tuple[Tensor, Tensor]] = [(p, p.detach().clone()) for p in moved]
    held += [(b, b.detach().clone()) for b in model.buffers()]
    try:
        seed_generators(seed)
        yield
    finally:
        with torch.no_grad():
            for tensor, copy in held:
                tensor.copy_(copy)
        for parameter, flag, grad in flags:
            parameter.requires_grad_(flag)
            parameter.grad = grad
        for module, mode in modes:
            module.training = mode
        generators.restore()
