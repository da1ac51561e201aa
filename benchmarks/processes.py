"""Measure several processes against one on the same global batch: samples a second, and bytes.

    one        process 0 alone takes steps on the whole batch, while the others wait
    several    each process takes the same steps on its part of the batch

Both take turns in the same processes, each of one CPU thread. The speed-up is the median of the
rounds' ratios. On the CPU the processes talk by gloo, and on GPUs by NCCL, one GPU each.

    OMP_NUM_THREADS=1 python benchmarks/processes.py --json processes.json
    python benchmarks/processes.py --device cuda --model random:llama-1b --dtype bfloat16
    python benchmarks/processes.py --model random:llama-tiny --batch 4 --length 8   # a trial
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
import time
from pathlib import Path
from statistics import median
from typing import Any

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from zofo.bench.contenders import EPS, RATE
from zofo.bench.device import synchronise
from zofo.bench.launch import in_processes
from zofo.bench.models import Workbench
from zofo.bench.settings import Settings, settings_from
from zofo.disk.files import write_json
from zofo.environment import environment
from zofo.errors import UserError
from zofo.optim.gradient_bytes import GradientBytes
from zofo.optim.methods import param_groups
from zofo.optim.optimizer import HybridOptimizer
from zofo.trainer.row_losses import row_shares

METHODS = ("hybrid", "hybrid-rows", "fo-peft", "zo-ft")


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--method", choices=METHODS, default="hybrid")
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--adapter", default="lora")
    parser.add_argument("--batch", type=int, default=16, help="rows of all processes together")
    parser.add_argument("--length", type=int, default=32, help="tokens per row")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--steps", type=int, default=2, help="steps of a sample")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args(argv)
    if args.processes < 2:
        parser.error(f"processes is {args.processes}; give at least 2")
    if args.batch % args.processes:
        parser.error(f"batch is {args.batch}; it must be a multiple of {args.processes} processes")
    if args.steps < 1:
        parser.error(f"steps is {args.steps}; give at least 1")
    if args.device == "cuda" and torch.cuda.device_count() < args.processes:
        parser.error(
            f"{args.processes} processes need as many GPUs, and this machine has "
            f"{torch.cuda.device_count()}; give fewer processes, or --device cpu"
        )
    return args


class Side:
    """A model of its own and its steps, alone or with the other processes."""

    def __init__(self, settings: Settings, method: str, *, is_alone: bool) -> None:
        self.bench = Workbench(settings)
        rank, size = (0, 1) if is_alone else (dist.get_rank(), dist.get_world_size())
        num_rows = settings.batch // size
        own = slice(rank * num_rows, (rank + 1) * num_rows)
        self.batch = {key: value[own] for key, value in self.bench.batch.items()}
        self.by_rows = method == "hybrid-rows"
        name = "hybrid" if self.by_rows else method
        self.inner = self.bench.plain if name == "zo-ft" else self.bench.adapted
        groups = param_groups(self.inner, name, base_lr=RATE, adapter_lr=RATE)
        moved = [p for group in groups if group["order"] == "first" for p in group["params"]]
        for weight in self.inner.parameters():
            weight.requires_grad_(any(weight is p for p in moved))
        self.outer, self.gradients = self.inner, GradientBytes()
        if not is_alone and moved:
            self.outer = DistributedDataParallel(self.inner)
            self.gradients.count(self.outer)
        self.optimizer = HybridOptimizer(
            groups,
            self.inner,
            optimizer="AdamW",
            process_group=None if is_alone else dist.group.WORLD,
            distribution="rank-one" if self.by_rows else settings.distribution,
            directions_per_step="rows" if self.by_rows else 1,
            eps=EPS,
            self_check=False,
        )

    def loss(self) -> torch.Tensor:
        """The mean loss of this side's rows, or each row's share of it."""
        # As in a Trainer, the perturbed evaluations go around DistributedDataParallel.
        model = self.outer if torch.is_grad_enabled() else self.inner
        if not self.by_rows:
            return model(**self.batch).loss
        inputs = {key: value for key, value in self.batch.items() if key != "labels"}
        return row_shares(self.inner, model(**inputs), self.batch["labels"])

    def seconds(self, num_steps: int) -> float:
        """The mean seconds of a step."""
        synchronise(self.bench.device)
        began = time.perf_counter()
        for _ in range(num_steps):
            self.optimizer.step(self.loss)
        synchronise(self.bench.device)
        return (time.perf_counter() - began) / num_steps


def measure(settings: Settings, method: str, num_steps: int) -> dict[str, Any]:
    """The seconds of a step of both sides in each round, and the bytes of a step."""
    if settings.device == "cuda":
        settings = dataclasses.replace(settings, device=f"cuda:{dist.get_rank()}")
    turns = dist.new_group(backend="gloo")  # Its barrier waits without computing.
    several = Side(settings, method, is_alone=False)
    alone = Side(settings, method, is_alone=True) if dist.get_rank() == 0 else None
    found: dict[str, list[float]] = {"one_s": [], "several_s": []}

    def take(key: str) -> None:
        side = several if key == "several_s" else alone
        dist.barrier(turns)
        if side is not None:
            found[key].append(side.seconds(num_steps))
        dist.barrier(turns)

    for number in range(1 + settings.rounds):  # The first round only warms up.
        if number == 1:
            found |= {"one_s": [], "several_s": []}
            sent = several.optimizer.processes.bytes_sent, several.gradients.sent
        for key in ("one_s", "several_s") if number % 2 else ("several_s", "one_s"):
            take(key)
    total = settings.rounds * num_steps
    return {
        **found,
        "base_bytes": (several.optimizer.processes.bytes_sent - sent[0]) / total,
        "gradient_bytes": (several.gradients.sent - sent[1]) / total,
    }


def in_words(samples: list[float]) -> str:
    return f"{median(samples):9.3f}  [{min(samples):.3f}, {max(samples):.3f}]"


def main(argv: list[str] | None = None) -> int:
    args = parse(argv)
    try:
        settings = settings_from(
            threads="1",
            only=None,
            json_file=args.json,
            **{k: getattr(args, k) for k in ("model", "adapter", "batch", "length", "dtype")},
            device=args.device,
            rounds=args.rounds,
        )
        found = in_processes(
            measure,
            settings,
            args.method,
            args.steps,
            num_processes=args.processes,
            backend="nccl" if args.device == "cuda" else "gloo",
        )
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    ratios = [a / b for a, b in zip(found["one_s"], found["several_s"], strict=True)]
    found |= {"arguments": vars(args) | {"json": None}, "environment": environment()}
    found["ratio"] = {"median": median(ratios), "min": min(ratios), "max": max(ratios)}
    print(
        f"{args.model}, {args.method}, {args.batch} × {args.length} in all, {args.device}, "
        f"{args.rounds} rounds of {args.steps} steps"
    )
    for key, number in (("one_s", 1), ("several_s", args.processes)):
        rates = [args.batch / seconds for seconds in found[key]]
        print(f"{number} process(es), samples/s  {in_words(rates)}")
    print(f"ratio of the rounds         {in_words(ratios)}")
    print(
        f"a process sends {found['base_bytes']:,.0f} bytes a step for the base and "
        f"{found['gradient_bytes']:,.0f} for gradients"
    )
    if args.json is not None:
        write_json(args.json, found)
    return 0


if __name__ == "__main__":
    sys.exit(main())
