"""What a forward-equivalent buys: ways to spend fewer or more forwards on the base.

Every variant trains until it has spent the same number of forward-equivalents (FO-PEFT's step costs
2, the default hybrid's 3), with constant rates and without dropout, on the same rows in the same
order. The base's rate is chosen by a variant's dev loss on seed 0, among the rates given; the other
seeds take that rate. Losses are those after the last step, on rows that no step sees.

    python benchmarks/fewer.py --json benchmarks/results/fewer.json
    python benchmarks/fewer.py --model smollm2-135m --adapter prompt --adapter-lr 1e-2 --budget 150
        --seeds 1 --rates 1e-5 3e-5 --variants fo-peft default base_every=2 --json FILE
    python benchmarks/fewer.py --rounding smollm2-135m

Runs that the file holds are not made again. `--rounding` measures how far the loss of a part of the
batch, read from the pass over all of it, is from the same rows' loss evaluated alone.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from statistics import fmean, median, stdev
from typing import Any

VARIANTS: dict[str, dict[str, Any]] = {
    "fo-peft": {"method": "fo-peft"},
    "default": {},
    "base_every=2": {"base_every": 2},
    "base_every=4": {"base_every": 4},
    "fraction=0.5": {"base_batch_fraction": 0.5},
    "fraction=0.25": {"base_batch_fraction": 0.25},
    "directions=2": {"num_directions": 2},
    "directions=4": {"num_directions": 4},
    "central": {"estimator": "central"},
}


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", default="minilm")
    parser.add_argument("--adapter", default="lora")
    parser.add_argument("--task", default="rotten-tomatoes")
    parser.add_argument("--adapter-lr", type=float, default=1e-3)
    parser.add_argument("--budget", type=float, default=240, help="forward-equivalents a run")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--rates", type=float, nargs="+", default=[1e-5, 3e-5, 1e-4])
    parser.add_argument("--variants", nargs="+", default=list(VARIANTS), choices=VARIANTS)
    parser.add_argument("--rows", type=int, nargs=3, default=(1000, 200, 400))
    parser.add_argument("--json", type=Path, help="where runs are kept")
    parser.add_argument("--rounding", metavar="MODEL", help="measure the rounding instead")
    return parser.parse_args()


def config_of(args: argparse.Namespace, variant: str, rate: float, seed: int) -> Any:
    from zofo.config import load_config

    train, dev, test = args.rows
    values = {
        "model": args.model,
        "adapter": args.adapter,
        "task": {
            "name": args.task,
            "num_train": train,
            "num_dev": dev,
            "num_test": test,
            "max_length": 48,
        },
        "base_lr": rate,
        "adapter_lr": args.adapter_lr,
        "seed": seed,
        **VARIANTS[variant],
    }
    return load_config(values=values)


def batches(config: Any, prepared: Any) -> Iterator[dict[str, Any]]:
    from zofo import ReshufflingSampler

    rows = prepared.rows["train"]
    sampler = ReshufflingSampler(len(rows), seed=config.seed)
    while True:
        order = list(sampler)
        for i in range(0, len(order) - config.batch_size + 1, config.batch_size):
            yield prepared.collator([rows[j] for j in order[i : i + config.batch_size]])


def model_without_dropout(config: Any) -> tuple[Any, Any]:
    from torch import nn

    from zofo.run import prepare

    prepared = prepare(config)
    model: Any = prepared.model
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    return prepared, model.train()


def train(config: Any, budget: float) -> dict[str, float]:
    import torch

    from zofo import HybridOptimizer, Part, param_groups
    from zofo.evaluate import evaluate
    from zofo.methods import METHODS
    from zofo.part import num_rows_of
    from zofo.tasks.encode import first_examples, objective_losses

    prepared, model = model_without_dropout(config)
    torch.manual_seed(config.seed)
    optimizer = HybridOptimizer(
        param_groups(model, config.method, base_lr=config.base_lr, adapter_lr=config.adapter_lr),
        model,
        optimizer="AdamW",
        optimizer_kwargs={"weight_decay": 0.0},
        eps=config.eps,
        estimator=config.estimator,
        num_directions=config.num_directions,
        base_every=config.base_every,
        max_grad_norm=config.max_grad_norm,
        seed=config.seed,
        self_check=False,
    )
    gradient = METHODS[config.method].forwards_per_gradient
    num_first = num_rows_of(config.base_batch_fraction, config.batch_size)
    began, shares = time.perf_counter(), None
    stream = batches(config, prepared)
    while optimizer.step_count * gradient + optimizer.num_forwards < budget:
        batch = next(stream)

        def closure(batch: Any = batch) -> Any:
            nonlocal shares
            loss, shares = objective_losses(model, batch)
            return loss

        def part(batch: Any = batch) -> Part:
            examples, share = first_examples(batch, num_first)
            assert shares is not None
            known = shares[:num_first].mean()
            return Part(lambda: objective_losses(model, examples)[1].mean(), share, known)

        optimizer.step(closure, part if num_first < config.batch_size else None)
    seconds = time.perf_counter() - began
    found = {"steps": optimizer.step_count, "seconds": round(seconds, 1)}
    for name in ("dev", "test"):
        scores = evaluate(model, prepared.rows[name], prepared.collator, kind="classification")
        found[f"{name}_loss"] = round(scores.loss, 5)
        found[f"{name}_accuracy"] = round(scores.accuracy, 4)
    return found


def run_all(args: argparse.Namespace) -> None:
    kept = json.loads(args.json.read_text()) if args.json and args.json.exists() else {}
    setting = f"{args.model} {args.adapter} {args.task} budget {args.budget:g}"
    runs: dict[str, Any] = kept.setdefault(setting, {})

    def done(variant: str, rate: float, seed: int) -> dict[str, float]:
        name = f"{variant} rate {rate:g} seed {seed}"
        if name not in runs:
            runs[name] = train(config_of(args, variant, rate, seed), args.budget)
            print(name, runs[name], flush=True)
            if args.json:
                args.json.write_text(json.dumps(kept, indent=1) + "\n")
        return runs[name]

    table = []
    for variant in args.variants:
        rates = [0.0] if variant == "fo-peft" else args.rates
        best = min(rates, key=lambda rate: done(variant, rate, 0)["dev_loss"])
        found = [done(variant, best, seed) for seed in range(args.seeds)]
        table.append((variant, best, found))
    print(f"{setting}, {args.seeds} seed(s): mean ± sd of the test loss, mean accuracy, steps")
    reference = [run["test_loss"] for run in table[0][2]]
    for variant, rate, found in table:
        losses = [run["test_loss"] for run in found]
        spread = stdev(losses) if len(losses) > 1 else 0.0
        apart = fmean(a - b for a, b in zip(losses, reference, strict=True))
        print(
            f"| {variant} | {rate:g} | {fmean(losses):.4f} ± {spread:.4f} | {apart:+.4f} | "
            f"{fmean(run['test_accuracy'] for run in found):.3f} | {found[0]['steps']} |"
        )


def rounding(args: argparse.Namespace) -> None:
    """|f(x; part) from the whole batch − f(x; part) alone|, relative to eps |s|."""
    import torch

    from zofo import HybridOptimizer, param_groups
    from zofo.tasks.encode import first_examples, objective_losses

    args.model = args.rounding
    config = config_of(args, "default", 1e-5, 0)
    prepared, model = model_without_dropout(config)
    groups = param_groups(model, "hybrid", base_lr=0.0, adapter_lr=0.0)
    view: Callable[..., Any] = HybridOptimizer(groups, model).perturbation.at  # type: ignore[union-attr]
    stream, eps = batches(config, prepared), config.eps
    for num_first in (1, 2, 4):
        gaps, differences = [], []
        for step in range(6):
            batch = next(stream)
            examples, _ = first_examples(batch, num_first)
            with torch.no_grad():
                known = float(objective_losses(model, batch)[1][:num_first].double().mean())
                alone = float(objective_losses(model, examples)[1].double().mean())
                with view(eps, step=step):
                    ahead = float(objective_losses(model, examples)[1].double().mean())
            gaps.append(abs(known - alone))
            differences.append(abs(ahead - alone))
        scale = median(differences)
        print(
            f"{args.model}, {num_first} of {config.batch_size} rows: |gap| median "
            f"{median(gaps):.2g}, largest {max(gaps):.2g}; eps |s| median {scale:.2g}; "
            f"over it the gaps are {median(gaps) / scale:.2g} and {max(gaps) / scale:.2g}",
            flush=True,
        )


if __name__ == "__main__":
    arguments = parse()
    if arguments.rounding:
        rounding(arguments)
    else:
        run_all(arguments)
