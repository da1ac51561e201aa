"""Hybrid fine-tuning with `transformers.Trainer`.

Three lines differ from a usual script: the import, `HybridArguments` instead of
`TrainingArguments`, and `HybridTrainer` instead of `Trainer`. `learning_rate` is still the learning
rate of the adapter, and `base_lr` is that of the base. The script runs on the CPU in seconds:

    python examples/hf_trainer.py

It also takes a model from the hub:

    python examples/hf_trainer.py --model HuggingFaceTB/SmolLM2-135M --base-lr 1e-5 --lr 1e-3
"""

import argparse

import peft
import torch
from tiny import DEV, TRAIN, accuracy, collate, encode, load

from zofo import HybridArguments, HybridTrainer, load_checkpoint


def main() -> None:
    parser = argparse.ArgumentParser(description="Hybrid fine-tuning with Trainer.")
    parser.add_argument("--model", help="a causal language model; default: a tiny untrained Llama")
    parser.add_argument("--base-lr", type=float, default=2e-3)
    parser.add_argument("--lr", type=float, default=1e-2, help="of the adapter")
    parser.add_argument("--epochs", type=int, default=30)
    parser.add_argument("--output", default="runs/hf_trainer", help="folder for checkpoints")
    args = parser.parse_args()

    torch.manual_seed(0)
    base, tokenizer = load(args.model)
    model = peft.get_peft_model(base, peft.LoraConfig(task_type="CAUSAL_LM", r=4))
    trainer = HybridTrainer(
        model=model,
        args=HybridArguments(
            output_dir=args.output,
            base_lr=args.base_lr,
            learning_rate=args.lr,
            num_train_epochs=args.epochs,
            per_device_train_batch_size=8,
            logging_steps=20,
            eval_strategy="epoch",
            save_strategy="epoch",
            save_total_limit=1,
            load_best_model_at_end=True,
            report_to="none",
            dataloader_pin_memory=torch.cuda.is_available(),
        ),
        train_dataset=encode(tokenizer, TRAIN),
        eval_dataset=encode(tokenizer, DEV),
        data_collator=collate,
    )
    trainer.train()
    trainer.save_model(f"{args.output}/best")
    print(f"dev accuracy {accuracy(model, tokenizer, DEV):.2f}")

    # The folder holds the adapter and the updates of the base. Load it on the original base.
    original, _ = load(args.model)
    loaded = load_checkpoint(original, f"{args.output}/best")
    print(f"loaded again: dev accuracy {accuracy(loaded, tokenizer, DEV):.2f}")


if __name__ == "__main__":
    main()
