"""The state of all random generators, so that every evaluation has the same dropout masks."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor


def seed_generators(seed: int) -> None:
    """Seed torch's generators of all devices, as `torch.manual_seed` does.

    Where there is no accelerator, `torch.manual_seed` formats the whole stack of calls several
    times, for devices that might come. That takes longer than a small model's forward pass.
    """
    if torch.accelerator.is_available():
        torch.manual_seed(seed)
    else:
        torch.default_generator.manual_seed(seed)


@dataclass(frozen=True)
class GeneratorState:
    """The state of every global generator that a forward pass may draw dropout masks from."""

    torch_cpu: Tensor
    accelerator: dict[int, Tensor]
    numpy: Any
    python: Any

    @classmethod
    def capture(cls) -> GeneratorState:
        """Read the states without drawing a number."""
        accelerator = {}
        if torch.cuda.is_available() and torch.cuda.is_initialized():
            accelerator = dict(enumerate(torch.cuda.get_rng_state_all()))
        return cls(torch.get_rng_state(), accelerator, np.random.get_state(), random.getstate())

    def restore(self) -> None:
        """Set every generator back to this state."""
        torch.set_rng_state(self.torch_cpu)
        for device, state in self.accelerator.items():
            torch.cuda.set_rng_state(state, device)
        np.random.set_state(self.numpy)
        random.setstate(self.python)

    def is_current(self) -> bool:
        """Whether no number was drawn since, which means that no dropout was active."""
        present = GeneratorState.capture()
        return (
            torch.equal(self.torch_cpu, present.torch_cpu)
            and self.accelerator.keys() == present.accelerator.keys()
            and all(torch.equal(s, present.accelerator[d]) for d, s in self.accelerator.items())
            # Numpy's state is a tuple of an array and plain values.
            and all(np.array_equal(a, b) for a, b in zip(self.numpy, present.numpy, strict=True))
            and self.python == present.python
        )

    @contextmanager
    def replayed(self) -> Iterator[None]:
        """Start the generators from this state inside the context, and undo their use after it."""
        with untouched():
            self.restore()
            yield


@contextmanager
def untouched() -> Iterator[None]:
    """Restore the generators after the context, without replaying them inside it."""
    present = GeneratorState.capture()
    try:
        yield
    finally:
        present.restore()
