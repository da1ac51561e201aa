"""The noise kernels on one weight larger than the caches, beside torch's own operations.

    kernel     computes           memory traffic          torch operation with the same traffic
    perturb    out = w + c v      reads w, writes out     torch.add(w, c, out=)
    update     w ← w + c v        reads w, writes w       w.add_(c)

Each moves twice the bytes of the weight, as a copy does. `torch.randn` followed by an addition
moves four times its bytes. The ratio to it compares the times of the same job.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final

import torch
from torch import Tensor

from zofo.bench.settings import Settings
from zofo.models.loading import DTYPES
from zofo.noise.combine import combine

_C: Final = 1e-3
_TINY: Final = 1e-9  # Updates are repeated, so each must hardly change the weight.
_ADDRESS: Final[dict[str, Any]] = {"seed": 1, "step": 2, "tensor": 3}
NUM_DIRECTIONS: Final = 4


class Kernel:
    """One operation on the weight, and the number of bytes that it reads and writes."""

    def __init__(self, run: Callable[[], object], num_bytes: int) -> None:
        self.step, self.num_bytes = run, num_bytes

    def enter(self) -> None:
        """Do nothing, because a kernel needs no preparation."""

    def leave(self) -> None:
        """Do nothing, because a kernel leaves nothing behind."""


def kernels(settings: Settings) -> dict[str, Kernel]:
    """Name -> operation. All operations share their buffers."""
    device, dtype = torch.device(settings.device), DTYPES[settings.dtype]
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(settings.elements, generator=generator).to(device, dtype)
    other, out = weight.clone(), torch.empty_like(weight)
    twice = 2 * weight.numel() * weight.element_size()

    def randn_and_add() -> Tensor:
        return torch.add(weight, torch.randn_like(weight), alpha=_C, out=out)

    found = {
        "copy_": Kernel(lambda: out.copy_(weight), twice),
        "torch.add(out=)": Kernel(lambda: torch.add(weight, _C, out=out), twice),
        "add_": Kernel(lambda: weight.add_(_TINY), twice),
        "axpy: add_(v, alpha)": Kernel(lambda: weight.add_(other, alpha=_TINY), 3 * twice // 2),
        "randn + add": Kernel(randn_and_add, 2 * twice),
    }
    for name in ("rademacher", "gaussian"):
        found |= _ours(name, weight, out, twice)
    return found


def _ours(name: str, weight: Tensor, out: Tensor, num_bytes: int) -> dict[str, Kernel]:
    address = {**_ADDRESS, "distribution": name}

    def perturb() -> Tensor:
        return combine(weight, (_C,), out=out, **address)

    def update() -> Tensor:
        return combine(weight, (_TINY,), rounding="stochastic", **address)

    def update_to_nearest() -> Tensor:
        return combine(weight, (_TINY,), **address)

    def update_by_several() -> Tensor:
        return combine(weight, (_TINY,) * NUM_DIRECTIONS, rounding="stochastic", **address)

    runs = {"perturb": perturb, "update": update}
    if weight.element_size() == 2:
        runs["update, rounded to nearest"] = update_to_nearest
    runs[f"update, {NUM_DIRECTIONS} directions"] = update_by_several
    return {f"{name} {job}": Kernel(run, num_bytes) for job, run in runs.items()}
