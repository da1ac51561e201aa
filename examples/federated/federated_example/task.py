"""What server and parties share: the model, and the rows of each party."""

import random
from collections.abc import Iterator
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor, nn

from zofo import create_adapter, load_model
from zofo.federated import LocalData, label_skew
from zofo.scoring.evaluate import evaluate
from zofo.tasks.encode import Collator, Encoded, Encoder
from zofo.tasks.load import load_splits
from zofo.tasks.losses import objective_losses
from zofo.tasks.spec import TaskSpec

BATCH = 8


def make_model(context: Any = None) -> nn.Module:
    """MiniLM with a new head and LoRA, the same on every party."""
    torch.manual_seed(0)
    model, _ = load_model("minilm", head="classification")
    return create_adapter(model, "lora", head="classification")


@cache
def rows(num_train: int) -> tuple[list[Encoded], list[Encoded], Collator]:
    """Training rows, test rows and the function that makes batches."""
    _, tokenizer = load_model("minilm", head="classification")
    encode = Encoder(tokenizer, head="classification", max_length=48)
    splits = load_splits(TaskSpec(name="rotten-tomatoes", num_train=num_train, num_test=200))
    train, test = ([encode(row) for row in part] for part in (splits.train, splits.test))
    return train, test, Collator(tokenizer.pad_token_id)


def shares(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    """The rows' shares of the loss, whose sum is the loss: [rows]."""
    loss, values = objective_losses(model, batch)  # [], and [rows] without a graph
    return (values + (loss - loss.detach())) / len(values)


def batches(own: list[Encoded], collator: Collator, model: nn.Module, seed: int) -> Iterator[Any]:
    """Losses of batches without an end; every row comes once before any comes again."""
    generator = random.Random(seed)
    order: list[int] = []
    while True:
        if len(order) < BATCH:
            order = list(range(len(own)))
            generator.shuffle(order)
        yield partial(shares, model, collator([own[order.pop()] for _ in range(BATCH)]))


def make_data(context: Any) -> LocalData:
    """The rows of one party, which `partition-id` names."""
    config = context.run_config
    train, test, collator = rows(int(config["num-train"]))
    parts = label_skew(
        [row.gold for row in train],
        int(config["num-parties"]),
        alpha=float(config["alpha"]),
        min_rows=BATCH,
    )
    own = [train[i] for i in parts[int(context.node_config["partition-id"])]]

    def metrics(model: nn.Module) -> dict[str, float]:
        found = evaluate(model, test, collator)
        return {"accuracy": found.accuracy, "loss": found.loss, "num-examples": len(test)}

    return LocalData(len(own), partial(batches, own, collator), metrics)
