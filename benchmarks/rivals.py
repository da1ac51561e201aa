"""Compare ways to fine-tune every weight with less memory, at equal forward-equivalents.

    adamw      torch's AdamW
    fused-sgd  SGD inside the backward, which frees each gradient at once (as LOMO)
    galore     AdamW on projected gradients of the encoder's matrices (galore-torch)
    apollo     gradients of these matrices, scaled by a projected AdamW (apollo-torch)
    badam      AdamW on one layer at a time and the head; the embeddings stay (badam, its default)
    badam-all  badam with the embeddings as one more block; only if asked for

A forward counts 1. A backward counts 1 for the gradients of the activations and 1 for those of the
weights. A block of badam counts the share of the layers from it upwards, and that of the weights
which have a gradient. So every step costs 3, but badam's fewer. Evaluations are not counted: all
contenders have as many at equal cost.

The model is a folder of warm_head.py, the task SST-2. Rates are constant, without weight decay.
Each contender has the rate of its grid with the lowest dev loss on the first seed. A run keeps its
weights of the lowest dev loss, those before training included, and `patience` evaluations without a
lower one end it. Every run is a process of its own. State bytes are the largest of an optimizer,
with projections and copies of weights. Gradient bytes are the most that parameters held at a time.
Peak bytes are what the resident memory grew by during training, evaluations left out. Stored bytes
are the tensors that differ from the model's.

The JSON file holds every run, and a second call continues with the others. A run that failed has
its reason there, and is tried again. At the end tables are printed, with paired differences to
adamw and their 95% intervals. The packages are installed with `pip install --no-deps`.

    python benchmarks/rivals.py --model DIR --data-dir DIR --json benchmarks/results/rivals.json
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import json
import math
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Final

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import Trainer, TrainingArguments

from zofo import load_model
from zofo.bench.contenders import FusedFirstOrder
from zofo.bench.device import peak_bytes, reset_peak, used_bytes
from zofo.scoring.evaluate import evaluate
from zofo.statistics.estimates import paired_difference
from zofo.tasks.encode import Collator, Encoder
from zofo.tasks.load import load_splits
from zofo.tasks.losses import objective_losses
from zofo.tasks.spec import TaskSpec

RATES: Final = {
    "adamw": [1e-5, 3e-5, 1e-4],
    "fused-sgd": [3e-3, 1e-2, 3e-2],
    "galore": [1e-5, 3e-5, 1e-4],
    "apollo": [1e-5, 3e-5, 1e-4],
    "badam": [3e-5, 1e-4, 3e-4],
    "badam-all": [3e-5, 1e-4, 3e-4],
}
PACKAGES: Final = ("galore_torch", "apollo_torch", "badam")
MATRICES: Final = r".*encoder\..*(query|key|value|dense)"
"""Modules with projected gradients. The embeddings have all of AdamW's state."""
GALORE_SCALE: Final = 4.0
"""As in the fine-tuning example of GaLore's README."""
LIMITS: Final = ("num_train", "num_dev", "num_test", "max_length")
SETTINGS: Final = ("model", *LIMITS, "rows", "cost", "every", "patience", "rank", "gap", "switch")
SCORES: Final = ("dev_loss", "accuracy", "auc")
CPU: Final = torch.device("cpu")


def watch_gradients(parameters: list[nn.Parameter]) -> list[int]:
    """A list whose only number becomes the most bytes of gradients at a time."""
    most = [0]

    def look(_: Tensor) -> None:
        held = sum(p.grad.nbytes for p in parameters if p.grad is not None)
        most[0] = max(most[0], held)

    for parameter in parameters:
        parameter.register_post_accumulate_grad_hook(look)
    return most


def state_bytes(optimizer: Any, model: nn.Module) -> int:
    """Bytes of an optimizer's tensors, without the model's own, each once."""
    found: dict[int, int] = {}

    def collect(value: Any) -> None:
        if isinstance(value, Tensor):
            found[value.untyped_storage().data_ptr()] = value.untyped_storage().nbytes()
        elif type(value).__name__.endswith("Projector"):
            collect(vars(value))
        elif isinstance(value, dict | list | tuple):
            for part in value.values() if isinstance(value, dict) else value:
                collect(part)

    base = getattr(optimizer, "base_optimizer", optimizer)
    collect(dict(getattr(base, "state", {})))
    collect(getattr(optimizer, "param_idx2hp", {}))  # badam's copies of the block's weights
    own = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    return sum(size for place, size in found.items() if place not in own)


def make_optimizer(name: str, model: Any, rate: float, args: argparse.Namespace) -> Any:
    """The optimizer of a contender; fused-sgd has none."""
    if name == "adamw":
        return torch.optim.AdamW(model.parameters(), lr=rate, weight_decay=0.0)
    if name in ("galore", "apollo"):
        # apollo multiplies by the root. This undoes that a projected step has fewer entries.
        scale = GALORE_SCALE if name == "galore" else model.config.hidden_size / args.rank
        options = f"rank={args.rank},update_proj_gap={args.gap},scale={scale}"
        settings = TrainingArguments(
            output_dir=tempfile.gettempdir(),
            optim=f"{name}_adamw",
            optim_target_modules=MATRICES,
            optim_args=options,
            learning_rate=rate,
            use_cpu=True,
            report_to=[],
        )
        kind, kwargs = Trainer.get_optimizer_cls_and_kwargs(settings, model)
        return kind(**kwargs)
    from badam import BlockOptimizer

    blocks = [[f"encoder.layer.{i}."] for i in range(model.config.num_hidden_layers)]
    return BlockOptimizer(
        torch.optim.AdamW(model.parameters(), lr=rate, weight_decay=0.0),
        list(model.named_parameters()),
        block_prefix_list=[["embeddings."], *blocks] if name == "badam-all" else blocks,
        switch_block_every=args.switch,
        active_modules=["pooler.", "classifier."],
        verbose=0,
    )


def cost_of_step(model: Any) -> float:
    """Forward-equivalents of a step with the present `requires_grad`."""
    num_layers = model.config.num_hidden_layers
    lowest, moved, total = num_layers, 0, 0
    for name, parameter in model.named_parameters():
        if "embeddings." in name:  # Looking up rows costs nothing.
            lowest = 0 if parameter.requires_grad else lowest
            continue
        total += parameter.numel()
        if parameter.requires_grad:
            moved += parameter.numel()
            if ".layer." in name:
                lowest = min(lowest, int(name.split(".layer.")[1].split(".")[0]))
    return 1 + (num_layers - lowest) / num_layers + moved / total


def batches(rows: list[Any], size: int, collator: Collator, seed: int) -> Iterator[Any]:
    """Batches of reshuffled rows."""
    generator = torch.Generator().manual_seed(seed)
    order: list[int] = []
    while True:
        if len(order) < size:
            order = torch.randperm(len(rows), generator=generator).tolist()
        yield collator([rows[order.pop()] for _ in range(size)])


def stepper(
    name: str, model: Any, rate: float, args: argparse.Namespace
) -> tuple[Callable[[Any], None], Any]:
    """A function that makes a step on a batch, and the optimizer."""
    if name == "fused-sgd":
        bench = SimpleNamespace(plain=model, base=list(model.parameters()), adapter=[])
        fused = FusedFirstOrder(bench, rate)  # type: ignore[arg-type]
        fused.enter()

        def fused_step(batch: Any) -> None:
            bench.loss = lambda model: objective_losses(model, batch)[0]
            fused.step()

        return fused_step, None
    optimizer = make_optimizer(name, model, rate, args)

    def step(batch: Any) -> None:
        objective_losses(model, batch)[0].backward()
        optimizer.step()
        model.zero_grad()

    return step, optimizer


def train(name: str, rate: float, seed: int, args: argparse.Namespace) -> dict[str, Any]:
    """Train and measure in this process."""
    torch.manual_seed(seed)
    for package in PACKAGES:  # in every process alike, so that they are not in the difference
        with contextlib.suppress(ImportError):
            importlib.import_module(package)
    model: Any
    model, tokenizer = load_model(args.model, head="classification")
    limits = {key: getattr(args, key) for key in LIMITS}
    spec = TaskSpec(name="sst2", data_dir=args.data_dir, **limits)
    splits = load_splits(spec, seed=seed)
    encode = Encoder(tokenizer, head="classification", max_length=args.max_length)
    rows = {part: [encode(row) for row in splits.part(part)] for part in ("train", "dev", "test")}
    collator = Collator(tokenizer.pad_token_id)
    kept = Path(args.worker_folder) / "best.safetensors"
    save_file(model.state_dict(), kept)
    best = first = evaluate(model.train(), rows["dev"], collator).loss
    before = used_bytes(CPU)
    gradients = watch_gradients(list(model.parameters()))  # before the hooks of fused-sgd
    step, optimizer = stepper(name, model, rate, args)
    found: dict[str, Any] = {"state_bytes": 0, "peak_bytes": 0, "start_loss": first}
    cost, steps, best_step, evaluated, waited, cpu, wall = 0.0, 0, 0, 0, 0, 0.0, 0.0
    reset_peak(CPU)
    for batch in batches(rows["train"], args.rows, collator, seed):
        cost, steps = cost + cost_of_step(model), steps + 1
        cpu_begun, begun = time.process_time(), time.perf_counter()
        step(batch)
        cpu, wall = cpu + time.process_time() - cpu_begun, wall + time.perf_counter() - begun
        found["state_bytes"] = max(found["state_bytes"], state_bytes(optimizer, model))
        if cost < (evaluated + 1) * args.every and cost < args.cost:
            continue
        found["peak_bytes"] = max(found["peak_bytes"], peak_bytes(CPU) - before)
        evaluated, waited = int(cost // args.every), waited + 1
        loss = evaluate(model, rows["dev"], collator).loss
        if loss < best:
            best, best_step, waited = loss, steps, 0
            save_file(model.state_dict(), kept)
        if cost >= args.cost or waited >= args.patience or not math.isfinite(loss):
            break
        reset_peak(CPU)
    model.load_state_dict(load_file(kept))
    original = load_model(args.model, head="classification")[0].state_dict()
    changed = [value for key, value in model.state_dict().items() if not value.equal(original[key])]
    test = evaluate(model, rows["test"], collator)
    return {
        **found,
        "dev_loss": best,
        "accuracy": test.accuracy,
        "auc": test.auc,
        "steps": steps,
        "best_step": best_step,
        "forward_equivalents": cost,
        "cpu_seconds": cpu,
        "wall_seconds": wall,
        "gradient_bytes": gradients[0],
        "process_bytes": before + found["peak_bytes"],
        "stored_bytes": sum(value.nbytes for value in changed),
    }


class Study:
    """The runs so far, each in a process of its own."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args = args
        self.settings = {key: getattr(args, key) for key in SETTINGS}
        self.runs: list[dict[str, Any]] = []
        if args.json.exists():
            self.runs = json.loads(args.json.read_text())["runs"]

    def run(self, name: str, rate: float, seed: int) -> dict[str, Any]:
        """Return a finished run, or make it."""
        key = {"name": name, "rate": rate, "seed": seed, "settings": self.settings}
        for known in self.runs:
            if known["ran"] and key.items() <= known.items():
                return known
        self.runs = [known for known in self.runs if not key.items() <= known.items()]
        with tempfile.TemporaryDirectory() as folder:
            worker = ["--worker", json.dumps([name, rate, seed]), "--worker-folder", folder]
            command = [sys.executable, __file__, *sys.argv[1:], *worker]
            done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode == 0:
            run = {**key, "ran": True, **json.loads(done.stdout.splitlines()[-1])}
        else:
            said = [line for line in done.stderr.splitlines() if line.strip()]
            reason = f"exit code {done.returncode}: {said[-1] if said else ''}"
            run = {**key, "ran": False, "reason": reason}
        self.runs.append(run)
        self.args.json.parent.mkdir(parents=True, exist_ok=True)
        self.args.json.write_text(json.dumps({"runs": self.runs}, indent=1) + "\n")
        print(json.dumps({k: v for k, v in run.items() if k != "settings"}), flush=True)
        return run


def print_tables(chosen: dict[str, list[dict[str, Any]]]) -> None:
    """Print the means over the seeds, and the differences to adamw."""
    sizes = ("state_bytes", "gradient_bytes", "peak_bytes", "stored_bytes")
    print("| method | rate | dev loss | accuracy | AUC | cost | CPU s | ms a step", end=" | ")
    print("state MB | gradients MB | peak MB | stored MB |")
    print("|---|" + "---:|" * 11)
    for name, runs in chosen.items():
        mean = {
            key: statistics.fmean(run[key] for run in runs)
            for key in (*SCORES, *sizes, "forward_equivalents", "cpu_seconds", "steps")
        }
        cells = [name, f"{runs[0]['rate']:g}", *(f"{mean[key]:.3f}" for key in SCORES)]
        cells += [f"{mean['forward_equivalents']:.0f}", f"{mean['cpu_seconds']:.0f}"]
        cells += [f"{1000 * mean['cpu_seconds'] / mean['steps']:.0f}"]
        print("| " + " | ".join([*cells, *(f"{mean[key] / 1e6:.1f}" for key in sizes)]) + " |")
    if "adamw" not in chosen:
        return
    print("\n| method − adamw | dev loss | accuracy | AUC |\n|---|---:|---:|---:|")
    by_seed = {
        name: {key: {run["seed"]: run[key] for run in runs} for key in SCORES}
        for name, runs in chosen.items()
    }
    for name in [name for name in chosen if name != "adamw"]:
        gains = [paired_difference(by_seed[name][k], by_seed["adamw"][k]) for k in SCORES]
        print(f"| {name} | " + " | ".join(f"{g.estimate:+.3f}" if g else "" for g in gains) + " |")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", required=True, help="folder of warm_head.py")
    parser.add_argument("--data-dir", required=True)
    parser.add_argument("--json", type=Path, required=True)
    parser.add_argument("--contenders", nargs="+", choices=RATES, default=list(RATES)[:-1])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--num-train", type=int, default=1000)
    parser.add_argument("--num-dev", type=int, default=300)
    parser.add_argument("--num-test", type=int, help="default: all")
    parser.add_argument("--max-length", type=int, default=16)
    parser.add_argument("--rows", type=int, default=16, help="of a batch")
    parser.add_argument("--cost", type=float, default=1200, help="forward-equivalents of a run")
    parser.add_argument("--every", type=float, default=60, help="cost between evaluations")
    parser.add_argument("--patience", type=int, default=5)
    parser.add_argument("--rank", type=int, default=32, help="of galore and apollo")
    parser.add_argument("--gap", type=int, default=200, help="steps of a projection (its default)")
    parser.add_argument("--switch", type=int, default=20, help="steps of a block of badam")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    parser.add_argument("--worker-folder", help=argparse.SUPPRESS)
    return parser.parse_args()


def main() -> None:
    args = parse()
    torch.set_num_threads(1)
    if args.worker:
        print(json.dumps(train(*json.loads(args.worker), args)))
        return
    study, chosen = Study(args), {}
    for name in args.contenders:
        tried = [study.run(name, rate, args.seeds[0]) for rate in RATES[name]]
        sound = [run for run in tried if run["ran"]]
        if not sound:
            print(f"{name} does not run: {tried[0]['reason']}")
            continue
        rate = min(sound, key=lambda run: run["dev_loss"])["rate"]
        runs = [study.run(name, rate, seed) for seed in args.seeds]
        chosen[name] = [run for run in runs if run["ran"]]
    print_tables(chosen)


if __name__ == "__main__":
    main()
