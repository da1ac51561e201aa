"""Measure how far zeroth-order estimates of a batch's gradient lie from it.

    ratio  = E ‖ĝ‖² / ‖g‖²            1 is exact; d for one direction and rows that agree
    cosine = mean of ĝ · g / (‖ĝ‖ ‖g‖)

autograd computes g, the gradient of the batch's loss with respect to all base weights, in float32.
The estimates are those of a step: independent signs, rank-one directions, and rank-one directions
that the rows share. The rows come from rotten-tomatoes.

    python benchmarks/estimate.py --model smollm2-135m --rows 8 32 --steps 6
    python benchmarks/estimate.py --model minilm --rows 8 32 128 --steps 30
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

from zofo import HybridOptimizer, param_groups, split_parameters
from zofo.optim.trajectory import Update
from zofo.tasks.losses import objective_losses

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
    parser.add_argument("--json", type=Path)
    return parser.parse_args()


def shares(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    values = objective_losses(model, batch)[1]  # [rows]
    return values / len(values)


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
    groups = param_groups(model, "zo-ft", base_lr=0.0)
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


def main() -> None:
    args = parse()
    model, collator, rows = load(args.model)
    print("rows  directions        E|g^|2 / |g|2      (se)     cosine      (se)   |g|", flush=True)
    table = []
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
            table.append(row | {"ratio": mean[0].item(), "cosine": mean[1].item()})
    if args.json is not None:
        args.json.write_text(json.dumps({"model": args.model, "table": table}, indent=1) + "\n")


if __name__ == "__main__":
    main()
