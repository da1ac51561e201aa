"""Hybrid fine-tuning in a custom training loop.

A LoRA adapter moves by its gradient. Every weight of the base moves by loss differences along
random directions. One optimizer steps both. The script runs on the CPU in seconds:

    python examples/minimal_loop.py

It also takes a model from the hub:

    python examples/minimal_loop.py --model HuggingFaceTB/SmolLM2-135M --base-lr 1e-5 --lr 1e-3
"""

import argparse

import peft
import torch
from tiny import DEV, TRAIN, accuracy, collate, encode, load
from torch.utils.data import DataLoader

from zofo import HybridOptimizer, ReshufflingSampler, param_groups


def main() -> None:
    parser = argparse.ArgumentParser(description="Hybrid fine-tuning in a bare loop.")
    parser.add_argument("--model", help="a causal language model; default: a tiny untrained Llama")
    parser.add_argument("--base-lr", type=float, default=2e-3)
    parser.add_argument("--lr", type=float, default=1e-2, help="of the adapter")
    parser.add_argument("--epochs", type=int, default=30)
    args = parser.parse_args()

    torch.manual_seed(0)
    model, tokenizer = load(args.model)
    model = peft.get_peft_model(model, peft.LoraConfig(task_type="CAUSAL_LM", r=4))
    rows = encode(tokenizer, TRAIN)
    loader = DataLoader(
        rows, batch_size=8, sampler=ReshufflingSampler(len(rows), seed=0), collate_fn=collate
    )
    groups = param_groups(model, "hybrid", base_lr=args.base_lr, adapter_lr=args.lr)
    optimizer = HybridOptimizer(groups, model, optimizer="AdamW", max_grad_norm=1.0)

    for epoch in range(args.epochs):
        model.train()
        losses = []
        for batch in loader:
            # A step runs a forward pass, a backward pass, and one more forward pass at the
            # perturbed base. It then updates the base and the adapter.
            loss = optimizer.step(lambda batch=batch: model(**batch).loss)
            losses.append(float(loss))
        if epoch % 5 == 4:
            score = accuracy(model, tokenizer, DEV)
            print(
                f"epoch {epoch + 1}: loss {sum(losses) / len(losses):.3f}, dev accuracy {score:.2f}"
            )


if __name__ == "__main__":
    main()
