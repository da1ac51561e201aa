"""Compare ways to move a quantised base, at equal forward-equivalents.

    fo-peft   the adapter alone                                      2 forward-equivalents a step
    hybrid    the base as well: in nf4 by its scales                 3
    codes     the base as well, by its codes: q ← q ± 1 at random    3

codes rounds the step of a weight to a neighbouring code: the code moves with the probability that
makes the expected weight right, q ← clamp(q + SR(−η s v / Δ)), where Δ is the distance to the
neighbour. Its directions are independent signs of the dequantised weights. What is not quantised
moves as in hybrid. Directions and rounding bits depend on seed, step and tensor only, so a run can
be repeated.

The model is MiniLM with a new head, the rows come from rotten-tomatoes. Each contender has the
rate of its grid with the lowest dev loss on the first seed. The JSON file holds every finished run,
and a second call continues with the others.

    python benchmarks/quantized.py --json benchmarks/results/quantized.json
"""

from __future__ import annotations

import argparse
import itertools
import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor, nn
from torch.nn import functional

from zofo import HybridOptimizer, create_adapter, load_model, param_groups
from zofo.models.adapter_kinds import KINDS
from zofo.noise.combine import direction
from zofo.optim.blocks import split_parameters
from zofo.optim.trajectory import Update
from zofo.perturb.quantized import Scales, has_moving_scales
from zofo.perturb.view import Perturbation
from zofo.scoring.evaluate import evaluate
from zofo.statistics.estimates import mean_interval
from zofo.tasks.encode import Collator, Encoded, Encoder
from zofo.tasks.load import load_splits
from zofo.tasks.losses import objective_losses
from zofo.tasks.spec import TaskSpec

EPS: Final = 1e-3
COST: Final = {"fo-peft": 2, "hybrid": 3, "codes": 3}
GRID: Final = {"fo-peft": [0.0], "hybrid": [3e-5, 1e-4, 3e-4], "codes": [1e-6, 1e-5]}
CONTENDERS: Final = [
    *itertools.product(("nf4",), ("prompt", "lora"), ("fo-peft", "hybrid", "codes")),
    *itertools.product(("float32",), ("prompt", "lora"), ("fo-peft", "hybrid")),
]


class Codes:
    """The codes of all 4-bit layers, which move by stochastic rounding."""

    def __init__(self, model: nn.Module, seed: int) -> None:
        self.seed = seed
        self.layers = [m for m in model.modules() if has_moving_scales(m)]
        table = self.layers[0].weight.quant_state.code  # type: ignore[union-attr]
        # To the neighbour above, and below: [16]. The ends have none, so the codes stay there.
        gaps = table.diff()
        never = torch.tensor([torch.inf])
        self.up, self.down = torch.cat((gaps, never)), torch.cat((never, gaps))
        self.moved: list[float] = []  # share of the codes that moved, per step
        self.noise: list[float] = []  # energy of the rounding relative to that of the step

    def signs(self, i: int, step: int) -> Tensor:
        """The direction of a layer's dequantised weight: float32, [out, in]."""
        shape = self.layers[i].weight.quant_state.shape  # type: ignore[union-attr]
        return direction(shape, seed=self.seed, step=step, tensor=1 << 18 | i)

    @contextmanager
    def at(self, eps: float, step: int) -> Iterator[None]:
        """Inside the context, the layers compute with their dequantised weights + eps · v."""

        def hook(i: int) -> Any:
            return lambda _, args, y: y + eps * functional.linear(args[0], self.signs(i, step))

        handles = [layer.register_forward_hook(hook(i)) for i, layer in enumerate(self.layers)]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def move(self, factor: float, step: int) -> None:
        """Add factor · v to the weights, rounded at random to codes."""
        moved, wanted, done, total = 0, 0.0, 0.0, 0
        for i, layer in enumerate(self.layers):
            weight: Any = layer.weight
            scales = weight.quant_state.absmax.repeat_interleave(64)  # [weights]
            packed = weight.data.view(-1)
            codes = torch.stack((packed >> 4, packed & 15), 1).view(-1).long()  # [weights]
            change = factor * self.signs(i, step).view(-1) / scales
            gaps = torch.where(change > 0, self.up[codes], self.down[codes])
            draws = torch.rand(
                len(codes),
                generator=torch.Generator().manual_seed((self.seed << 40) + (step << 12) + i),
            )
            jumps = (draws < change.abs() / gaps).nonzero().view(-1)
            way = change[jumps].sign()
            wanted += float((change * scales).square().sum())
            change[jumps] -= gaps[jumps] * way  # now minus the rounding
            done += float((change * scales).square().sum())
            codes[jumps] += way.long()
            pairs = codes.view(-1, 2).to(torch.uint8)
            packed.copy_(pairs[:, 0] << 4 | pairs[:, 1])
            moved, total = moved + len(jumps), total + len(codes)
        self.moved.append(moved / total)
        self.noise.append(done / wanted if wanted else 0.0)


class Study:
    """The runs so far, and the data that they share."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args = args
        self.runs: list[dict[str, Any]] = []
        if args.json.exists():
            self.runs = json.loads(args.json.read_text())["runs"]
        _, tokenizer = load_model("minilm", head="classification")
        encode = Encoder(tokenizer, head="classification", max_length=128)
        splits = load_splits(TaskSpec(name="rotten-tomatoes", num_train=7000, num_test=1000))
        rows = [encode(row) for row in splits.train]
        short = [row for row in rows if max(map(len, row.rows)) <= args.tokens]
        held = args.held
        self.dev, self.test, self.train = short[:held], short[held : 3 * held], short[3 * held :]
        self.collator = Collator(tokenizer.pad_token_id)

    def run(self, kind: str, adapter: str, name: str, rate: float, seed: int) -> dict[str, Any]:
        """Return a finished run, or train it."""
        key = {"kind": kind, "adapter": adapter, "name": name, "rate": rate, "seed": seed}
        for run in self.runs:
            if all(run[field] == value for field, value in key.items()):
                return run
        quantization = None if kind == "float32" else kind
        base, _ = load_model("minilm", head="classification", quantization=quantization, seed=seed)
        torch.manual_seed(seed)
        model: Any = create_adapter(base, adapter, head="classification").train()
        begin = time.monotonic()
        more = self.train_run(model, name, rate, KINDS[adapter].lr, seed)
        seconds = time.monotonic() - begin
        dev, test = (evaluate(model, rows, self.collator) for rows in (self.dev, self.test))
        scores = {"dev_loss": dev.loss, "accuracy": test.accuracy, "auc": test.auc}
        run = {**key, **scores, "test_loss": test.loss, "seconds": seconds, **more}
        self.runs.append(run)
        self.args.json.write_text(json.dumps({"runs": self.runs}, indent=1) + "\n")
        print(json.dumps(run), flush=True)
        return run

    def batches(self, seed: int) -> Iterator[dict[str, Tensor]]:
        """Batches of reshuffled rows."""
        generator, order = torch.Generator().manual_seed(seed), []  # type: ignore[var-annotated]
        while True:
            if len(order) < self.args.rows:
                order = torch.randperm(len(self.train), generator=generator).tolist()
            rows: list[Encoded] = [self.train[order.pop()] for _ in range(self.args.rows)]
            yield self.collator(rows)

    def train_run(
        self, model: Any, name: str, rate: float, adapter_lr: float, seed: int
    ) -> dict[str, Any]:
        """Train until the cost is spent; returns figures of the codes."""
        batches, steps = self.batches(seed), self.args.cost // COST[name]
        if name != "codes":
            groups = param_groups(model, name, base_lr=rate, adapter_lr=adapter_lr)
            optimizer = HybridOptimizer(groups, model, optimizer="AdamW", seed=seed, eps=EPS)
            for _ in range(steps):
                batch = next(batches)
                optimizer.step(lambda batch=batch: objective_losses(model, batch)[0])
            return {}
        blocks = split_parameters(model)
        rest = {n: p for n, p in blocks.movable.items() if not isinstance(p, Scales)}
        tensors = [blocks.base_index[n] for n in rest]
        groups = param_groups(model, "fo-peft", adapter_lr=adapter_lr)
        adapter = torch.optim.AdamW([p for g in groups for p in g["params"]], lr=adapter_lr)
        view = Perturbation(model, list(rest.values()), tensors, seed=seed)
        codes = Codes(model, seed)
        for step in range(steps):
            batch = next(batches)
            state = torch.get_rng_state()  # The dropout masks are those of the first evaluation.
            loss = objective_losses(model, batch)[0]
            adapter.zero_grad()
            loss.backward()
            torch.set_rng_state(state)
            with torch.no_grad(), view.at(EPS, step=step), codes.at(EPS, step):
                slope = float(objective_losses(model, batch)[0] - loss) / EPS
            adapter.step()
            Update(step, (slope,), rate, 0.0).apply(
                rest.values(), tensors, seed=seed, distribution="rademacher"
            )
            codes.move(-rate * slope, step)
        average = [sum(values) / len(values) for values in (codes.moved, codes.noise)]
        return {"codes_moved": average[0], "rounding_noise": average[1]}


def main() -> None:
    """Run what is missing, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rows", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=24, help="longer rows are left out")
    parser.add_argument("--held", type=int, default=300, help="dev rows; twice as many test rows")
    parser.add_argument("--cost", type=int, default=450, help="forward-equivalents of a run")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--json", type=Path, required=True)
    args = parser.parse_args()
    torch.set_num_threads(1)
    study, best = Study(args), {}
    for contender in CONTENDERS:
        grid = [study.run(*contender, rate, args.seeds[0]) for rate in GRID[contender[2]]]
        sound = [run for run in grid if run["dev_loss"] == run["dev_loss"]]  # not NaN
        best[contender] = min(sound, key=lambda run: run["dev_loss"])["rate"]
    for seed, contender in itertools.product(args.seeds[1:], CONTENDERS):
        study.run(*contender, best[contender], seed)
    print("| base | adapter | method | rate | dev loss | accuracy | AUC | accuracy − fo-peft |")
    print("|---|---|---|---|---|---|---|---|")
    for contender in CONTENDERS:
        runs = [study.run(*contender, best[contender], seed) for seed in args.seeds]
        first = [study.run(*contender[:2], "fo-peft", 0.0, seed) for seed in args.seeds]
        means = [sum(r[k] for r in runs) / len(runs) for k in ("dev_loss", "accuracy", "auc")]
        gains = [100 * (a["accuracy"] - b["accuracy"]) for a, b in zip(runs, first, strict=True)]
        gain = "" if contender[2] == "fo-peft" else f"{mean_interval(gains)}"
        cells = [*contender, f"{best[contender]:g}", *(f"{mean:.3f}" for mean in means), gain]
        print("| " + " | ".join(cells) + " |")


if __name__ == "__main__":
    main()
