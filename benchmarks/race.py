"""Compare how many forward passes two directions need to the same dev loss.

    mezo     one Gaussian direction a step, central difference, as MeZO       2 forwards a step
    paper    hybrid, one Gaussian direction a step, forward difference        3 forward-equivalents
    rows     a rank-one direction for each row, forward difference            2, hybrid 3

The first contender runs for `--cost` forward-equivalents. The second one runs until it reaches the
first one's last dev loss. Each contender has the best rate of its grid, chosen by the lowest dev
loss on the first seed. Rows come from rotten-tomatoes. The JSON file holds every finished run, and
a second call continues with the others.

    python benchmarks/race.py --json race-base.json
    python benchmarks/race.py --prompt --json race-prompt.json
    python benchmarks/race.py --only '*_proj*' --json race-linear.json
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from zofo import HybridOptimizer, param_groups
from zofo.models.adapter_kinds import KINDS
from zofo.models.adapters import create_adapter
from zofo.models.loading import load_model
from zofo.optim.generators import GeneratorState
from zofo.tasks.encode import Collator, Encoded, Encoder
from zofo.tasks.load import load_splits
from zofo.tasks.losses import objective_losses
from zofo.tasks.spec import TaskSpec

OPTIONS: dict[str, dict[str, Any]] = {
    "mezo": {"distribution": "gaussian", "estimator": "central"},
    "paper": {"distribution": "gaussian"},
    "rows": {"distribution": "rank-one", "directions_per_step": "rows"},
}
RATES = {"mezo": [5e-5], "paper": [1e-4], "rows": [6e-4, 1.2e-3]}


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--prompt", action="store_true", help="hybrid with a prompt of 10 tokens")
    parser.add_argument("--rows", type=int, default=32)
    parser.add_argument("--tokens", type=int, default=20, help="longer rows are left out")
    parser.add_argument("--dev", type=int, default=96, help="dev rows")
    parser.add_argument("--cost", type=int, default=160)
    parser.add_argument("--every", type=int, default=16, help="forwards between two dev losses")
    parser.add_argument("--norm-rate", type=float, help="rate of norms in rows; default: the same")
    parser.add_argument("--only", default="*", help="pattern of the base weights that move")
    parser.add_argument("--rates", type=float, nargs="+", help="grid of rows")
    parser.add_argument("--first-rates", type=float, nargs="+", help="grid of the first contender")
    parser.add_argument("--until", type=float, help="end rows at this dev loss instead")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--json", type=Path, required=True)
    return parser.parse_args()


class Race:
    """The runs so far, and the data that they share."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args = args
        self.runs: list[dict[str, Any]] = []
        if args.json.exists():
            self.runs = json.loads(args.json.read_text())["runs"]
        _, tokenizer = load_model(args.model, head="causal-lm")
        encode = Encoder(tokenizer, head="causal-lm", max_length=128)
        splits = load_splits(TaskSpec(name="rotten-tomatoes", num_train=7000))
        rows = [encode(row) for row in splits.train]
        short = [row for row in rows if max(map(len, row.rows)) <= args.tokens]
        self.dev, self.train = short[: args.dev], short[args.dev :]
        self.collator = Collator(tokenizer.pad_token_id)
        print(f"{len(short)} rows of at most {args.tokens} tokens", flush=True)

    def run(self, name: str, rate: float, seed: int, until: float = 0.0) -> dict[str, Any]:
        """Return a finished run, or train it until its dev loss is at most `until`."""
        for run in self.runs:
            if (run["name"], run["rate"], run["seed"]) == (name, rate, seed):
                return run
        args = self.args
        model, _ = load_model(args.model, head="causal-lm")
        torch.manual_seed(seed)
        if args.prompt:
            model = create_adapter(model, "prompt")
        model.eval()
        method = "hybrid" if args.prompt else "zo-ft"
        rates = {args.only: rate}
        if name == "rows" and args.norm_rate is not None:
            rates = {"*norm*": args.norm_rate, args.only: rate}
        groups = param_groups(model, method, base_lr=rates, adapter_lr=KINDS["prompt"].lr)
        optimizer = HybridOptimizer(
            groups, model, optimizer="AdamW", seed=seed, self_check=False, **OPTIONS[name]
        )
        generator = torch.Generator().manual_seed(seed)
        order: list[int] = []
        curve, cost, due = [(0, self.dev_loss(model))], 0, args.every
        while cost < args.cost and curve[-1][1] > until:
            if len(order) < args.rows:
                order = torch.randperm(len(self.train), generator=generator).tolist()
            rows = [self.train[order.pop()] for _ in range(args.rows)]
            self.step(optimizer, model, rows, name)
            cost += 3 if args.prompt else 2
            if cost >= due or cost >= args.cost:
                curve.append((cost, self.dev_loss(model)))
                due += args.every
                print(f"{name} {rate:g} seed {seed}: {cost} {curve[-1][1]:.4f}", flush=True)
                if not curve[-1][1] < 2 * curve[0][1]:
                    break
        run = {"name": name, "rate": rate, "seed": seed, "curve": curve}
        self.runs.append(run)
        self.args.json.write_text(json.dumps({"runs": self.runs}, indent=1) + "\n")
        return run

    def step(self, optimizer: HybridOptimizer, model: Any, rows: list[Encoded], name: str) -> None:
        """Take a step on a batch."""
        batch = self.collator(rows)

        def shares() -> Tensor:
            loss, values = objective_losses(model, batch)  # [], and [rows] without a graph
            return (values + (loss - loss.detach())) / len(values)

        if name == "mezo":  # MeZO evaluates no unperturbed loss.
            optimizer.measure(shares, None, GeneratorState.capture())
            optimizer.step()
        else:
            optimizer.step(shares)

    @torch.no_grad()
    def dev_loss(self, model: Any) -> float:
        """Return the mean loss of the dev rows."""
        size = self.args.rows
        parts = [self.dev[i : i + size] for i in range(0, len(self.dev), size)]
        losses = [objective_losses(model, self.collator(part))[1] for part in parts]
        return float(torch.cat(losses).mean())


def lowest(run: dict[str, Any]) -> float:
    return min(loss for _, loss in run["curve"])


def main() -> None:
    args = parse()
    race = Race(args)
    first = "paper" if args.prompt else "mezo"
    rates = args.first_rates or RATES[first]
    chooser = args.seeds[0]
    best = min(rates, key=lambda rate: race.run(first, rate, chooser)["curve"][-1][1])
    ends = {seed: race.run(first, best, seed)["curve"][-1][1] for seed in args.seeds}
    if args.until is not None:
        ends = dict.fromkeys(ends, args.until)
    # The second contender's grid stops at the first one's end, because only the way there counts.
    grid = {
        rate: race.run("rows", rate, chooser, ends[chooser]) for rate in args.rates or RATES["rows"]
    }

    def cost_to(run: dict[str, Any], loss: float) -> float:
        return min((cost for cost, value in run["curve"] if value <= loss), default=float("inf"))

    own = min(grid, key=lambda rate: (cost_to(grid[rate], ends[chooser]), lowest(grid[rate])))
    print(f"{first} at {best:g}, rows at {own:g}")
    print("seed  dev loss of the first   rows needs   of")
    for seed in args.seeds:
        run = race.run("rows", own, seed, ends[seed])
        print(f"{seed:4d}  {ends[seed]:20.4f}  {cost_to(run, ends[seed]):11.0f}  {args.cost:4d}")


if __name__ == "__main__":
    main()
