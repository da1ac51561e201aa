"""Compare federated methods: accuracy over rounds and over bytes.

    lora     FedAvg of a LoRA adapter and the head; the base stays
    full     FedAvg of the whole model
    hybrid   FedAvg of the same adapter; the base moves by the parties' scalars

Ten parties hold rotten-tomatoes, split by label skew (Dirichlet, alpha 0.5). In each round four of
them, drawn with the seed, take local steps. The model is MiniLM with a new head. The rounds run in
one process with the classes of `zofo.federated`, without Flower. Bytes are those of the arrays and
records of all parties in both directions, without the envelope of the network.

hybrid has one forward more in each local step than lora, so it has the same rounds, not the same
time. Rates are chosen on dev rows with the first seed. The JSON file holds every finished run, and
a second call continues with the others.

    python benchmarks/federated.py --json benchmarks/results/federated.json
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from zofo import HybridOptimizer, create_adapter, load_model, param_groups
from zofo.federated import Coordinator, FederatedOptions, LocalData, Party, label_skew
from zofo.federated.base_log import num_bytes
from zofo.federated.exchange import answer, record_of
from zofo.federated.party import local_seed
from zofo.scoring.evaluate import evaluate
from zofo.tasks.encode import Collator, Encoded, Encoder
from zofo.tasks.load import load_splits
from zofo.tasks.losses import objective_losses
from zofo.tasks.spec import TaskSpec

RATES = {"lora": [3e-3], "full": [1e-4], "hybrid": [3e-5, 3e-4]}
"""The grid of each method; hybrid has lora's rate for the adapter, and these for the base."""


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--parties", type=int, default=10)
    parser.add_argument("--asked", type=int, default=4, help="parties a round")
    parser.add_argument("--alpha", type=float, default=0.5)
    parser.add_argument("--rounds", type=int, default=12)
    parser.add_argument("--every", type=int, default=4, help="rounds between two evaluations")
    parser.add_argument("--steps", type=int, default=4, help="local steps a round")
    parser.add_argument("--rows", type=int, default=8, help="rows of a local step")
    parser.add_argument("--tokens", type=int, default=20, help="longer rows are left out")
    parser.add_argument("--train", type=int, default=1500)
    parser.add_argument("--held", type=int, default=150, help="dev rows, and as many test rows")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--json", type=Path, required=True)
    return parser.parse_args()


class Study:
    """The rows of all parties, and the finished runs."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args = args
        self.runs: list[dict[str, Any]] = []
        if args.json.exists():
            self.runs = json.loads(args.json.read_text())["runs"]
        _, tokenizer = load_model("minilm", head="classification")
        encode = Encoder(tokenizer, head="classification", max_length=128)
        splits = load_splits(TaskSpec(name="rotten-tomatoes", num_train=7000))
        rows = [encode(row) for row in splits.train]
        short = [row for row in rows if row.length <= args.tokens]
        held, self.train = short[: 2 * args.held], short[2 * args.held :][: args.train]
        self.dev, self.test = held[: args.held], held[args.held :]
        self.collator = Collator(tokenizer.pad_token_id)

    def model(self, seed: int, *, has_adapter: bool) -> nn.Module:
        """MiniLM with a new head and, from the seed, a new adapter."""
        torch.manual_seed(seed)
        model, _ = load_model("minilm", head="classification")
        if has_adapter:
            model = create_adapter(model, "lora", head="classification", seed=seed)
        return model

    def parts(self, seed: int) -> list[list[Encoded]]:
        """The rows of each party."""
        args = self.args
        labels = [row.gold for row in self.train]
        parts = label_skew(
            labels, args.parties, alpha=args.alpha, seed=seed, min_rows=2 * args.rows
        )
        return [[self.train[i] for i in part] for part in parts]

    def losses(self, rows: list[Encoded], model: nn.Module, seed: int) -> Iterator[Any]:
        """Closures, each the loss of a batch under random reshuffling."""
        generator, order = random.Random(seed), []  # type: ignore[var-annotated]
        while True:
            if len(order) < self.args.rows:
                order = list(range(len(rows)))
                generator.shuffle(order)
            batch = self.collator([rows[order.pop()] for _ in range(self.args.rows)])
            yield partial(self.loss, model, batch)

    @staticmethod
    def loss(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        """The rows' shares of the loss, [rows]."""
        loss, values = objective_losses(model, batch)  # [], and [rows] without a graph
        return (values + (loss - loss.detach())) / len(values)

    def run(self, name: str, rates: tuple[float, float], seed: int) -> dict[str, Any]:
        """Return a finished run, or make it."""
        for run in self.runs:
            if (run["name"], tuple(run["rates"]), run["seed"]) == (name, rates, seed):
                return run
        made = full_run if name == "full" else adapter_run
        curve = made(self, rates, seed)
        run = {"name": name, "rates": rates, "seed": seed, "curve": curve}
        self.runs.append(run)
        about = {k: v for k, v in vars(self.args).items() if k != "json"}
        text = json.dumps({"options": about, "runs": self.runs}, indent=1)
        self.args.json.write_text(text + "\n")
        return run

    def point(self, model: nn.Module, number: int, base: int, other: int, label: str) -> Any:
        """A point of a curve: the round, bytes so far, dev and test accuracy, dev loss."""
        model.eval()
        dev, test = (evaluate(model, rows, self.collator) for rows in (self.dev, self.test))
        values = {"dev": dev.accuracy, "test": test.accuracy, "dev_loss": dev.loss}
        print(f"{label} round {number}: {base + other} bytes", values, flush=True)
        return {"round": number, "base_bytes": base, "other_bytes": other, **values}

    def is_due(self, number: int) -> bool:
        """Whether the model is evaluated after a round."""
        return number % self.args.every == 0 or number == self.args.rounds


def mean_of(values: list[tuple[dict[str, Tensor], int]]) -> dict[str, Tensor]:
    """FedAvg: the mean, weighted by the numbers of examples."""
    whole = sum(num for _, num in values)
    names = values[0][0]
    return {n: sum(v[n] * (num / whole) for v, num in values) for n in names}  # type: ignore[misc]


def adapter_run(study: Study, rates: tuple[float, float], seed: int) -> list[Any]:
    """A run of lora, whose base_lr is 0, or of hybrid."""
    args, parts = study.args, study.parts(seed)
    options = FederatedOptions(
        num_steps=args.steps,
        base_lr=rates[0],
        adapter_lr=rates[1],
        seed=seed,
        eps=1e-4,
        distribution="rank-one",
        directions_per_step="rows",
    )
    party = Party(lambda: study.model(seed, has_adapter=True), options)  # all parties share it
    data = [LocalData(len(rows), partial(study.losses, rows)) for rows in parts]
    coordinator, adapter = Coordinator(party.log.copy()), party.adapter
    copies: list[Any] = [None] * args.parties
    size = sum(t.nbytes for t in adapter.values())
    generator, base, other = random.Random(seed), 0, 0
    label = f"base {rates[0]:g} adapter {rates[1]:g} seed {seed}"
    curve = [study.point(party.model, 0, 0, 0, label)]
    for number in range(1, args.rounds + 1):
        replies, adapters = {}, []
        asked = generator.sample(range(args.parties), args.asked)
        for i, task in coordinator.tasks(asked, trains=True).items():

            def work(read: Any, i: int = i, adapter: Any = adapter) -> Any:
                party.adapter = adapter
                return record_of(party.train(read.log, data[i], read.first_step), read.log)

            record, copies[i] = answer(work, party, copies[i], task)
            replies[i] = record, len(parts[i])
            adapters.append((party.adapter, len(parts[i])))
            if rates[0]:  # lora needs no records of the base
                base += num_bytes(task) + num_bytes(record)
            other += 2 * size
        left_out = coordinator.join(replies)
        assert not left_out, left_out
        adapter = mean_of(adapters)
        if study.is_due(number):
            party.follow(coordinator.log)
            party.adapter = adapter
            curve.append(study.point(party.model, number, base, other, label))
    return curve


def full_run(study: Study, rates: tuple[float, float], seed: int) -> list[Any]:
    """FedAvg of the whole model."""
    args, parts = study.args, study.parts(seed)
    model = study.model(seed, has_adapter=False)
    weights = dict(model.named_parameters())
    state = {name: p.detach().clone() for name, p in weights.items()}
    size = sum(t.nbytes for t in state.values())
    generator, step, other = random.Random(seed), 0, 0
    label = f"full {rates[0]:g} seed {seed}"
    curve = [study.point(model, 0, 0, 0, label)]

    def put(values: dict[str, Tensor]) -> None:
        with torch.no_grad():
            for name, p in weights.items():
                p.copy_(values[name])

    for number in range(1, args.rounds + 1):
        found = []
        for i in sorted(generator.sample(range(args.parties), args.asked)):
            put(state)
            groups = param_groups(model, "fo-ft", base_lr=rates[0])
            optimizer = HybridOptimizer(groups, model, optimizer="AdamW")
            closures = study.losses(parts[i], model, local_seed(seed, step))
            model.train()
            for _, closure in zip(range(args.steps), closures, strict=False):
                optimizer.step(closure)
            step += args.steps
            found.append(({n: p.detach().clone() for n, p in weights.items()}, len(parts[i])))
            other += 2 * size
        state = mean_of(found)
        if study.is_due(number):
            put(state)
            curve.append(study.point(model, number, 0, other, label))
    return curve


def best(run: dict[str, Any]) -> dict[str, Any]:
    """The point of the lowest dev loss."""
    return min(run["curve"], key=lambda point: point["dev_loss"])


def main() -> None:
    args = parse()
    study = Study(args)
    first = args.seeds[0]

    def chosen(name: str, grid: list[tuple[float, float]]) -> tuple[float, float]:
        return min(grid, key=lambda rates: best(study.run(name, rates, first))["dev_loss"])

    lora = chosen("lora", [(0.0, rate) for rate in RATES["lora"]])
    rates = {
        "lora": lora,
        "full": chosen("full", [(rate, 0.0) for rate in RATES["full"]]),
        "hybrid": chosen("hybrid", [(rate, lora[1]) for rate in RATES["hybrid"]]),
    }
    for seed in args.seeds:  # seed after seed, so that an early end leaves whole comparisons
        for name, pair in rates.items():
            study.run(name, pair, seed)
    print_table(
        {name: [study.run(name, pair, s) for s in args.seeds] for name, pair in rates.items()}
    )


def print_table(runs: dict[str, list[dict[str, Any]]]) -> None:
    """Print accuracy over rounds and over bytes, means over the seeds."""
    print("| method | base_lr, adapter_lr | round | MB | of them the base | test, % | dev loss |")
    print("|---|---|---:|---:|---:|---:|---:|")
    for name, group in runs.items():
        base_lr, adapter_lr = group[0]["rates"]
        for points in zip(*(run["curve"] for run in group), strict=True):
            mean = {key: statistics.mean(point[key] for point in points) for key in points[0]}
            each = ", ".join(f"{100 * point['test']:.1f}" for point in points)
            print(
                f"| {name} | {base_lr:g}, {adapter_lr:g} | {points[0]['round']} "
                f"| {(mean['base_bytes'] + mean['other_bytes']) / 1e6:.1f} "
                f"| {mean['base_bytes'] / 1e6:.3f} | {100 * mean['test']:.1f} ({each}) "
                f"| {mean['dev_loss']:.3f} |"
            )


if __name__ == "__main__":
    main()
