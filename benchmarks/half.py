"""Compare zofo in bfloat16 and the published in-place scheme with float32 on a real task.

The task is full fine-tuning of SmolLM2-135M on rotten-tomatoes by central loss differences (zo-ft,
MeZO's setting). Three arms use the same batches, directions, eps and rate:

    fp32         zofo in float32; its seeds make the band of seed noise
    bf16         zofo in bfloat16: only stochastically rounded updates write weights
    published    in bfloat16 as MeZO does it, in place and rounded to nearest:
                 w += eps v, w -= 2 eps v, w += eps v, w -= lr s v

A seed sets the directions and the order of the batches. The script writes every finished run to
benchmarks/results/half.json at once, so an interrupted command continues where it stopped. Once all
runs are there, it only draws.

    python benchmarks/half.py                   the missing runs, then docs/figures/half.svg
    python benchmarks/half.py --max-runs 1      at most one of them

References:
    Malladi et al., "Fine-Tuning Language Models with Just Forward Passes", 2023, algorithm 1.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import torch
from svg import Series, line_chart
from torch import Tensor, nn

from zofo import HybridOptimizer, ReshufflingSampler, param_groups, split_parameters
from zofo.models.loading import load_model
from zofo.noise.combine import combine
from zofo.scoring.evaluate import evaluate
from zofo.tasks.encode import Collator, Encoded, Encoder
from zofo.tasks.load import load_splits
from zofo.tasks.losses import objective_loss
from zofo.tasks.spec import TaskSpec

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results" / "half.json"
FIGURE = ROOT / "docs" / "figures" / "half.svg"
DTYPES = {"fp32": "float32", "bf16": "bfloat16", "published": "bfloat16"}
SETTING = {
    "steps": 300,
    "batch": 4,
    "max_length": 24,
    "lr": 2e-6,
    "eps": 3e-3,
    "distribution": "rademacher",
    "eval_every": 50,
    "num_dev": 64,
}


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--arms", nargs="+", default=list(DTYPES), choices=list(DTYPES))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    for name, value in SETTING.items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=type(value), default=value)
    parser.add_argument("--max-runs", type=int, help="stop after so many new runs")
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--figure", type=Path, default=FIGURE)
    return parser.parse_args()


class Published:
    """MeZO's step: every change in place, in the dtype of the weights, rounded to nearest.

    Each change is computed in float32 and rounded once, which is more exact than the published
    code.
    """

    def __init__(self, model: nn.Module, args: argparse.Namespace, seed: int) -> None:
        blocks = split_parameters(model)
        self.weights = [(blocks.base_index[name], p) for name, p in blocks.base.items()]
        self.args, self.seed = args, seed

    def _add(self, scale: float, step: int) -> None:
        for index, weight in self.weights:
            combine(
                weight,
                (scale,),
                seed=self.seed,
                step=step,
                tensor=index,
                distribution=self.args.distribution,
            )

    @torch.no_grad()
    def step(self, closure: Callable[[], Tensor], step: int) -> float:
        """Perturb, evaluate, restore and move. Return the scalar."""
        eps = self.args.eps
        self._add(eps, step)
        ahead = float(closure())
        self._add(-2 * eps, step)
        behind = float(closure())
        self._add(eps, step)
        scalar = (ahead - behind) / (2 * eps)
        self._add(-self.args.lr * scalar, step)
        return scalar


class Ours:
    """The same step by zofo."""

    def __init__(self, model: nn.Module, args: argparse.Namespace, seed: int) -> None:
        self.optimizer = HybridOptimizer(
            param_groups(model, "zo-ft", base_lr=args.lr),
            model,
            eps=args.eps,
            estimator="central",
            distribution=args.distribution,
            seed=seed,
        )

    def step(self, closure: Callable[[], Tensor], step: int) -> float:
        """Measure and move. Return the scalar."""
        self.optimizer.measure(closure, None)  # The central difference needs no loss at the centre.
        self.optimizer.step()
        assert self.optimizer.last_step is not None
        return self.optimizer.last_step.projected_grad[0]


def batches(
    rows: list[Encoded], collator: Collator, size: int, seed: int
) -> Iterator[dict[str, Any]]:
    sampler = ReshufflingSampler(len(rows), seed=seed)
    while True:
        order = list(sampler)
        for start in range(0, len(order) - size + 1, size):
            yield collator([rows[i] for i in order[start : start + size]])


def train(arm: str, seed: int, args: argparse.Namespace) -> dict[str, Any]:
    """Run one training.

    Return its dev loss, how far the weights moved, and the size of the scalars.
    """
    began = time.perf_counter()
    model, tokenizer = load_model(args.model, dtype=DTYPES[arm])
    encode = Encoder(tokenizer, max_length=args.max_length)
    collator = Collator(tokenizer.pad_token_id)
    splits = load_splits(TaskSpec(name="rotten-tomatoes", num_dev=args.num_dev))
    rows, dev = [[encode(row) for row in part] for part in (splits.train, splits.dev)]
    model.eval()
    model.requires_grad_(False)
    start = [p.clone() for p in model.parameters()]
    method = (Published if arm == "published" else Ours)(model, args, seed)
    source = batches(rows, collator, args.batch, seed)
    curve, scalars = [], []
    for step in range(args.steps + 1):
        if step % args.eval_every == 0:
            scores = evaluate(model, dev, collator)
            curve.append([step, round(scores.loss, 4)])
            print(arm, seed, *curve[-1], f"{time.perf_counter() - began:.0f} s", flush=True)
        if step < args.steps:
            batch = next(source)
            scalars.append(method.step(lambda batch=batch: objective_loss(model, batch), step))
    pairs = list(zip(model.parameters(), start, strict=True))
    moved = math.fsum(float((p.float() - q.float()).norm()) ** 2 for p, q in pairs)
    size = math.fsum(float(q.float().norm()) ** 2 for _, q in pairs)
    return {
        "curve": curve,
        "moved": round(math.sqrt(moved / size), 6),
        "rms_scalar": round(math.sqrt(math.fsum(s * s for s in scalars) / len(scalars)), 3),
    }


def curves_of(kept: dict[str, Any], arm: str) -> list[list[tuple[float, float]]]:
    return [
        [(step, loss) for step, loss in run["curve"]]
        for key, run in sorted(kept["runs"].items())
        if key.startswith(f"{arm}/")
    ]


def seed_noise(curves: list[list[tuple[float, float]]]) -> list[tuple[float, float, float]]:
    """Return (step, low, high), the mean ± two standard deviations over the seeds."""
    noise = []
    for points in zip(*curves, strict=True):
        losses = [loss for _, loss in points]
        spread = 2 * stdev(losses) if len(losses) > 1 else 0.0
        noise.append((points[0][0], fmean(losses) - spread, fmean(losses) + spread))
    return noise


def gaps_of(
    curves: dict[str, list[list[tuple[float, float]]]], arm: str
) -> list[tuple[float, float]]:
    """Return the mean gap to float32, and two standard errors of it, per evaluation.

    The evaluation before the first step is left out.
    """
    gaps = []
    for ours, theirs in zip(
        zip(*curves[arm], strict=True), zip(*curves["fp32"], strict=True), strict=True
    ):
        samples = [[loss for _, loss in points] for points in (ours, theirs)]
        squares = [stdev(s) ** 2 / len(s) if len(s) > 1 else math.nan for s in samples]
        gaps.append((fmean(samples[0]) - fmean(samples[1]), 2 * math.sqrt(sum(squares))))
    return gaps[1:]


def draw(kept: dict[str, Any], figure: Path) -> None:
    """Print the results and draw the figure."""
    curves = {arm: curves_of(kept, arm) for arm in DTYPES}
    if not all(curves.values()):
        print("not every arm has a run yet: no figure")
        return
    noise = seed_noise(curves["fp32"])
    print(f"last step, loss on dev; seed noise of fp32 {noise[-1][1]:.3f} to {noise[-1][2]:.3f}")
    for arm in DTYPES:
        runs = [run for key, run in sorted(kept["runs"].items()) if key.startswith(f"{arm}/")]
        points = [
            low <= loss <= high
            for curve in curves[arm]
            for (_, loss), (_, low, high) in list(zip(curve, noise, strict=True))[1:]
        ]
        print(
            f"  {arm:<10} {', '.join(f'{curve[-1][1]:.3f}' for curve in curves[arm])}; "
            f"{sum(points)} of {len(points)} points within the noise; "
            f"weights moved {fmean(run['moved'] for run in runs):.2%}; "
            f"rms scalar {fmean(run['rms_scalar'] for run in runs):.1f}"
        )
        gaps = ", ".join(f"{gap:+.3f} ± {error:.3f}" for gap, error in gaps_of(curves, arm))
        print(f"             mean beside float32's, ± two standard errors: {gaps}")
    setting = kept["setting"]
    chart = line_chart(
        f"{setting['model']}, full fine-tuning by loss differences: half precision",
        "step",
        "loss on dev",
        [
            Series("float32 (seeds, ± 2 sd)", curves["fp32"], noise),
            Series("bfloat16, zofo", curves["bf16"]),
            Series("bfloat16, in place", curves["published"]),
        ],
    )
    figure.parent.mkdir(parents=True, exist_ok=True)
    figure.write_text(chart)


def main() -> None:
    args = parse()
    setting = {"model": args.model, **{name: getattr(args, name) for name in SETTING}}
    kept = json.loads(args.results.read_text()) if args.results.exists() else {}
    if kept.get("setting") != setting:
        kept = {"setting": setting, "runs": {}}
    missing = [(a, s) for s in args.seeds for a in args.arms if f"{a}/{s}" not in kept["runs"]]
    for arm, seed in missing[: args.max_runs]:
        kept["runs"][f"{arm}/{seed}"] = train(arm, seed, args)
        args.results.parent.mkdir(exist_ok=True)
        args.results.write_text(json.dumps(kept) + "\n")
    draw(kept, args.figure)


if __name__ == "__main__":
    main()
