"""A smooth float64 model with closed forms, and helpers for its blocks."""

from __future__ import annotations

import copy

import torch
from torch import nn

from zofo.noise.combine import direction
from zofo.optim.blocks import split_parameters
from zofo.optim.methods import param_groups
from zofo.optim.optimizer import HybridOptimizer

SEED = 2**63 + 11


class Net(nn.Module):
    """A smooth float64 loss of a base and an adapter, precise enough for closed forms."""

    def __init__(self):
        super().__init__()
        self.first = nn.Linear(4, 6)
        self.second = nn.Linear(6, 5)
        self.adapter = nn.Linear(5, 2)
        self.double()
        self.first.requires_grad_(False)
        self.second.requires_grad_(False)

    def forward(self, x):
        hidden = torch.tanh(self.second(torch.tanh(self.first(x))))
        return (self.adapter(hidden) - 1).square().mean()


def rows(num, seed=3):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(num, 4, dtype=torch.float64, generator=generator)


def optimizer_for(model, method="hybrid", *, base_lr=0.3, adapter_lr=0.2, groups=None, **options):
    built = param_groups(model, method, base_lr=base_lr, adapter_lr=adapter_lr, **(groups or {}))
    return HybridOptimizer(built, model, **{"seed": SEED, **options})


def directions_of(model, *, step, index=0, distribution="rademacher"):
    """Return a dict from each base parameter's name to its v, in float64."""
    blocks = split_parameters(model)
    return {
        name: direction(
            p.shape,
            seed=SEED,
            step=step,
            tensor=blocks.base_index[name],
            index=index,
            distribution=distribution,
            dtype=torch.float64,
        )
        for name, p in blocks.base.items()
    }


@torch.no_grad()
def moved_along(model, v, scale):
    """Return a copy of the model whose base stands at x + scale · v."""
    twin = copy.deepcopy(model)
    for name, parameter in split_parameters(twin).base.items():
        parameter.add_(v[name], alpha=scale)
    return twin


def adapter_gradient(model, x):
    adapter = split_parameters(model).adapter
    return dict(zip(adapter, torch.autograd.grad(model(x), list(adapter.values())), strict=True))


def base_of(model):
    return {n: p.detach().clone() for n, p in split_parameters(model).base.items()}


def adapter_of(model):
    return {n: p.detach().clone() for n, p in split_parameters(model).adapter.items()}
