"""Small float64 problems with a base and an adapter, whose constants are known."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from zofo.optim.methods import param_groups
from zofo.optim.optimizer import HybridOptimizer
from zofo.optim.reshuffle import epoch_order


class Quadratic(nn.Module):
    """The function f_i(x, y) = ½ Σ_j λ_j (x_j − a_ij)² + ½ Σ_j μ_j (y_j − b_ij)² of row i.

    Over the rows, a and b have mean 0 and standard deviation `noise`.
    """

    def __init__(
        self, base, adapter, *, rows=128, noise=0.1, start=1.0, seed=0, dtype=torch.float64
    ):
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.curves = [torch.as_tensor(v, dtype=dtype) for v in (base, adapter)]
        self.base = nn.ParameterList(
            [nn.Parameter(start * torch.randn(len(base), generator=generator, dtype=dtype))]
        )
        self.adapter = nn.Parameter(
            start * torch.randn(len(adapter), generator=generator, dtype=dtype)
        )
        self.rows = [
            noise * torch.randn(rows, len(v), generator=generator, dtype=dtype)
            for v in (base, adapter)
        ]
        self.num_rows = rows
        self.inner = _Base(self.base[0])
        del self.base
        self.inner.x.requires_grad_(False)

    def forward(self, rows):
        x, y = self.inner(), self.adapter
        parts = (x - self.rows[0][rows]).square() @ self.curves[0]
        return 0.5 * (parts + (y - self.rows[1][rows]).square() @ self.curves[1])


class _Base(nn.Module):
    def __init__(self, x):
        super().__init__()
        self.x = x

    def forward(self):
        return self.x * 1


class Logistic(nn.Module):
    """A classifier of two layers with a logistic loss.

    The base is the first layer, the adapter the last.
    """

    def __init__(self, *, rows=128, width=12, hidden=6, seed=0, dtype=torch.float64):
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.features = torch.randn(rows, width, generator=generator, dtype=dtype)
        truth = torch.randn(width, generator=generator, dtype=dtype)
        flips = 1.0 * (torch.rand(rows, generator=generator) < 0.1)
        self.labels = ((self.features @ truth > 0).to(dtype) - flips.to(dtype)).abs()
        self.num_rows = rows
        self.inner = nn.Linear(width, hidden, bias=False, dtype=dtype)
        self.adapter = nn.Linear(hidden, 1, dtype=dtype)
        with torch.no_grad():
            for p in self.parameters():
                p.copy_(0.3 * torch.randn(p.shape, generator=generator, dtype=dtype))
        self.inner.requires_grad_(False)

    def forward(self, rows):
        logits = self.adapter(torch.tanh(self.inner(self.features[rows])))[:, 0]
        return nn.functional.binary_cross_entropy_with_logits(
            logits, self.labels[rows], reduction="none"
        )


def loss(model, rows) -> tuple[Tensor, Tensor]:
    shares = model(rows)
    return shares.mean(), shares.detach()


def batch_of(indices):
    return torch.tensor(list(indices))


def train(model, advice, *, num_steps, batch_size=8, seed=0, optimizer="AdamW", method="hybrid"):
    """Run the real optimizer at the advised rates. Return the full loss before and after."""
    everything = torch.arange(model.num_rows)
    with torch.no_grad():
        before = float(model(everything).mean())
    built = param_groups(
        model, method, base_lr=advice.base_lr or 0.0, adapter_lr=advice.adapter_lr or 0.0
    )
    stepper = HybridOptimizer(
        built,
        model,
        optimizer=optimizer,
        optimizer_kwargs={"weight_decay": 0.0} if optimizer == "AdamW" else {},
        eps=advice.eps or 1e-3,
        seed=seed,
        max_grad_norm=1.0,
        self_check=False,
    )
    order, epoch = [], 0
    while len(order) < num_steps * batch_size:
        order += epoch_order(model.num_rows, seed=seed, epoch=epoch, sampling="reshuffle").tolist()
        epoch += 1
    for step in range(num_steps):
        rows = torch.tensor(order[step * batch_size : (step + 1) * batch_size])
        stepper.step(lambda rows=rows: model(rows).mean())
    with torch.no_grad():
        return before, float(model(everything).mean())
