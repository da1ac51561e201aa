"""Trainers on tiny models, for tests of Trainer's loop."""

from __future__ import annotations

import json

import torch
from torch.utils.data import Dataset
from transformers import TrainerCallback

from tests.support.models import VOCABULARY, bits, build
from zofo.trainer.mixin import HybridArguments, HybridTrainer

SEED = 3


class Rows(Dataset):
    """Rows with different numbers of scored positions, so that the batches' weights matter."""

    def __init__(self, num_rows=12, *, classes=0, seed=1):
        generator = torch.Generator().manual_seed(seed)
        self.ids = torch.randint(1, VOCABULARY, (num_rows, 7), generator=generator)
        self.classes, self.seen = classes, []

    def __len__(self):
        return len(self.ids)

    def __getitem__(self, i):
        self.seen.append(i)
        ids = self.ids[i]
        labels = torch.where(torch.arange(7) < i % 4, -100, ids)
        if self.classes:
            labels = torch.tensor(i % self.classes)
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}


def plain_options(folder, **changes):
    return {
        "output_dir": str(folder),
        "per_device_train_batch_size": 2,
        "per_device_eval_batch_size": 4,
        "max_steps": 4,
        "learning_rate": 1e-2,
        "optim": "sgd",
        "lr_scheduler_type": "linear",
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "use_cpu": True,
        "seed": SEED,
        **changes,
    }


def arguments(folder, **changes):
    return HybridArguments(**{**plain_options(folder), "base_lr": 1e-3, **changes})


def trainer_for(folder, model=None, *, cls=HybridTrainer, rows=None, callbacks=None, **changes):
    return cls(
        model=build("llama", "lora") if model is None else model,
        args=arguments(folder, **changes),
        train_dataset=Rows() if rows is None else rows,
        eval_dataset=Rows(4, seed=2),
        callbacks=callbacks,
    )


def history(trainer, key):
    return [row[key] for row in trainer.state.log_history if key in row]


def untimed_logs(trainer):
    drop = ("runtime", "per_second", "memory")
    rows = trainer.state.log_history
    return [{k: v for k, v in row.items() if not any(d in k for d in drop)} for row in rows]


class Recorder(TrainerCallback):
    """Records the generator's state at the first step, and the weights after each step."""

    def __init__(self):
        self.generator, self.weights, self.losses = None, {}, []

    def on_step_begin(self, args, state, control, **kwargs):
        if self.generator is None:
            self.generator = torch.get_rng_state()

    def on_step_end(self, args, state, control, model=None, **kwargs):
        self.weights[state.global_step] = bits(model)


def untimed_metrics(path):
    """Return the entries of a metrics.jsonl without times and memory, which differ between runs."""
    drop = ("runtime", "per_second", "memory", "elapsed")
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    return [{k: v for k, v in row.items() if not any(d in k for d in drop)} for row in rows]
