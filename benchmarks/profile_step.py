"""Measure where the time of a hybrid step goes, and what it costs beside its forwards and backward.

Every round takes one plain forward pass, one FO-PEFT step and one hybrid step. The parts of the
hybrid step are timed where they happen, and the script prints medians. `noise` is the time of the
kernels within the perturbed forward pass. The matrix products there then find the weights in the
cache.

    OMP_NUM_THREADS=1 python benchmarks/profile_step.py --threads 1
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from statistics import median
from typing import Any

import torch

from zofo import HybridOptimizer, param_groups, split_parameters
from zofo.models.adapters import create_adapter
from zofo.models.loading import load_model
from zofo.noise.cpu import Call
from zofo.optim.trajectory import Update


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--length", type=int, default=32)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=9)
    return parser.parse_args()


def main() -> None:
    args = parse()
    torch.set_num_threads(args.threads)
    model, tokenizer = load_model(args.model)
    model = create_adapter(model, "lora", tokenizer=tokenizer).train()
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(100, 10_000, (args.batch, args.length), generator=generator)
    spent: dict[str, float] = {}

    def timed(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def run(*given: Any, **named: Any) -> Any:
            began = time.perf_counter()
            try:
                return function(*given, **named)
            finally:
                spent[name] = spent.get(name, 0.0) + time.perf_counter() - began

        return run

    def forward() -> torch.Tensor:
        return model(input_ids=ids, labels=ids).loss

    plain_forward = timed("forward with graph", forward)
    perturbed_forward = timed("perturbed forward", forward)

    def loss() -> torch.Tensor:
        return plain_forward() if torch.is_grad_enabled() else perturbed_forward()

    optimizer = HybridOptimizer(
        param_groups(model, "hybrid", base_lr=1e-9, adapter_lr=1e-9), model, optimizer="AdamW"
    )
    adapter = torch.optim.AdamW(split_parameters(model).adapter.values(), lr=1e-9)

    def fo_peft() -> None:
        adapter.zero_grad()
        forward().backward()
        adapter.step()

    def one_forward() -> None:
        with torch.no_grad():
            forward()

    assert optimizer.inner is not None
    optimizer.step(loss)
    torch.Tensor.backward = timed("backward", torch.Tensor.backward)  # type: ignore[method-assign]
    Call.run = timed("noise", Call.run)  # type: ignore[method-assign]
    Update.apply = timed("update of the base", Update.apply)  # type: ignore[method-assign]
    optimizer.inner.step = timed("adapter's AdamW", optimizer.inner.step)  # type: ignore[method-assign]

    rounds: dict[str, list[float]] = {}
    for _ in range(args.rounds):
        for name, step in (("one forward", one_forward), ("FO-PEFT step", fo_peft)):
            rounds.setdefault(name, []).append(seconds(step))
        spent.clear()
        total = seconds(lambda: optimizer.step(loss))
        parts = dict(spent)
        parts["noise"] -= parts["update of the base"]
        parts["rest"] = total - sum(value for name, value in parts.items() if name != "noise")
        for name, value in {"hybrid step": total, **parts}.items():
            rounds.setdefault(name, []).append(value)
    ratio = median(
        h / (f + p)
        for h, f, p in zip(
            rounds["hybrid step"], rounds["one forward"], rounds["FO-PEFT step"], strict=True
        )
    )
    print(f"{args.model}, {args.batch} × {args.length}, {args.threads} thread(s), milliseconds")
    for name, values in rounds.items():
        print(f"  {name:<22}{median(values) * 1e3:9.1f}   least {min(values) * 1e3:9.1f}")
    print(f"  hybrid / (FO-PEFT + forward) {ratio:.3f}")


def seconds(function: Callable[[], object]) -> float:
    began = time.perf_counter()
    function()
    return time.perf_counter() - began


if __name__ == "__main__":
    main()
