"""Hybrid supervised fine-tuning with `trl.SFTTrainer`.

The mixin stands before any trainer class that derives from Trainer. Its options are an argument of
their own beside trl's configuration. The rows are prompts with completions, as trl expects them.
The script runs on the CPU in seconds:

    python examples/trl_sft.py

It also takes a model from the hub:

    python examples/trl_sft.py --model HuggingFaceTB/SmolLM2-135M --base-lr 1e-5 --lr 1e-3
"""

import argparse

import datasets
import peft
import torch
from tiny import DEV, TRAIN, accuracy, load, prompt
from trl import SFTConfig, SFTTrainer

from zofo import HybridMixin, HybridOptions


class HybridSFTTrainer(HybridMixin, SFTTrainer):
    """`SFTTrainer` with hybrid steps."""


def rows(reviews: list[tuple[str, str]]) -> datasets.Dataset:
    return datasets.Dataset.from_list(
        [{"prompt": prompt(review), "completion": label} for review, label in reviews]
    )


def main() -> None:
    parser = argparse.ArgumentParser(description="Hybrid fine-tuning with trl.")
    parser.add_argument("--model", help="a causal language model; default: a tiny untrained Llama")
    parser.add_argument("--base-lr", type=float, default=2e-3)
    parser.add_argument("--lr", type=float, default=1e-2, help="of the adapter")
    parser.add_argument("--epochs", type=int, default=30)
    parser.add_argument("--output", default="runs/trl_sft", help="folder for checkpoints")
    args = parser.parse_args()

    torch.manual_seed(0)
    model, tokenizer = load(args.model)
    trainer = HybridSFTTrainer(
        model=model,
        args=SFTConfig(
            output_dir=args.output,
            learning_rate=args.lr,
            num_train_epochs=args.epochs,
            per_device_train_batch_size=8,
            logging_steps=20,
            eval_strategy="epoch",
            save_strategy="no",
            report_to="none",
            dataloader_pin_memory=torch.cuda.is_available(),
            bf16=torch.cuda.is_available(),
        ),
        train_dataset=rows(TRAIN),
        eval_dataset=rows(DEV),
        processing_class=tokenizer,
        peft_config=peft.LoraConfig(task_type="CAUSAL_LM", r=4),
        hybrid=HybridOptions(base_lr=args.base_lr),
    )
    trainer.train()
    trainer.save_model(f"{args.output}/final")
    print(f"dev accuracy {accuracy(trainer.model, tokenizer, DEV):.2f}")


if __name__ == "__main__":
    main()
