"""Compare `auto` with a grid of 4 x 4 pairs of rates and a sweep of eps, in loss and in cost.

    python benchmarks/advisor.py --json benchmarks/results/advisor.json

A combination is a model, an adapter and a task. For each one the script runs the grid's 16 pairs
with eps 1e-3 and seed 0, and then the best pair with the other values of eps. The best dev loss of
a run decides. The script then runs the winner and `auto` with fresh seeds, so that the winner does
not profit from having been chosen on seed 0. It skips every run that the file holds, so the same
command continues after an interruption. At the end it prints a table: the dev loss of both, their
paired difference with Student's 95% interval, the spread over seeds, and the advice's cost as a
share of the grid's cost.

    python benchmarks/advisor.py --show --json benchmarks/results/advisor.json      only the table

The word "within" means one of two things: the interval of auto minus winner contains 0 or lies
below it, or the mean difference is no larger than the winner's standard deviation over seeds.
"""

from __future__ import annotations

import argparse
import itertools
import math
import shutil
import tempfile
import time
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

COMBINATIONS = (
    "minilm:lora:rotten-tomatoes",
    "minilm:lora:sst2",
    "minilm:lora:cb",
    "minilm:prompt:rotten-tomatoes",
    "smollm2-135m:lora:rotten-tomatoes",
    "smollm2-135m:prompt:rotten-tomatoes",
)
BASE_LR = (1e-6, 1e-5, 1e-4, 1e-3)
ADAPTER_LR = (1e-4, 1e-3, 1e-2, 1e-1)
EPS = (1e-4, 1e-3, 1e-2)
GRID_EPS = 1e-3


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--json", type=Path, default=Path("benchmarks/results/advisor.json"))
    parser.add_argument("--combinations", nargs="+", default=list(COMBINATIONS))
    parser.add_argument("--steps", type=int, default=120)
    parser.add_argument("--seeds", type=int, default=3, help="fresh seeds of winner and auto")
    parser.add_argument("--base-lr", type=float, nargs="+", default=list(BASE_LR))
    parser.add_argument("--adapter-lr", type=float, nargs="+", default=list(ADAPTER_LR))
    parser.add_argument("--eps", type=float, nargs="+", default=list(EPS))
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--show", action="store_true", help="only the table")
    parser.add_argument(
        "--set", nargs="*", default=[], help="of every run: task.num_dev=100 task.max_length=48"
    )
    return parser.parse_args()


class Results:
    """Finished runs by name, in a file that is written completely after each run."""

    def __init__(self, path: Path, setting: dict[str, Any]) -> None:
        from zofo.disk.files import read_json
        from zofo.errors import UserError

        self.path, self.setting = path, setting
        self.runs: dict[str, dict[str, Any]] = {}
        if path.exists():
            saved = read_json(path)
            if saved["setting"] != setting:
                raise UserError(f"{path} holds runs of {saved['setting']}; choose another --json")
            self.runs = saved["runs"]

    def add(self, name: str, run: dict[str, Any]) -> None:
        """Record a finished run."""
        from zofo.disk.files import write_json

        self.runs[name] = run
        write_json(self.path, {"setting": self.setting, "runs": self.runs})


def name_of(combination: str, rates: dict[str, Any], seed: int) -> str:
    return " ".join([combination, *(f"{k}={v}" for k, v in rates.items()), f"seed={seed}"])


def train(args: argparse.Namespace, combination: str, rates: dict[str, Any], seed: int) -> Any:
    """Run one training. Return its dev loss, its cost, and its advice."""
    from rich.console import Console

    from zofo.config.load import load_config
    from zofo.disk.files import read_json
    from zofo.errors import TrainingStoppedError
    from zofo.run.train import train as run

    model, adapter, task = combination.rsplit(":", 2)
    folder = Path(tempfile.mkdtemp(prefix="zofo-advisor-"))
    try:
        config = load_config(
            overrides=[
                f"model={model}",
                f"adapter={adapter}",
                f"task={task}",
                f"steps={args.steps}",
                f"num_threads={args.threads}",
                "measure_test=false",
                *args.set,
                *(f"{key}={value}" for key, value in rates.items()),
                f"seed={seed}",
                f"output_dir={folder / 'run'}",
            ]
        )
        found: dict[str, Any] = {"rates": rates, "seed": seed, "dev_loss": None}
        try:
            result = run(config, console=Console(quiet=True))
            summary = read_json(folder / "run" / "result.json")
            found |= {
                "dev_loss": summary["best_dev"],
                "last_dev_loss": summary["dev"]["after"]["loss"],
                "forward_equivalents": result.cost["forward_equivalents"],
                "train_s": result.cost["train_s"],
            }
        except TrainingStoppedError as error:
            found["stopped"] = str(error)
        advice = folder / "run" / "advise.json"
        if advice.exists():
            found["advice"] = read_json(advice)
        return found
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def plan(args: argparse.Namespace, results: Results, combination: str) -> Any:
    """Return the next runs of a combination as (rates, seed) pairs.

    The list is empty when it is done.
    """
    grid = [
        ({"base_lr": b, "adapter_lr": a, "eps": GRID_EPS}, 0)
        for b, a in itertools.product(args.base_lr, args.adapter_lr)
    ]
    auto = dict.fromkeys(("base_lr", "adapter_lr", "eps"), "auto")
    fresh = range(1, args.seeds + 1)
    for wanted in (
        grid,
        sweep(args, results, combination, grid),
        [(winner(args, results, combination, grid), seed) for seed in fresh],
        [(auto, seed) for seed in fresh],
    ):
        missing = [w for w in wanted if name_of(combination, *w) not in results.runs]
        if missing:
            return missing
    return []


def loss_of(results: Results, combination: str, rates: dict[str, Any], seed: int) -> float:
    run = results.runs.get(name_of(combination, rates, seed), {})
    loss = run.get("dev_loss")
    return float("inf") if loss is None else float(loss)


def sweep(args: Any, results: Results, combination: str, grid: Any) -> Any:
    best = min((w[0] for w in grid), key=lambda rates: loss_of(results, combination, rates, 0))
    return [({**best, "eps": eps}, 0) for eps in args.eps]


def winner(args: Any, results: Results, combination: str, grid: Any) -> dict[str, Any]:
    tried = [w[0] for w in [*grid, *sweep(args, results, combination, grid)]]
    return min(tried, key=lambda rates: loss_of(results, combination, rates, 0))


def show(args: argparse.Namespace, results: Results) -> None:
    from zofo.statistics.estimates import paired_difference

    grid_pairs = [
        ({"base_lr": b, "adapter_lr": a, "eps": GRID_EPS}, 0)
        for b, a in itertools.product(args.base_lr, args.adapter_lr)
    ]
    auto = dict.fromkeys(("base_lr", "adapter_lr", "eps"), "auto")
    for combination in args.combinations:
        if plan(args, results, combination):
            print(f"{combination}: not done")
            continue
        best = winner(args, results, combination, grid_pairs)
        seeds = range(1, args.seeds + 1)
        ours = {s: loss_of(results, combination, auto, s) for s in seeds}
        theirs = {s: loss_of(results, combination, best, s) for s in seeds}
        spread = stdev(theirs.values()) if len(theirs) > 1 else float("nan")
        found = paired_difference(ours, theirs)
        assert found is not None
        estimate = found.estimate
        is_within = estimate.value <= spread or estimate.low <= 0
        runs = [name_of(combination, *w) for w in grid_pairs]
        runs += [name_of(combination, *w) for w in sweep(args, results, combination, grid_pairs)]
        spent = sum(results.runs[r].get("forward_equivalents", 0) for r in dict.fromkeys(runs))
        advice = [
            results.runs[name_of(combination, auto, s)]["advice"]["cost"]["forward_equivalents"]
            for s in seeds
        ]
        interval = (
            "" if math.isnan(estimate.low) else f" [{estimate.low:+.4f}, {estimate.high:+.4f}]"
        )
        print(
            f"{combination}: auto {fmean(ours.values()):.4f}, winner {fmean(theirs.values()):.4f} "
            f"(base_lr {best['base_lr']:g}, adapter_lr {best['adapter_lr']:g}, eps "
            f"{best['eps']:g}); difference {estimate.value:+.4f}{interval}, seed sd {spread:.4f}: "
            f"{'within' if is_within else 'worse'}; advice {fmean(advice) / spent:.1%} of the grid"
        )
        for seed in seeds:
            advised = results.runs[name_of(combination, auto, seed)]["advice"]["advised"]
            print(f"    seed {seed}: dev loss {ours[seed]:.4f}, {advised}")


def main() -> None:
    args = parse()
    setting = {"steps": args.steps, "set": args.set}
    results = Results(args.json, setting)
    if not args.show:
        for combination in args.combinations:
            while wanted := plan(args, results, combination):
                for rates, seed in wanted:
                    began = time.monotonic()
                    run = train(args, combination, rates, seed)
                    results.add(name_of(combination, rates, seed), run)
                    print(
                        f"{name_of(combination, rates, seed)}: dev loss {run['dev_loss']}, "
                        f"{time.monotonic() - began:.0f} s",
                        flush=True,
                    )
    show(args, results)


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        print("interrupted; the same command goes on", flush=True)
        raise SystemExit(130) from None
