"""Run folders as `zofo train` and a study write them, without any training."""

from __future__ import annotations

import json
import random
from pathlib import Path

from zofo.config.schema import RunConfig

FULL = ("fo-ft", "zo-ft")
COST = {"hybrid": 3.0, "fo-peft": 2.0, "zo-peft": 2.0, "fo-ft": 3.0, "zo-ft": 2.0}
ENVIRONMENT = {
    "python": "3.11.2",
    "platform": "Linux",
    "num_threads": 1,
    "devices": [],
    "packages": {"zofo": "0.1.0", "torch": "2.6.0"},
}


def write_run(
    folder: Path,
    *,
    model="tiny",
    task="rte",
    method="hybrid",
    adapter="lora",
    optimizer="adamw",
    base_lr=1e-5,
    adapter_lr=1e-3,
    seed=0,
    accuracy: float | None = 0.7,
    dev=(0.7, 0.6, 0.55),
    every=10,
    study: dict | None = None,
    result=True,
    seconds_per_step=0.5,
    memory=500 << 20,
    **options,
) -> Path:
    """Write a run folder.

    Args:
        accuracy: on test. None stands for a run that measured dev only, as a search does.
        dev: losses on dev, one every `every` steps.
        study: entries of study.json that replace those from the other arguments.
        result: whether the run has ended.
        options: other keys of the configuration.
    """
    folder.mkdir(parents=True)
    adapter = "none" if method in FULL else adapter
    base_lr = base_lr if method in ("hybrid", *FULL) else None
    adapter_lr = adapter_lr if method not in FULL else None
    steps = every * len(dev)
    config = RunConfig.model_validate(
        {
            "method": method,
            "model": {"name": model},
            "task": {"name": task},
            "adapter": {"type": adapter},
            "optimizer": optimizer,
            "base_lr": base_lr,
            "adapter_lr": adapter_lr,
            "seed": seed,
            "steps": steps,
            "output_dir": str(folder),
            **options,
        }
    )
    (folder / "run.yaml").write_text(config.to_yaml())
    (folder / "environment.json").write_text(json.dumps(ENVIRONMENT))
    write_metrics(folder, method, dev, every, seconds_per_step, memory)
    if study is not None:
        record = {
            "study": "mine",
            "id": folder.name,
            "stage": "final",
            "cell": {
                "model": model,
                "task": task,
                "method": method,
                "adapter": adapter,
                "optimizer": optimizer,
            },
            "rates": {"base_lr": base_lr, "adapter_lr": adapter_lr},
            "seed": seed,
            "chosen": False,
            "status": "done",
            "error": None,
        }
        (folder / "study.json").write_text(json.dumps(record | study))
    if result:
        write_result(folder, config, accuracy, steps, seconds_per_step, memory)
    return folder


def write_metrics(folder, method, dev, every, seconds_per_step, memory):
    lines = []
    for number, loss in enumerate(dev, 1):
        step = number * every
        spent = {
            "forward_equivalents": step * COST[method],
            "elapsed_s": round(step * seconds_per_step, 3),
        }
        train = {"loss": 0.7, "learning_rate": 1e-3, "peak_memory_bytes": memory}
        lines.append({"step": step, **train, **spent})
        lines.append({"step": step, "eval_loss": loss, "eval_accuracy": 0.6, **spent})
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def write_result(folder, config, accuracy, steps, seconds_per_step, memory):
    scores = {
        "num_rows": 200,
        "loss": 0.6,
        "accuracy_low": 0.0,
        "accuracy_high": 1.0,
        "majority": 0.55,
    }
    summary = {
        "method": config.method,
        "task": config.task.name,
        "seed": config.seed,
        "best_dev": 0.5,
        "cost": {
            "steps": steps,
            "train_s": steps * seconds_per_step + 7,
            "total_s": steps * seconds_per_step + 9,
            "forward_equivalents": steps * COST[config.method],
            "peak_memory_bytes": memory,
            "artifact_bytes": 100_000 + 20 * steps * (config.method == "hybrid"),
        },
        "notes": [],
    }
    if accuracy is not None:
        summary["test"] = {
            "before": {**scores, "accuracy": 0.5, "auc": 0.5},
            "after": {**scores, "accuracy": accuracy, "auc": min(1.0, accuracy + 0.05)},
        }
    (folder / "result.json").write_text(json.dumps(summary))
    (folder / "artifact").mkdir()
    (folder / "artifact" / "zofo.json").write_text("{}")


def add_rewards(folder: Path, *, prompts=("a?", "b?"), before=None, after=None, gain=0.5) -> Path:
    """Add to a run folder what a run with rewards writes.

    Args:
        prompts: held-out prompts, which are also those of training.
        before, after: the answer to each held-out prompt.
        gain: mean reward on the held-out prompts after training; it was 0 before.
    """
    before = before or [f"old answer to {prompt}" for prompt in prompts]
    after = after or [f"{folder.name}'s answer to {prompt}" for prompt in prompts]
    lines, samples = [], []
    for line in map(json.loads, (folder / "metrics.jsonl").read_text().splitlines()):
        step = line["step"]
        if "eval_loss" in line:
            line["eval_drift"] = step / 1000
        else:
            line |= {"reward": step / 100, "reward_spread": 0.1, "reward_best": step / 50}
            line |= {"answers_differ": 0.9, "answer_words": 4.5, "answers_left_out": 1.0}
            entries = [(f"at step {step}", step / 100), ("no score", None)]
            samples += [
                {"step": step, "prompt": prompt, "answer": answer, "reward": reward}
                for prompt, (answer, reward) in zip(prompts, entries, strict=False)
            ]
        lines.append(line)
    held_out = [
        {"prompt": p, "before": old, "reward_before": 0.0, "after": new, "reward_after": gain}
        for p, old, new in zip(prompts, before, after, strict=True)
    ]
    for name, entries in (
        ("metrics.jsonl", lines),
        ("answers.jsonl", samples),
        ("held_out_answers.jsonl", held_out),
    ):
        text = "".join(json.dumps(entry, ensure_ascii=False) + "\n" for entry in entries)
        (folder / name).write_text(text)
    if (folder / "result.json").exists():
        result = json.loads((folder / "result.json").read_text())
        result["rewards"] = {"before": {"reward": 0.0}, "after": {"reward": gain}}
        result["dev"] = {"after": {"drift": lines[-1]["eval_drift"]}}
        (folder / "result.json").write_text(json.dumps(result))
    return folder


BASE = {"rte": 0.62, "sst2": 0.86, "boolq": 0.66}
GAIN = {"hybrid": 0.03, "fo-peft": 0.0, "zo-ft": -0.05, "fo-ft": 0.04}


def write_study(folder: Path, *, tasks=("rte", "sst2", "boolq"), seeds=(0, 1, 2)) -> Path:
    """Write a study of four methods, three tasks and three seeds.

    It includes a search over rates and runs that failed.
    """
    generator = random.Random(5)
    runs = folder / "runs"
    for task in tasks:
        for base_lr in (1e-6, 1e-5, 1e-4):
            for adapter_lr in (1e-4, 1e-3, 1e-2):
                is_best = (base_lr, adapter_lr) == (1e-5, 1e-3)
                loss = 0.5 if is_best else 0.55 + generator.random() / 5
                write_run(
                    runs / f"search-{task}-{base_lr:g}-{adapter_lr:g}",
                    task=task,
                    base_lr=base_lr,
                    adapter_lr=adapter_lr,
                    accuracy=None,
                    dev=(0.7, loss + 0.05, loss),
                    study={"stage": "search", "chosen": is_best},
                )
        for method, gain in GAIN.items():
            for seed in seeds:
                better = BASE[task] + gain + generator.gauss(0, 0.01)
                end = 0.7 - gain - generator.random() / 50
                write_run(
                    runs / f"{task}-{method}-{seed}",
                    task=task,
                    method=method,
                    seed=seed,
                    accuracy=round(better * 200) / 200,
                    dev=tuple(end + 0.3 * 0.6**k for k in range(8)),
                    seconds_per_step={"hybrid": 0.7, "zo-ft": 0.6, "fo-ft": 0.9}.get(method, 0.5),
                    memory={"hybrid": 520, "zo-ft": 480, "fo-ft": 1900}.get(method, 500) << 20,
                    study={"chosen": True},
                )
    write_run(
        runs / "rte-hybrid-9",
        seed=9,
        dev=(0.7,),
        result=False,
        study={"status": "failed", "error": "RuntimeError: out of <memory>"},
    )
    write_run(runs / "rte-fo-peft-9", method="fo-peft", seed=9, dev=(0.7, 0.65), result=False)
    return folder
