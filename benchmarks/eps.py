"""Measure the error of loss differences for every eps and dtype.

    error = rms_k(s_k − v_k · ∇f(w)) / rms_k(v_k · ∇f(w))

autograd computes ∇f in float32 at exactly the weights that the dtype holds. The error is therefore
that of the difference alone. For a large eps higher-order terms dominate it. For a small one it
comes from the rounding of weights, activations and loss. The rows come from rotten-tomatoes. The
fresh head of MiniLM first takes a few gradient steps, because without them there is hardly a
derivative to measure.

    python benchmarks/eps.py                    what is missing, then the table
    python benchmarks/eps.py --models minilm --dtypes bfloat16
"""

from __future__ import annotations

import argparse
import json
import math
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from zofo import HybridOptimizer, Perturbation, param_groups, split_parameters
from zofo.models.loading import DTYPES, load_model
from zofo.noise.combine import direction
from zofo.optim.trajectory import drawn_from
from zofo.tasks.encode import Collator, Encoded, Encoder
from zofo.tasks.load import load_splits
from zofo.tasks.losses import objective_loss
from zofo.tasks.spec import TaskSpec

RESULTS = Path(__file__).parent / "results" / "eps.json"
HEADS: dict[str, Any] = {"minilm": "classification", "smollm2-135m": "causal-lm"}
EPS = (1e-5, 3e-5, 1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1)
SEED = 0


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--models", nargs="+", default=list(HEADS), choices=list(HEADS))
    parser.add_argument(
        "--dtypes", nargs="+", default=["float32", "bfloat16", "float16"], choices=list(DTYPES)
    )
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--directions", type=int, default=6)
    parser.add_argument("--distribution", default="rademacher")
    parser.add_argument("--results", type=Path, default=RESULTS)
    return parser.parse_args()


def load(name: str) -> tuple[nn.Module, Collator, list[Encoded]]:
    """Return the model in float32, its collator, and the rows for the loss."""
    model, tokenizer = load_model(name, head=HEADS[name])
    encode = Encoder(tokenizer, head=HEADS[name], max_length=32)
    rows = [encode(row) for row in load_splits(TaskSpec(name="rotten-tomatoes")).train]
    collator = Collator(tokenizer.pad_token_id)
    model.eval()
    if HEADS[name] == "classification":
        fit_head(model, rows, collator)
    return model, collator, rows


def fit_head(model: Any, rows: list[Encoded], collator: Collator) -> None:
    model.requires_grad_(False)
    model.classifier.requires_grad_(True)
    groups = param_groups(model, "fo-peft", adapter_lr=0.1)
    optimizer = HybridOptimizer(groups, model, optimizer="AdamW")
    for start in range(0, 60 * 16, 16):
        batch = collator(rows[start : start + 16])
        loss = optimizer.step(lambda batch=batch: objective_loss(model, batch))
    print(f"head fitted: loss of the last batch {float(loss):.3f}", flush=True)


def measure(
    model: nn.Module, dtype: torch.dtype, batch: dict[str, Tensor], args: argparse.Namespace
) -> dict[str, Any]:
    """Return the errors of both differences for every eps. The model ends in `dtype`."""
    model.to(dtype).float().requires_grad_(True)
    model.zero_grad(set_to_none=True)
    exact_loss = objective_loss(model, batch)
    exact_loss.backward()
    blocks = split_parameters(model)
    index = blocks.base_index
    tensors = [index[name] for name in blocks.base]
    options = {"seed": SEED, "distribution": args.distribution}
    view = Perturbation(model, list(blocks.base.values()), tensors, **options)

    def along(k: int, name: str, g: Tensor) -> float:
        kind = drawn_from(args.distribution, is_rank_one=index[name] in view.rank_one)
        address = {"seed": SEED, "step": 0, "tensor": index[name], "distribution": kind}
        v = direction(g.shape, index=k, **address)
        return float(torch.dot(v.flatten().double(), g.flatten().double()))

    grads = {name: p.grad for name, p in blocks.base.items() if p.grad is not None}
    exact = [
        math.fsum(along(k, name, g) for name, g in grads.items()) for k in range(args.directions)
    ]
    del grads
    model.zero_grad(set_to_none=True)
    model.requires_grad_(False).to(dtype)
    view.follow(model)
    with torch.no_grad():
        centre = float(objective_loss(model, batch))

        def loss_at(scale: float, k: int) -> float:
            with view.at(scale, step=0, direction=k):
                return float(objective_loss(model, batch))

        size = rms(exact)
        errors: dict[str, list[float]] = {"forward": [], "central": []}
        for eps in EPS:
            ahead = [loss_at(eps, k) for k in range(args.directions)]
            behind = [loss_at(-eps, k) for k in range(args.directions)]
            both = list(zip(exact, ahead, behind, strict=True))
            errors["forward"].append(rms([(a - centre) / eps - e for e, a, _ in both]) / size)
            errors["central"].append(rms([(a - b) / (2 * eps) - e for e, a, b in both]) / size)
    return {
        "loss": centre,
        "loss_in_float32": float(exact_loss),
        "rms_derivative": size,
        "weight_median": median_weight(model),
        **{kind: [float(f"{e:.3g}") for e in values] for kind, values in errors.items()},
    }


def rms(values: list[float]) -> float:
    return math.sqrt(math.fsum(v * v for v in values) / len(values))


def median_weight(model: nn.Module) -> float:
    largest = max(model.parameters(), key=lambda p: p.numel())
    return float(largest.detach().flatten()[:65536].float().abs().median())


def table(kept: dict[str, Any]) -> str:
    """Return the errors in percent as Markdown, with the best eps of each row in bold."""
    lines = [
        "| model, dtype | difference | " + " | ".join(f"{eps:g}" for eps in EPS) + " |",
        "|---|---|" + "---|" * len(EPS),
    ]
    for key, entry in sorted(kept["measured"].items()):
        for kind in ("forward", "central"):
            best = min(entry[kind])
            cells = [f"{100 * e:.2g}" if e < 0.995 else f"{100 * e:.0f}" for e in entry[kind]]
            shown = [
                f"**{c}**" if e == best else c for c, e in zip(cells, entry[kind], strict=True)
            ]
            lines.append(f"| {key.replace('/', ', ')} | {kind} | " + " | ".join(shown) + " |")
    return "\n".join(lines)


def main() -> None:
    args = parse()
    setting = {
        "batch": args.batch,
        "directions": args.directions,
        "distribution": args.distribution,
        "eps": list(EPS),
    }
    kept = json.loads(args.results.read_text()) if args.results.exists() else {}
    if kept.get("setting") != setting:
        kept = {"setting": setting, "measured": {}}
    for name in args.models:
        missing = [d for d in args.dtypes if f"{name}/{d}" not in kept["measured"]]
        if not missing:
            continue
        model, collator, rows = load(name)
        batch = collator(rows[-args.batch :])
        state = {key: value.clone() for key, value in model.state_dict().items()}
        for dtype in missing:
            began = time.perf_counter()
            model.float().load_state_dict(state)
            entry = measure(model, DTYPES[dtype], batch, args)
            print(f"{name} {dtype}: {time.perf_counter() - began:.0f} s", flush=True)
            kept["measured"][f"{name}/{dtype}"] = entry
            args.results.parent.mkdir(exist_ok=True)
            args.results.write_text(json.dumps(kept, indent=1) + "\n")
    print(table(kept))


if __name__ == "__main__":
    main()
