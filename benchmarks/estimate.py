"""Measure how far zeroth-order estimates of a batch's gradient lie from it.

    ratio  = E ‖ĝ‖² / ‖g‖²            1 is exact; d for one direction and rows that agree
    cosine = mean of ĝ · g / (‖ĝ‖ ‖g‖)

autograd computes g, the gradient of the batch's loss with respect to all base weights, in float32.
The estimates are those of a step: independent signs, rank-one directions, and rank-one directions
that the rows share. The rows come from rotten-tomatoes.

A second table shows the curvature c = vᵀHv along directions v, on the same rows:

    tail     c's largest value / mean              a direction with a large c needs a small rate
    τ / c    E[s² c] / (E s² · E c)                above 1 if steep directions are more curved

With --adapter-steps, LoRA is added, and both tables are made before and after so many of its steps.

    python benchmarks/estimate.py --model smollm2-135m --rows 8 32 128 --steps 6 --adapter-steps 30
    python benchmarks/estimate.py --model minilm --rows 8 32 128 --steps 30 --adapter-steps 30
"""

from __future__ import annotations

import argparse
import json
import math
from pathlib import Path
from typing import Any

import torch
from eps import HEADS, load
from torch import Tensor, nn

from zofo import HybridOptimizer, Perturbation, param_groups, split_parameters
from zofo.models.adapters import create_adapter
from zofo.optim.trajectory import Update
from zofo.tasks.losses import objective_loss, objective_losses

VARIANTS: dict[str, dict[str, Any]] = {
    "signs": {"distribution": "rademacher"},
    "rank-one": {"distribution": "rank-one"},
    "rank-one, 4": {"distribution": "rank-one", "directions_per_step": 4},
    "rank-one, rows": {"distribution": "rank-one", "directions_per_step": "rows"},
}


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", default="smollm2-135m", choices=list(HEADS))
    parser.add_argument("--rows", type=int, nargs="+", default=[8, 32])
    parser.add_argument("--steps", type=int, default=6, help="estimates of each kind")
    parser.add_argument("--eps", type=float, default=1e-4)
    parser.add_argument("--adapter-steps", type=int, default=0)
    parser.add_argument("--curvatures", type=int, default=24, help="directions of the second table")
    parser.add_argument("--radius", type=float, default=3e-3, help="of the second differences")
    parser.add_argument("--json", type=Path)
    return parser.parse_args()


def shares(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    values = objective_losses(model, batch)[1]  # [rows]
    return values / len(values)


def base_groups(model: nn.Module) -> Any:
    method = "hybrid" if split_parameters(model).adapter else "zo-ft"
    groups = param_groups(model, method, base_lr=0.0, adapter_lr=0.0)
    return [group for group in groups if group["order"] == "zeroth"]


@torch.no_grad()
def curvatures(
    model: nn.Module, batch: dict[str, Tensor], distribution: Any, args: Any
) -> dict[str, float]:
    """Return the mean and the tails of vᵀHv."""
    (group,) = base_groups(model)
    view = Perturbation(model, group["params"], group["tensors"], seed=1, distribution=distribution)
    found = []
    centre = float(objective_loss(model, batch))
    for k in range(args.curvatures):
        ends = []
        for scale in (args.radius, -args.radius):
            ends.append(view.value_at(lambda: float(objective_loss(model, batch)), scale, step=k))
        found.append(
            ((ends[0] - ends[1]) / (2 * args.radius), (sum(ends) - 2 * centre) / args.radius**2)
        )
    s, c = torch.tensor(found, dtype=torch.float64).T
    return {
        "mean": c.mean().item(),
        "spread": (c.std() / c.mean()).item(),
        "tail": (c.max() / c.mean()).item(),
        "tau_over_mean": ((s**2 * c).mean() / ((s**2).mean() * c.mean())).item(),
    }


def train_adapter(model: nn.Module, collator: Any, rows: Any, num_steps: int) -> None:
    groups = param_groups(model, "fo-peft", adapter_lr=1e-3)
    optimizer = HybridOptimizer(groups, model, optimizer="AdamW")
    for start in range(0, 16 * num_steps, 16):
        batch = collator(rows[-start - 16 : len(rows) - start])
        loss = optimizer.step(lambda batch=batch: objective_loss(model, batch))
    print(f"{num_steps} adapter steps: loss of the last batch {float(loss):.3f}", flush=True)


def estimate(model: nn.Module, batch: dict[str, Tensor], args: Any, **options: Any) -> Any:
    """Return the squared norm and the cosine of each estimate."""
    blocks = split_parameters(model)
    model.requires_grad_(True)
    model.zero_grad(set_to_none=True)
    objective_losses(model, batch)[0].backward()
    exact = {name: p.grad for name, p in blocks.base.items() if p.grad is not None}
    for parameter in model.parameters():
        parameter.grad = None
    size = math.sqrt(math.fsum(float(g.double().square().sum()) for g in exact.values()))
    groups = base_groups(model)
    optimizer = HybridOptimizer(groups, model, eps=args.eps, self_check=False, **options)
    found = []
    for _ in range(args.steps):
        optimizer.step(lambda: shares(model, batch))
        report = optimizer.last_step
        # The estimate is the update of a weight that is 0, at the rate −1.
        update = Update(report.step, report.projected_grad, -1.0, 0.0)
        square = product = 0.0
        for name, g in exact.items():
            drawn = torch.zeros_like(g)
            update.apply(
                [drawn],
                [blocks.base_index[name]],
                seed=optimizer.seed,
                distribution=optimizer.options.distribution,
                rank_one=optimizer.rank_one,
            )
            square += float(drawn.double().square().sum())
            product += float((drawn.double() * g.double()).sum())
        found.append((square / size**2, product / (math.sqrt(square) * size)))
    return found, size


def measure(model: nn.Module, collator: Any, rows: Any, args: Any) -> list[dict[str, Any]]:
    """Print both tables and return their rows."""
    kept = []
    print("rows  directions        E|g^|2 / |g|2      (se)     cosine      (se)   |g|", flush=True)
    for num_rows in args.rows:
        batch = collator(rows[:num_rows])
        for name, options in VARIANTS.items():
            found, size = estimate(model, batch, args, **options)
            columns = torch.tensor(found, dtype=torch.float64)
            mean, error = columns.mean(0), columns.std(0) / len(found) ** 0.5
            print(
                f"{num_rows:4d}  {name:15s} {mean[0]:14.4g} {error[0]:9.2g} {mean[1]:10.3g} "
                f"{error[1]:9.2g} {size:6.3g}",
                flush=True,
            )
            row = {"rows": num_rows, "directions": name, "norm_of_gradient": size}
            row |= {"ratio": mean[0].item(), "ratio_se": error[0].item()}
            kept.append(row | {"cosine": mean[1].item(), "cosine_se": error[1].item()})
    print("rows  directions       mean c   spread   tail   τ / c", flush=True)
    for num_rows in args.rows[:2]:
        batch = collator(rows[:num_rows])
        for name in ("gaussian", "rademacher", "rank-one"):
            bent = curvatures(model, batch, name, args)
            print(
                f"{num_rows:4d}  {name:14s} {bent['mean']:8.3g} {bent['spread']:8.2f} "
                f"{bent['tail']:6.2f} {bent['tau_over_mean']:7.2f}",
                flush=True,
            )
            kept.append({"rows": num_rows, "curvature": name, **bent})
    return kept


def main() -> None:
    args = parse()
    model, collator, rows = load(args.model)
    if args.adapter_steps:
        torch.manual_seed(0)
        model = create_adapter(model, "lora", head=HEADS[args.model]).eval()
    tables = {"before": measure(model, collator, rows, args)}
    if args.adapter_steps:
        train_adapter(model, collator, rows, args.adapter_steps)
        tables["after"] = measure(model, collator, rows, args)
    if args.json is not None:
        kept = {"model": args.model, "adapter_steps": args.adapter_steps, **tables}
        args.json.write_text(json.dumps(kept, indent=1) + "\n")


if __name__ == "__main__":
    main()
