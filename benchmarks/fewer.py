"""Measure what a forward-equivalent buys: variants that spend fewer or more forwards on the base.

Every variant trains until it has spent the same number of forward-equivalents. A step of FO-PEFT
costs 2, and a step of the default hybrid costs 3. The rates are constant, there is no dropout, and
all variants see the same rows in the same order. The base's rates are the given ones times
`num_directions`, because the mean of K estimates has a K-th of the variance. The script takes the
rate with the lowest dev loss, averaged over the first `--choose` seeds. Losses are those after the
last step, on rows that no step sees.

    python benchmarks/fewer.py --json benchmarks/results/fewer.json
    python benchmarks/fewer.py --estimate minilm --json benchmarks/results/fewer.json
    python benchmarks/fewer.py --rounding smollm2-135m

The script skips every run that the file holds. `--estimate` measures the quality of the variants'
estimates at one point of a run. `--rounding` compares two losses of a part of the batch: the one
read from the forward pass over the whole batch, and the one evaluated on the part alone.
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
    parser.add_argument("--adapter", default="prompt", help="lora, prefix or prompt")
    parser.add_argument("--tokens", type=int, default=1, help="length of prefix or prompt")
    parser.add_argument("--task", default="rotten-tomatoes")
    parser.add_argument("--adapter-lr", type=float, default=1e-3)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--max-length", type=int, default=32, help="tokens a row")
    parser.add_argument("--budget", type=float, default=240, help="forward-equivalents a run")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--choose", type=int, default=1, help="seeds that choose the rate")
    parser.add_argument("--rates", type=float, nargs="+", default=[3e-4, 1e-3])
    parser.add_argument("--variants", nargs="+", default=list(VARIANTS), choices=VARIANTS)
    parser.add_argument("--rows", type=int, nargs=3, default=(1000, 200, 400))
    parser.add_argument("--json", type=Path, help="where runs are kept")
    parser.add_argument("--estimate", metavar="MODEL", help="measure the estimates instead")
    parser.add_argument("--warm-up", type=int, default=40, help="FO-PEFT steps before --estimate")
    parser.add_argument("--seed", type=int, default=0, help="of --estimate")
    parser.add_argument("--samples", type=int, default=48, help="batches of --estimate")
    parser.add_argument("--rounding", metavar="MODEL", help="measure the rounding instead")
    return parser.parse_args()


def config_of(args: argparse.Namespace, variant: str, rate: float, seed: int) -> Any:
    from zofo.config.load import load_config

    train, dev, test = args.rows
    adapter: dict[str, Any] = {"type": args.adapter}
    if args.adapter != "lora":
        adapter["num_virtual_tokens"] = args.tokens
    values = {
        "model": args.model,
        "adapter": adapter,
        "task": {
            "name": args.task,
            "num_train": train,
            "num_dev": dev,
            "num_test": test,
            "max_length": args.max_length,
        },
        "base_lr": rate,
        "adapter_lr": args.adapter_lr,
        "batch_size": args.batch_size,
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

    from zofo.run.prepare import prepare

    prepared = prepare(config)
    model: Any = prepared.model
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    return prepared, model.train()


def train(config: Any, budget: float) -> dict[str, float]:
    import torch

    from zofo import HybridOptimizer, ZerothLoss, param_groups
    from zofo.optim.batch_part import num_rows_of
    from zofo.optim.methods import METHODS
    from zofo.scoring.evaluate import evaluate
    from zofo.tasks.losses import first_examples, objective_losses

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

        def part(batch: Any = batch) -> ZerothLoss:
            examples, share = first_examples(batch, num_first)
            assert shares is not None
            known = shares[:num_first].mean()
            return ZerothLoss(lambda: objective_losses(model, examples)[1].mean(), share, known)

        optimizer.step(closure, part if num_first < config.batch_size else None)
    seconds = time.perf_counter() - began
    found = {"steps": optimizer.step_count, "seconds": round(seconds, 1)}
    for name in ("dev", "test"):
        scores = evaluate(model, prepared.rows[name], prepared.collator, kind="classification")
        found[f"{name}_loss"] = round(scores.loss, 5)
        found[f"{name}_accuracy"] = round(scores.accuracy, 4)
    return found


def setting_of(args: argparse.Namespace) -> str:
    adapter = args.adapter if args.adapter == "lora" else f"{args.adapter}-{args.tokens}"
    return (
        f"{args.model} {adapter} {args.adapter_lr:g} {args.task} "
        f"batch {args.batch_size} x {args.max_length} budget {args.budget:g} "
        f"rows {' '.join(map(str, args.rows))}"
    )


def run_all(args: argparse.Namespace) -> None:
    kept = read(args.json)
    runs: dict[str, Any] = kept.setdefault(setting_of(args), {})

    def done(variant: str, rate: float, seed: int) -> dict[str, float]:
        name = f"{variant} rate {rate:g} seed {seed}"
        if name not in runs:
            runs[name] = train(config_of(args, variant, rate, seed), args.budget)
            print(name, runs[name], flush=True)
            write(args.json, kept)
        return runs[name]

    def on_dev(variant: str, rate: float) -> float:
        return fmean(done(variant, rate, seed)["dev_loss"] for seed in range(args.choose))

    table: dict[str, tuple[float, list[dict[str, float]]]] = {}
    for variant in args.variants:
        per_direction = VARIANTS[variant].get("num_directions", 1)
        rates = [0.0] if variant == "fo-peft" else [rate * per_direction for rate in args.rates]
        best = min(rates, key=lambda rate: on_dev(variant, rate))
        table[variant] = best, [done(variant, best, seed) for seed in range(args.seeds)]
    reference = [run["test_loss"] for run in table.get("default", next(iter(table.values())))[1]]
    print(f"{setting_of(args)}, {args.seeds} seed(s): test loss, mean [least, largest], and above")
    print("the default's seed by seed; dev loss; accuracy")
    for variant, (rate, found) in table.items():
        losses = [run["test_loss"] for run in found]
        apart = [a - b for a, b in zip(losses, reference, strict=True)]
        print(
            f"| {variant} | {found[0]['steps']} | {rate:g} | {spread(losses, '.3f')} | "
            f"{spread(apart, '+.3f')} | {fmean(run['dev_loss'] for run in found):.3f} | "
            f"{fmean(run['test_accuracy'] for run in found):.3f} |"
        )


def spread(values: list[float], digits: str) -> str:
    """Return the mean, the smallest and the largest value as text."""
    mean, least, largest = (format(v, digits) for v in (fmean(values), min(values), max(values)))
    return f"{mean} [{least}, {largest}]"


def read(path: Path | None) -> dict[str, Any]:
    return json.loads(path.read_text()) if path and path.exists() else {}


def write(path: Path | None, kept: dict[str, Any]) -> None:
    if path:
        path.write_text(json.dumps(kept, indent=1) + "\n")


def estimate(args: argparse.Namespace) -> None:
    """Measure the value of each variant's estimates per forward-equivalent, at its best rate.

    A step of rate a along g' = mean_k s_k v_k, with E[g'] = g, lowers the loss by a |g|^2 - a^2
    E[g'Hg'] / 2, which is at most |g|^4 / (2 E[g'Hg']). With far more weights than directions,
    E[g'Hg'] is E|g_rows|^2 tr(H) / K plus the forward difference's own error. Here g_rows is the
    gradient of the rows that the difference uses. The function measures at one point: gradients of
    many batches, central differences, and v'Hv, whose mean is tr(H). The last two use the same
    three losses.
    """
    import torch

    from zofo import HybridOptimizer, param_groups
    from zofo.optim.blocks import split_parameters
    from zofo.tasks.losses import objective_losses

    args.model = args.estimate
    config = config_of(args, "default", 0.0, args.seed)
    prepared, model = model_without_dropout(config)
    optimizer = HybridOptimizer(
        param_groups(model, "hybrid", base_lr=0.0, adapter_lr=config.adapter_lr),
        model,
        optimizer="AdamW",
        optimizer_kwargs={"weight_decay": 0.0},
        # Only the first step takes a difference, and it moves nothing.
        base_every=args.warm_up + 1,
        self_check=False,
    )
    stream, eps = batches(config, prepared), config.eps
    for _ in range(args.warm_up):
        batch = next(stream)
        optimizer.step(lambda batch=batch: objective_losses(model, batch)[0])

    def loss_of(batch: Any) -> Any:
        return objective_losses(model, batch)[0]

    stream = batches(config, prepared)
    sampled = [next(stream) for _ in range(args.samples)]
    view = optimizer.perturbation.at  # type: ignore[union-attr]
    errors, differences, curvatures = [], [], []
    for step, batch in enumerate(sampled[: args.samples // 3]):
        with torch.no_grad():
            loss = float(loss_of(batch).double())
            with view(eps, step=step):
                ahead = float(loss_of(batch).double())
            with view(-eps, step=step):
                behind = float(loss_of(batch).double())
        differences.append(((ahead - behind) / (2 * eps)) ** 2)
        curvatures.append((ahead - 2 * loss + behind) / eps**2)
        errors.append((curvatures[-1] * eps / 2) ** 2)

    base = list(split_parameters(model).base.values())
    total, squares = [torch.zeros_like(p) for p in base], []
    for p in base:
        p.requires_grad_(True)
    for batch in sampled:
        gradients = torch.autograd.grad(loss_of(batch), base, allow_unused=True)
        found = [g for g in gradients if g is not None]
        squares.append(sum(float(g.double().square().sum()) for g in found))
        for whole, g in zip(total, gradients, strict=True):
            if g is not None:
                whole += g
    n, of_batch = len(sampled), fmean(squares)
    of_sum = sum(float(t.double().square().sum()) for t in total)
    # Only pairs of different batches count, so the estimate is unbiased.
    exact = (of_sum - n * of_batch) / (n * (n - 1))
    error = fmean(errors) / fmean(differences)
    kept = read(args.json)
    setting = setting_of(args).split(" budget")[0]
    key = f"estimate {setting}, {args.warm_up} steps, {n} batches, seed {args.seed}"
    gains = {
        name: base_gain(name, exact, of_batch, error) for name in VARIANTS if name != "fo-peft"
    }
    kept[key] = {
        "squared_gradient": exact,
        "squared_gradient_of_a_batch": of_batch,
        "squared_error_of_forward_difference": error,
        "trace": fmean(curvatures),
        "trace_standard_error": stdev(curvatures) / len(curvatures) ** 0.5,
        "gain": {name: round(gain / gains["default"], 3) for name, gain in gains.items()},
    }
    write(args.json, kept)
    print(key, json.dumps(kept[key], indent=1))


def base_gain(variant: str, exact: float, of_batch: float, error: float) -> float:
    """Return |g|^4 / E[g'Hg'] per forward-equivalent, up to a factor that all variants share.

    Args:
        variant: name of the variant.
        exact: |g|^2.
        of_batch: E|g_batch|^2.
        error: squared error of the forward difference, relative to E s^2.
    """
    options = VARIANTS[variant]
    fraction, every = options.get("base_batch_fraction", 1.0), options.get("base_every", 1)
    directions, central = options.get("num_directions", 1), "estimator" in options
    second_moment = exact + (of_batch - exact) / fraction + (0.0 if central else error * of_batch)
    cost = 2 + directions * (2 if central else fraction) / every
    return directions / every * exact**2 / second_moment / cost


def rounding(args: argparse.Namespace) -> None:
    """Measure |f(x; part) from the whole batch − f(x; part) alone|, relative to eps |s|."""
    import torch

    from zofo import HybridOptimizer, param_groups
    from zofo.tasks.losses import first_examples, objective_losses

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
    elif arguments.estimate:
        estimate(arguments)
    else:
        run_all(arguments)
