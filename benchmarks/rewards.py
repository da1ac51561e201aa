"""Compare ways to make SmolLM2 earn a reward, at equal numbers of tokens through the model.

    examples   LoRA by its gradient on rows with right answers (AdamW)
    es         evolution strategy on the reward, all base weights, no adapter
    anchored   es with `base_anchor`
    hybrid     LoRA on the same rows, and the base on the reward, in one run
    grpo       LoRA by TRL's GRPO on the reward

    json   chat prompts that ask for the sentiment of a film review as JSON. Half of the reward is
           for JSON, the other half for the schema. The rows with right answers hold the label.
    sums   plain prompts of reasoning-gym's chain_sum with two numbers of one digit

The reward of held-out prompts is that of the likeliest answers. Tokens count a forward pass once
and a backward pass twice more, padding included. Seconds are those of the CPU. The rates of
sums are the best of a grid on the first seed. `auc` and `loss`, with sums, are those of film
reviews by the next word after "It was". `right` is the share of answers that are the right one to
the letter, which only the rows with right answers show. The JSON file holds every finished run, and
a second call continues with the others. At the end a table of all runs is printed.

    python benchmarks/rewards.py --json benchmarks/results/rewards.json
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.nn.functional import cross_entropy
from transformers import DataCollatorForSeq2Seq, TrainerCallback

from zofo import (
    HybridArguments,
    HybridTrainer,
    RewardOptions,
    RewardSource,
    create_adapter,
    load_model,
)
from zofo.scoring.drift import Drift
from zofo.statistics.estimates import mean_interval
from zofo.tasks.load import load_splits
from zofo.tasks.rows import read_table
from zofo.tasks.spec import TaskSpec

EPS = 1e-2
"""About six of ten answers to a prompt differ at it; three at 3e-3; all at 3e-2, in bad words."""
RATES: dict[str, list[float]] = {
    "es": [2e-4, 4e-4],
    "examples": [1e-3],
    "hybrid": [1e-4, 4e-4],
    "grpo": [1e-3, 3e-3],
    "anchored": [4e-4],
}
"""Rates of the base, or else of LoRA. The LoRA of hybrid has that of `examples`."""
CHOSEN = {"es": 2e-4, "examples": 1e-3, "hybrid": 2e-4, "grpo": 1e-3}
"""Rates of json, without a grid; those of a base are halved, as a step has half as many answers.

The anchor is measured on sums only.
"""
SHARE = 0.05
"""What `anchored` goes back of the way to the original base in a step."""
SUMS = "reasoning-gym:chain_sum?min_terms=2&max_terms=2&min_digits=1&max_digits=1&size=1500"
SCHEMA = {
    "type": "object",
    "properties": {"sentiment": {"enum": ["positive", "negative"]}},
    "required": ["sentiment"],
    "additionalProperties": False,
}
ASK = (
    'Give the sentiment of this film review as JSON, such as {{"sentiment": "..."}}.\n\nReview: {}'
)
HELD = {"sums": 80, "json": 48}
TOKENS = {"sums": 25_000, "json": 35_000}
"""Tokens through the model in a run, after which its last step ends."""
FILMS = 100


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--tasks", nargs="+", default=["sums", "json"])
    parser.add_argument("--contenders", nargs="+", default=list(RATES))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--json", type=Path, required=True)
    return parser.parse_args()


class Tokens(TrainerCallback):
    """Counts the tokens that pass through a model, and ends a run after a number of them."""

    def __init__(self, model: Any, most: int) -> None:
        self.most, self.num, self.curve = most, 0, list[list[float]]()
        model.register_forward_pre_hook(self._count, with_kwargs=True)

    def _count(self, model: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        ids = kwargs["input_ids"] if "input_ids" in kwargs else args[0]
        self.num += ids.numel() * (3 if torch.is_grad_enabled() else 1)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Stop at the end of the budget."""
        control.should_training_stop = self.num >= self.most

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        """Keep the mean reward of a step's answers."""
        if logs and "reward" in logs:
            self.curve.append([self.num, round(float(logs["reward"]), 4)])


class Study:
    """The prompts of a task, and the finished runs."""

    def __init__(self, args: argparse.Namespace, task: str) -> None:
        self.args, self.task = args, task
        self.folder = Path(tempfile.mkdtemp())
        self.runs: list[dict[str, Any]] = []
        if args.json.exists():
            self.runs = json.loads(args.json.read_text())["runs"]
        films = load_splits(TaskSpec(name="rotten-tomatoes", num_train=2000, num_dev=FILMS))
        self.films = [row.prompt for row in films.dev]
        self.labels = np.array([row.gold for row in films.dev])
        if task == "sums":
            unique = {row["prompt"]: dict(row) for _, row in read_table(SUMS).rows}
            rows = list(unique.values())
            random.Random(0).shuffle(rows)
            self.reward: Any = "reasoning-gym"
            self.options = RewardOptions(num_answers=8, batch_size=8, max_new_tokens=4)
        else:
            rows = [_as_json(row) for row in films.train if len(row.prompt.split()) <= 20]
            schema = self.folder / "schema.json"
            schema.write_text(json.dumps(SCHEMA))
            self.reward = {"json": 0.5, f"json:{schema}": 0.5}
            self.options = RewardOptions(num_answers=8, batch_size=4, max_new_tokens=14)
        self.held, self.train = rows[: HELD[task]], rows[HELD[task] :]

    def before(self) -> dict[str, Any]:
        """The figures of the model before training."""
        for known in self.runs:
            if (known["task"], known["name"]) == (self.task, "before"):
                return known
        first = load_model("smollm2-135m")
        measured = self.measure(*first, Drift(*first))
        return self._keep({"task": self.task, "name": "before", **measured})

    def run(self, name: str, rate: float, seed: int) -> dict[str, Any]:
        """Finish a run, or return it if it is finished."""
        asked = {
            "task": self.task,
            "name": name,
            "rate": rate,
            "seed": seed,
            "budget": TOKENS[self.task],
        }
        for known in self.runs:
            if asked.items() <= known.items():
                return known
        model, tokenizer = load_model("smollm2-135m")
        drift = Drift(model, tokenizer)
        if name not in ("es", "anchored"):
            model = create_adapter(model, "lora", targets=["q_proj", "v_proj"], seed=seed)
        base = model.get_base_model() if hasattr(model, "peft_config") else model
        tokens = Tokens(base, TOKENS[self.task])
        begun, cpu = time.perf_counter(), time.process_time()
        steps = self._train(name, rate, seed, model, tokenizer, tokens)
        found: dict[str, Any] = {
            **asked,
            "steps": steps,
            "tokens": tokens.num,
            "cpu_seconds": time.process_time() - cpu,
            "wall_seconds": time.perf_counter() - begun,
            "curve": tokens.curve,
            **self.measure(model, tokenizer, drift),
        }
        return self._keep(found)

    def _keep(self, found: dict[str, Any]) -> dict[str, Any]:
        """Add finished figures to the file."""
        if self.args.json.exists():  # Another process may have added some.
            self.runs = json.loads(self.args.json.read_text())["runs"]
        self.runs.append(found)
        self.args.json.write_text(json.dumps({"runs": self.runs}, indent=1) + "\n")
        print({k: v for k, v in found.items() if k not in ("curve", "answers")}, flush=True)
        return found

    def _train(
        self, name: str, rate: float, seed: int, model: Any, tokenizer: Any, tokens: Tokens
    ) -> int:
        common: dict[str, Any] = {
            "output_dir": str(self.folder),
            "max_steps": 10_000,
            "lr_scheduler_type": "constant",
            "logging_steps": 1,
            "save_strategy": "no",
            "report_to": [],
            "seed": seed,
            "use_cpu": True,
            "disable_tqdm": True,
        }
        if name == "grpo":
            return self._grpo(rate, model, tokenizer, tokens, common)
        method = {"examples": "fo-peft", "hybrid": "hybrid"}.get(name, "zo-ft")
        rewards: dict[str, Any] = {}
        if name != "examples":
            rewards = {
                "reward_funcs": self.reward,
                "reward_dataset": self.train,
                "reward": self.options,
            }
        args = HybridArguments(
            **common,
            method=method,
            per_device_train_batch_size=8,
            learning_rate=rate if name == "examples" else RATES["examples"][0],
            base_lr=rate if name != "examples" else 0.0,
            base_anchor=SHARE / rate if name == "anchored" else 0.0,
            eps=EPS,
        )
        rows = [_encoded(row, tokenizer) for row in self.train]
        trainer = HybridTrainer(
            model=model,
            args=args,
            train_dataset=None if method == "zo-ft" else rows,
            processing_class=tokenizer,
            data_collator=DataCollatorForSeq2Seq(tokenizer),
            callbacks=[tokens],
            **rewards,
        )
        trainer.train()
        return int(trainer.state.global_step)

    def _grpo(
        self, rate: float, model: Any, tokenizer: Any, tokens: Tokens, common: dict[str, Any]
    ) -> int:
        from datasets import Dataset
        from trl import GRPOConfig, GRPOTrainer

        by_prompt = {str(row["prompt"]): row for row in self.train}
        scorer = RewardSource(self.train[:1], self.reward, tokenizer).scorer

        def reward(prompts: list[Any], completions: list[Any], **_: Any) -> list[float]:
            rows = [by_prompt[str(prompt)] for prompt in prompts]
            columns = {key: [row[key] for row in rows] for key in rows[0] if key != "prompt"}
            return list(scorer(prompts, completions, columns).total)

        args = GRPOConfig(
            **common,
            bf16=False,
            learning_rate=rate,
            per_device_train_batch_size=self.options.batch_size * self.options.num_answers,
            num_generations=self.options.num_answers,
            max_completion_length=self.options.max_new_tokens,
        )
        rows = Dataset.from_list([{"prompt": row["prompt"]} for row in self.train])
        trainer = GRPOTrainer(
            model=model,
            reward_funcs=reward,
            args=args,
            train_dataset=rows,
            processing_class=tokenizer,
            callbacks=[tokens],
        )
        trainer.train()
        return int(trainer.state.global_step)

    def measure(self, model: Any, tokenizer: Any, drift: Drift) -> dict[str, Any]:
        """The reward of the held-out prompts, the share of right answers, and the drift."""
        model.eval()
        source = RewardSource(self.held, self.reward, tokenizer, self.options)
        answered = source.answer_all(model)
        right = [
            row["completion"].strip() == text.strip().split("\n")[0]
            for row, text in zip(self.held, answered.texts, strict=True)
        ]
        return {
            "reward": answered.figures(1)["reward"],
            "full": sum(r >= 0.999 for r in answered.rewards) / len(self.held),
            "right": sum(right) / len(right),
            "drift": drift.measure(model),
            **(self._films(model, tokenizer) if self.task == "sums" else {}),
            "answers": list(answered.texts[:5]),
        }

    @torch.no_grad()
    def _films(self, model: Any, tokenizer: Any) -> dict[str, float]:
        """AUC and loss on film reviews that no run learns from."""
        words = [tokenizer(word)["input_ids"][0] for word in (" terrible", " great")]
        margins, losses = [], []
        for text, label in zip(self.films, self.labels, strict=True):
            ids = torch.tensor([tokenizer(text)["input_ids"]])
            two = model(input_ids=ids).logits[0, -1, words]
            margins.append(float(two[1] - two[0]))
            losses.append(float(cross_entropy(two[None], torch.tensor([int(label)]))))
        found = np.array(margins)
        good, bad = found[self.labels == 1], found[self.labels == 0]
        return {
            "auc": float((good[:, None] > bad[None, :]).mean()),
            "loss": float(np.mean(losses)),
        }


def _as_json(row: Any) -> dict[str, Any]:
    text = row.prompt.removesuffix(" It was").strip()
    label = ("negative", "positive")[row.gold]
    return {
        "prompt": [{"role": "user", "content": ASK.format(text)}],
        "completion": json.dumps({"sentiment": label}),
    }


def _encoded(row: dict[str, Any], tokenizer: Any) -> dict[str, list[int]]:
    """A prompt with its right answer, on which alone the loss is."""
    prompt = row["prompt"]
    if not isinstance(prompt, str):
        prompt = tokenizer.apply_chat_template(prompt, tokenize=False, add_generation_prompt=True)
    before, after = (tokenizer(text)["input_ids"] for text in (prompt, row["completion"]))
    ids: list[int] = [*before, *after, tokenizer.eos_token_id]
    labels = [-100] * len(before) + ids[len(before) :]
    return {"input_ids": ids, "attention_mask": [1] * len(ids), "labels": labels}


def print_table(task: str, before: dict[str, Any], runs: list[dict[str, Any]]) -> None:
    """Print a row for each contender and rate with all seeds: means over them."""
    keys = ["reward", "full", "right", "drift", "steps", "tokens", "cpu_seconds"]
    keys += ["auc", "loss"] if "auc" in before else []
    print(f"| {task} | rate |", " | ".join(keys), "| gain in reward [95%] |")
    print("|---|---|" + "---:|" * len(keys) + "---|")
    print("| before | |", " | ".join(f"{before.get(key, 0):.3g}" for key in keys), "| |")
    for name in RATES:
        found = [run for run in runs if (run["task"], run["name"]) == (task, name)]
        seeds = Counter(run["rate"] for run in found)
        for rate in sorted(rate for rate in seeds if seeds[rate] == max(seeds.values())):
            of_rate = [run for run in found if run["rate"] == rate]
            means = [statistics.fmean(run.get(key, 0) for run in of_rate) for key in keys]
            gain = mean_interval([run["reward"] - before["reward"] for run in of_rate])
            print(
                f"| {name} | {rate:g} |",
                " | ".join(f"{mean:.3g}" for mean in means),
                f"| {gain.value:+.2f} [{gain.low:+.2f}, {gain.high:+.2f}] |",
            )


def main() -> None:
    torch.set_num_threads(1)
    args = parse()
    for task in args.tasks:
        study = Study(args, task)
        before = study.before()
        for name in args.contenders:
            if task == "json" and name not in CHOSEN:
                continue
            rates = RATES[name] if task == "sums" else [CHOSEN[name]]
            tried = [study.run(name, rate, args.seeds[0]) for rate in rates]
            chosen = {max(tried, key=lambda run: run["reward"])["rate"]}
            if name == "es" and task == "sums":
                chosen |= set(RATES["anchored"])  # the same rate without the anchor
            for rate in sorted(chosen):
                for seed in args.seeds[1:]:
                    study.run(name, rate, seed)
        print_table(task, before, study.runs)


if __name__ == "__main__":
    main()
