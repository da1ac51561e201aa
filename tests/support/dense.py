"""Objectives with a known Hessian: quadratics by block, and a tiny transformer by autograd."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from tests.support.models import batch_for, build
from zofo.smoothness.blocks import Block
from zofo.smoothness.objective import Objective


class Quadratic(nn.Module):
    """The function wᵀAw/2 + b·w of two blocks, w = (x, y)."""

    def __init__(self, hessian: Tensor, num_x: int, *, seed: int = 0):
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        draw = lambda n: torch.randn(n, dtype=torch.float64, generator=generator)  # noqa: E731
        self.hessian, self.slope = hessian, draw(len(hessian))
        self.x = nn.Parameter(draw(num_x))
        self.y = nn.Parameter(draw(len(hessian) - num_x))

    def forward(self, batch=None):
        w = torch.cat([self.x, self.y])
        return w @ self.hessian @ w / 2 + self.slope @ w


def symmetric(spectrum, *, seed: int = 0) -> Tensor:
    """Return a float64 matrix with these eigenvalues and random eigenvectors."""
    generator = torch.Generator().manual_seed(seed)
    values = torch.as_tensor(spectrum, dtype=torch.float64)
    drawn = torch.randn(len(values), len(values), dtype=torch.float64, generator=generator)
    basis, _ = torch.linalg.qr(drawn)
    return basis @ torch.diag(values) @ basis.T


def blocks_of_quadratic(model: Quadratic) -> dict[str, Block]:
    return {
        "base": Block("base", {"x": model.x}, (0,)),
        "adapter": Block("adapter", {"y": model.y}, (1 << 19,)),
    }


def objective_of(model: nn.Module, batches=(None,)) -> Objective:
    return Objective(model, model, batches)


def tiny_objective(architecture="llama", adapter="lora", *, num_batches=1, dtype=torch.float64):
    """Return a tiny transformer in double precision, and its loss on one or more batches."""
    model = build(architecture, adapter, dtype=dtype).to(dtype)
    batches = [batch_for(architecture, seed=1 + i) for i in range(num_batches)]
    return model, Objective(model, lambda batch: model(**batch).loss, batches)


def dense_hessian(objective: Objective, parameters) -> Tensor:
    """Return ∇²f over some parameters, [n, n].

    autograd computes it row by row on the model itself.
    """
    own = list(parameters.values())
    flags = [(p, p.requires_grad) for p in objective.model.parameters()]
    for p, _ in flags:
        p.requires_grad_(any(p is q for q in own))
    with objective.measuring():
        losses = [s * objective._function(b) for s, b in zip(objective.shares, objective.batches)]  # noqa: B905
        gradient = torch.autograd.grad(sum(losses), own, create_graph=True, allow_unused=True)
        flat = torch.cat(
            [
                (torch.zeros_like(p) if g is None else g).reshape(-1)
                for g, p in zip(gradient, own, strict=True)
            ]
        )
        rows = []
        for entry in flat:
            if not entry.requires_grad:
                rows.append(torch.zeros_like(flat.detach()))
                continue
            row = torch.autograd.grad(
                entry, own, retain_graph=True, allow_unused=True, materialize_grads=True
            )
            rows.append(torch.cat([r.reshape(-1) for r in row]))
    for p, flag in flags:
        p.requires_grad_(flag)
    return torch.stack(rows).detach()
