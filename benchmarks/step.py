"""What a hybrid step costs, against the sum of its parts and against what is published.

One alternating run: every round times each contender once on the same batch, medians are compared.

    forward        one forward without gradients
    fo-peft        forward, backward, AdamW on the adapter
    hybrid         zofo's step: fo-peft's and one forward at the perturbed base, fused update
    mezo           MeZO's step as published: four passes of torch.normal over the base, two forwards

The naive hybrid is fo-peft's step followed by mezo's. Peak memory is measured apart, each contender
in a process of its own.

    python benchmarks/step.py                   SmolLM2-135M, LoRA r 8, batch 8 × 32, one thread
    python benchmarks/step.py --memory all
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median

CONTENDERS = ("forward", "fo-peft", "hybrid", "mezo")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--length", type=int, default=32)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--distribution", default="rademacher")
    parser.add_argument("--memory", choices=("all", "fo-peft", "hybrid"))
    parser.add_argument("--json", type=Path, help="also write the figures here")
    return parser.parse_args()


def contenders(args: argparse.Namespace) -> dict[str, Callable[[], None]]:
    import torch

    from zofo import HybridOptimizer, param_groups, split_parameters
    from zofo.adapters import create_adapter
    from zofo.models import load_model

    model, tokenizer = load_model(args.model)
    model = create_adapter(model, "lora", tokenizer=tokenizer)
    model.train()
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(100, 10_000, (args.batch, args.length), generator=generator)
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}

    def loss() -> torch.Tensor:
        return model(**batch).loss

    blocks = split_parameters(model)
    base = list(blocks.base.values())
    groups = param_groups(model, "hybrid", base_lr=1e-9, adapter_lr=1e-9)
    optimizer = HybridOptimizer(
        groups, model, optimizer="AdamW", distribution=args.distribution, self_check=False
    )
    plain = torch.optim.AdamW(blocks.adapter.values(), lr=1e-9)

    def forward() -> None:
        with torch.no_grad():
            loss()

    def fo_peft() -> None:
        plain.zero_grad()
        loss().backward()
        plain.step()

    def hybrid() -> None:
        optimizer.step(loss)

    @torch.no_grad()
    def perturb(scale: float, seed: int) -> None:
        torch.manual_seed(seed)
        for weight in base:
            weight.add_(torch.normal(0.0, 1.0, weight.shape), alpha=scale)

    @torch.no_grad()
    def mezo() -> None:
        eps, seed = 1e-3, 1
        perturb(eps, seed)
        ahead = loss()
        perturb(-2 * eps, seed)
        behind = loss()
        perturb(eps, seed)
        perturb(-1e-9 * float(ahead - behind) / (2 * eps), seed)

    return dict(zip(CONTENDERS, (forward, fo_peft, hybrid, mezo), strict=True))


def time_all(args: argparse.Namespace) -> dict[str, float]:
    import torch

    torch.set_num_threads(args.threads)
    steps = contenders(args)
    for step in steps.values():  # compiles kernels, allocates
        step()
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(args.rounds):
        for name, step in steps.items():
            began = time.perf_counter()
            step()
            seconds[name].append(time.perf_counter() - began)
    medians = {name: median(values) for name, values in seconds.items()}
    # Ratios within a round: what slows the machine slows both sides.
    rounds = list(zip(*(seconds[name] for name in CONTENDERS), strict=True))
    parts = median(h / (f + p) for f, p, h, _ in rounds)
    naive = median(h / (p + m) for _, p, h, m in rounds)
    shape = f"batch {args.batch} × {args.length}"
    print(f"{args.model}, {shape}, {args.threads} thread(s), {args.rounds} rounds")
    for name, value in medians.items():
        print(f"  {name:<14}{value:8.3f} s")
    print(f"  hybrid / (fo-peft + forward)   {parts:.3f}")
    print(f"  hybrid / (fo-peft + mezo)      {naive:.3f}")
    return {**medians, "hybrid / (fo-peft + forward)": parts, "hybrid / (fo-peft + mezo)": naive}


def peak_of(args: argparse.Namespace) -> int:
    """Peak memory of this process after three steps of one contender, in bytes."""
    import resource

    import torch

    torch.set_num_threads(args.threads)
    step = contenders(args)[args.memory]
    for _ in range(3):
        step()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def peak_all(args: argparse.Namespace) -> dict[str, float]:
    peaks = {}
    for name in ("fo-peft", "hybrid"):
        command = [sys.executable, __file__, "--memory", name]
        for key in ("model", "batch", "length", "threads", "distribution"):
            command += [f"--{key}", str(getattr(args, key))]
        peaks[name] = int(
            subprocess.run(command, capture_output=True, text=True, check=True).stdout
        )
        print(f"  peak memory {name:<10}{peaks[name] / 2**20:9.1f} MiB")
    layer = largest_layer_bytes(args)
    ratio = peaks["hybrid"] / peaks["fo-peft"]
    beyond = (peaks["hybrid"] - layer) / peaks["fo-peft"]
    print(f"  largest layer         {layer / 2**20:9.1f} MiB")
    print(f"  hybrid / fo-peft      {ratio:.3f}, without one layer {beyond:.3f}")
    return {"memory ratio": ratio, "memory ratio beyond one layer": beyond}


def largest_layer_bytes(args: argparse.Namespace) -> int:
    from zofo.models import empty_model

    return max(
        sum(p.numel() * p.element_size() for p in module.parameters(recurse=False))
        for module in empty_model(args.model).modules()
    )


def main() -> None:
    args = parse()
    if args.memory in ("fo-peft", "hybrid"):
        print(peak_of(args))
        return
    figures = peak_all(args) if args.memory == "all" else time_all(args)
    if args.json is not None:
        args.json.write_text(json.dumps(figures, indent=2) + "\n")


if __name__ == "__main__":
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    main()
