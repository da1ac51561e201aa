"""Measure rank-one directions on a GPU: equal bits, bandwidth of the update, ratios of steps.

    bits       an update of a matrix on the device and on the CPU
    update     GB/s of w ← w − Σ_k c_k v_k, and its time over that of add_
    steps      `zofo bench` with hybrid-rows and zo-ft-rows, at 8 × 32 and 32 × 32 tokens

    python benchmarks/rows_on_gpu.py
    python benchmarks/rows_on_gpu.py --device cpu --rows 256 --model random:llama-tiny   # a trial

The first command is made for less than eight minutes on one GPU. The exit code is 1 if bits differ.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from statistics import median

import torch

from zofo.bench.device import seconds_of
from zofo.optim.trajectory import Update

CONTENDERS = "forward,fo-peft,hybrid,hybrid-rows,zo-ft,zo-ft-rows,mezo"
NUM_DIRECTIONS = (1, 8, 32, 128)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--model", default="random:llama-1b")
    parser.add_argument("--rows", type=int, default=8192, help="of the matrix of 4,096 columns")
    parser.add_argument("--rounds", type=int, default=5)
    return parser.parse_args()


def update(weight: torch.Tensor, num_directions: int, distribution: str) -> None:
    scalars = tuple(1e-3 * (k + 1) for k in range(num_directions))
    is_rank_one = distribution == "rank-one"
    Update(3, scalars, 1e-3, 0.01).apply(
        [weight],
        [5],
        seed=7,
        distribution=distribution,
        rank_one=frozenset({5} if is_rank_one else ()),
    )


def have_equal_bits(device: torch.device) -> bool:
    are_equal = True
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        for shape in ((1536, 576), (576, 1536), (49, 130)):
            for num_directions in NUM_DIRECTIONS[:3]:
                generator = torch.Generator().manual_seed(0)
                here = torch.randn(shape, generator=generator).to(dtype)
                there = here.to(device)
                update(here, num_directions, "rank-one")
                update(there, num_directions, "rank-one")
                same = torch.equal(here, there.cpu())
                are_equal &= same
                if not same:
                    print(f"bits differ: {dtype}, {shape}, {num_directions} directions")
    print(f"bits on {device} and the CPU: {'equal' if are_equal else 'DIFFERENT'}", flush=True)
    return are_equal


def show_bandwidth(device: torch.device, args: argparse.Namespace) -> None:
    print("dtype     update           ms     GB/s   time / add_")
    for dtype in (torch.float32, torch.bfloat16):
        weight = torch.zeros(args.rows, 4096, dtype=dtype, device=device)
        kinds = {"add_": lambda w=weight: w.add_(1e-3)}
        kinds["signs"] = lambda w=weight: update(w, 1, "rademacher")
        for k in NUM_DIRECTIONS:
            kinds[f"rank-one, {k}"] = lambda w=weight, k=k: update(w, k, "rank-one")
        for call in kinds.values():
            call()
        seconds: dict[str, list[float]] = {name: [] for name in kinds}
        for _ in range(args.rounds):
            for name, call in kinds.items():
                seconds[name].append(seconds_of(call, device, repeats=3))
        base = median(seconds["add_"])
        for name, samples in seconds.items():
            s = median(samples)
            rate = 2 * weight.nbytes / s / 1e9
            kind = str(dtype).removeprefix("torch.")
            print(f"{kind:9s} {name:14s} {1e3 * s:6.2f} {rate:8.1f} {s / base:12.2f}", flush=True)


def main() -> int:
    args = parse()
    device = torch.device(args.device)
    are_equal = have_equal_bits(device)
    show_bandwidth(device, args)
    for batch in ("8", "32"):
        command = ["bench", "--device", args.device, "--model", args.model, "--batch", batch]
        command += ["--length", "32", "--rounds", str(args.rounds), "--no-noise", "--no-memory"]
        command += ["--dtype", "bfloat16" if device.type == "cuda" else "float32"]
        subprocess.run([sys.executable, "-m", "zofo", *command, "--only", CONTENDERS], check=True)
    return 0 if are_equal else 1


if __name__ == "__main__":
    sys.exit(main())
