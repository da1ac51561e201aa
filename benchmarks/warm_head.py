"""Write a model folder whose new classification head already fits a task.

A new head begins at random, and zeroth-order steps then spend most of a short run on it. A study
compares how methods move the base, so all of them begin with the same fitted head: a logistic
regression on the frozen model's features (linear probing). Its rows are training rows of the task
that no seed of the study holds out. Dropout is switched off, so that a step costs the same for all
methods.

    python benchmarks/warm_head.py --task sst2 --data-dir DIR --to studies/heads/minilm-sst2
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from zofo import load_model
from zofo.models.loading import load_tokenizer
from zofo.tasks.encode import Collator, Encoder
from zofo.tasks.load import load_splits
from zofo.tasks.spec import TaskSpec


def main() -> None:
    args = parse()
    torch.set_num_threads(args.threads)
    spec = TaskSpec(
        name=args.task,
        data_dir=args.data_dir,
        num_train=args.num_train,
        num_dev=args.num_dev,
        num_test=1,
        max_length=args.max_length,
    )
    drawn = [load_splits(spec, seed=seed) for seed in args.seeds]
    held_out = {row.row for splits in drawn for row in splits.dev}
    train = [row for row in drawn[0].train if row.row not in held_out]
    model, tokenizer = load_model(
        args.model, head="classification", num_labels=len(drawn[0].labels)
    )
    if args.layers is not None:
        model.base_model.encoder.layer = model.base_model.encoder.layer[: args.layers]
        model.config.num_hidden_layers = args.layers
    encode = Encoder(tokenizer, head="classification", max_length=args.max_length)
    features, gold = features_of(model, [encode(row) for row in train], tokenizer.pad_token_id)
    fit(model.classifier, features, gold)
    for key in ("hidden_dropout_prob", "attention_probs_dropout_prob", "classifier_dropout"):
        setattr(model.config, key, 0.0)
    model.config.id2label = dict(enumerate(drawn[0].labels))
    model.config.label2id = {name: i for i, name in enumerate(drawn[0].labels)}
    model.save_pretrained(args.to)
    load_tokenizer(args.model).save_pretrained(args.to)
    right = (model.classifier(features).argmax(1) == gold).float().mean()
    print(f"{args.to}: {len(train)} rows, accuracy on them {float(right):.3f}")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", default="minilm")
    parser.add_argument("--task", required=True)
    parser.add_argument("--data-dir")
    parser.add_argument("--num-train", type=int, default=1000)
    parser.add_argument("--num-dev", type=int, default=300)
    parser.add_argument("--max-length", type=int, default=16)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--layers", type=int, help="keep so many of the first layers")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--to", type=Path, required=True)
    return parser.parse_args()


@torch.no_grad()
def features_of(model: Any, rows: list[Any], pad: int) -> tuple[Tensor, Tensor]:
    """What the head reads for each row: [rows, hidden size], and the classes: [rows]."""
    found: list[Tensor] = []
    handle = model.classifier.register_forward_pre_hook(lambda _, args: found.append(args[0]))
    model.eval()
    collator, gold = Collator(pad), []
    for start in range(0, len(rows), 32):
        batch = collator(rows[start : start + 32])
        gold.append(batch["gold"])
        model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"])
    handle.remove()
    return torch.cat(found), torch.cat(gold)


def fit(head: torch.nn.Linear, features: Tensor, gold: Tensor, decay: float = 1e-3) -> None:
    """Logistic regression with an L2 penalty, to convergence."""
    torch.nn.init.zeros_(head.weight)
    torch.nn.init.zeros_(head.bias)
    optimizer = torch.optim.LBFGS(head.parameters(), max_iter=200, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = functional.cross_entropy(head(features), gold)
        loss = loss + decay * head.weight.square().sum()
        loss.backward()
        return loss

    optimizer.step(closure)  # type: ignore[arg-type]


if __name__ == "__main__":
    main()
