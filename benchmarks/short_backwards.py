"""Compare LoRA in the last k layers with LoRA in all, at equal numbers of forward-equivalents.

    lora                         by its gradient, in all L layers           2 a step
    lora last 4                  by its gradient, in the last 4             1 + 4 / L
    hybrid last 4                the same, and the base by zeroth order     2 + 4 / L
    lora gradient checkpointing  as lora, with recomputed activations       2, and a forward more

A backward pass ends at the lowest layer with an adapter, and no activations are kept below it. The
base of hybrid moves by rank-one directions, one a row, in its linear layers only. Its tied
embedding would make large rates unstable (docs/results/log.md, the entry on MeZO).

Training: the rate of each contender is that of its grid with the lowest dev loss on the first seed.
All rates fall linearly to 0, and the last step counts. Hybrid has the grids of both rates, so it
tries four pairs. zofo does not count the forward that checkpointing adds. Its results are those of
lora, so it is trained only if `--contenders` names it. Training seconds include no evaluations.
Seconds of the processor are those of the whole process with loading and evaluations. Stored bytes
are those of the adapter and of the trajectory of the base.

Memory (`--memory`): two steps of `zofo train` on rows of `--long` tokens, each contender in a
process of its own. The libraries, the code of the noise kernels and the loaded model are measured
before the first step. The peak of the steps above them is what the contender needs for activations,
gradients, the optimizer's state, scratch and the self-check of the first step.

The JSON file holds every finished run, and a second call continues with the others.

    python benchmarks/short_backwards.py --json benchmarks/results/short_backwards.json
    python benchmarks/short_backwards.py --memory --json benchmarks/results/short_backwards.json
    python benchmarks/short_backwards.py --task sst2 --data-dir FOLDER --json FILE
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

from zofo.config.load import load_config
from zofo.run.cost import forward_equivalents
from zofo.statistics.estimates import paired_difference

MIB: Final = 2**20
ADAPTER_RATES: Final = [1e-3, 3e-3]
BASE_RATES: Final = [1e-4, 3e-4]
LINEAR: Final = "*_proj*"
"""Pattern of the base weights that move: the linear layers of a Llama."""
COLUMNS: Final = {
    "accuracy": ("accuracy", 1, ".3f"),
    "auc": ("AUC", 1, ".3f"),
    "dev_loss": ("dev loss", 1, ".3f"),
    "forward_equivalents": ("forward-equivalents", 1, ".1f"),
    "train_s": ("training s", 1, ".0f"),
    "process_s": ("processor s", 1, ".0f"),
    "peak_memory_bytes": ("peak MiB", MIB, ".0f"),
    "stored_bytes": ("stored KiB", 1024, ".0f"),
}
"""Figure of a run -> its heading, the unit in which it is shown, and its format."""
SIZES: Final = ("max_length", "num_train", "num_dev", "num_test")
SETTINGS: Final = ("model", "task", "budget", "batch", *SIZES)
COMPARED: Final = ("accuracy", "auc", "dev_loss", "train_s")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--json", type=Path, required=True)
    parser.add_argument("--memory", action="store_true", help="measure memory instead of training")
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--task", default="rotten-tomatoes")
    parser.add_argument("--data-dir", help="folder with the task's files")
    parser.add_argument("--last", type=int, default=4, help="k")
    parser.add_argument("--contenders", nargs="+", help="their names; default: all that it suits")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--budget", type=float, default=120, help="forward-equivalents of a run")
    parser.add_argument("--batch", type=int, default=8, help="rows")
    parser.add_argument("--max-length", type=int, default=48, help="tokens of a row in training")
    parser.add_argument("--long", type=int, default=256, help="tokens of a row with --memory")
    parser.add_argument("--num-train", type=int, default=1000, help="rows")
    parser.add_argument("--num-dev", type=int, default=128, help="rows")
    parser.add_argument("--num-test", type=int, default=400, help="rows")
    return parser.parse_args()


def contenders(last: int) -> dict[str, dict[str, Any]]:
    """Name -> its options beside those that all share."""
    short = {"layers": f"last {last}"}
    rows = {"distribution": "rank-one", "directions_per_step": "rows"}
    return {
        "lora": {"method": "fo-peft"},
        f"lora last {last}": {"method": "fo-peft", "adapter": short},
        f"hybrid last {last}": {"method": "hybrid", "adapter": short, **rows},
        "lora gradient checkpointing": {"method": "fo-peft", "gradient_checkpointing": True},
    }


class Study:
    """The finished runs and measurements."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args, self.all = args, contenders(args.last)
        default = [name for name in self.all if args.memory or "checkpointing" not in name]
        self.names: list[str] = args.contenders or default
        unknown = [name for name in self.names if name not in self.all]
        if unknown:
            raise SystemExit(f"no contender {unknown[0]!r}; choose from {', '.join(self.all)}")
        self.found: dict[str, list[dict[str, Any]]] = {"runs": [], "memory": []}
        self.read()

    def read(self) -> None:
        """Read the file, to which another process may have added."""
        if self.args.json.exists():
            self.found |= json.loads(self.args.json.read_text())

    def keep(self, kind: str, entry: dict[str, Any]) -> dict[str, Any]:
        """Add a finished run ("runs") or measurement ("memory") to the file."""
        self.read()
        self.found[kind].append(entry)
        self.args.json.parent.mkdir(parents=True, exist_ok=True)
        self.args.json.write_text(json.dumps(self.found, indent=1) + "\n")
        print(json.dumps(entry), flush=True)
        return entry

    def known(self, kind: str, asked: Mapping[str, Any]) -> dict[str, Any] | None:
        """A finished run or measurement with these settings."""
        fitting = (entry for entry in self.found[kind] if asked.items() <= entry.items())
        return next(fitting, None)

    def config(self, name: str, rates: Mapping[str, Any], **more: Any) -> dict[str, Any]:
        """The configuration of a run, as in its YAML file."""
        own, args = self.all[name], self.args
        base = {"base_lr": {LINEAR: rates["base_lr"]}} if own["method"] == "hybrid" else {}
        return {
            **own,
            **base,
            "adapter_lr": rates["adapter_lr"],
            "adapter": {"type": "lora", "r": 8, "targets": ["q_proj", "v_proj"]}
            | own.get("adapter", {}),
            "model": {"name": args.model},
            "scheduler": "linear",
            "select_best": False,
            "batch_size": args.batch,
            "eval_batch_size": args.batch,  # so that evaluations do not decide the peak of memory
            "device": "cpu",
            "num_threads": 1,
            **more,
        }

    def run(self, name: str, rates: Mapping[str, Any], seed: int) -> dict[str, Any]:
        """Train, or return a finished run."""
        args = self.args
        asked = {"name": name, "seed": seed, **rates, **{k: getattr(args, k) for k in SETTINGS}}
        known = self.known("runs", asked)
        if known is not None:
            return known
        sizes = {key: asked[key] for key in SIZES}
        task = {"name": args.task, "data_dir": args.data_dir, **sizes}
        config = self.config(name, rates, task=task, seed=seed)
        cost = forward_equivalents(load_config(values=config), 1)
        steps = max(1, int(args.budget / cost + 1e-9))
        with tempfile.TemporaryDirectory() as folder:
            run = Path(folder) / "run"
            config |= {"steps": steps, "eval_every": steps, "output_dir": str(run)}
            written = run.with_suffix(".yaml")
            written.write_text(json.dumps(config))  # JSON is YAML.
            process_s = _processor_seconds([sys.executable, "-m", "zofo", "train", str(written)])
            if (run / "stopped.json").exists():  # A loss was not finite.
                return self.keep("runs", {**asked, "dev_loss": None, "process_s": process_s})
            result = json.loads((run / "result.json").read_text())
            weights = (run / "artifact").rglob("*.safetensors")
            stored = sum(file.stat().st_size for file in weights)
        test, dev = result["test"], result["dev"]["after"]
        scores = {key: test["after"][key] for key in ("accuracy", "auc", "loss")}
        before = {f"{key}_before": test["before"][key] for key in scores}
        figures = {"dev_loss": dev["loss"], "process_s": process_s, "stored_bytes": stored}
        return self.keep("runs", {**asked, **scores, **before, **figures, **result["cost"]})

    def memory(self, name: str) -> dict[str, Any]:
        """Measure the memory of two steps, or return the measurement."""
        args = self.args
        asked = {"name": name, "model": args.model, "batch": args.batch, "tokens": args.long}
        known = self.known("memory", asked)
        if known is not None:
            return known
        if name.startswith("hybrid"):  # fills numba's cache, so that compiling does not count
            load = "from zofo.bench.memory import load_kernels; load_kernels('float32', 'rank-one')"
            subprocess.run([sys.executable, "-c", load], check=True)
        with tempfile.TemporaryDirectory() as folder:
            rows = Path(folder) / "rows.jsonl"
            words = "long " * args.long  # The tokenizer gives at least a token a word.
            labels = ("good", "bad")
            lines = [{"text": f"{words}{i}", "label": labels[i % 2]} for i in range(3 * args.batch)]
            rows.write_text("".join(f"{json.dumps(line)}\n" for line in lines))
            task = {"name": "classification", "train": str(rows), "max_length": args.long}
            task |= {
                "num_train": 2 * args.batch,
                "num_dev": args.batch // 2,
                "num_test": args.batch // 2,
            }
            rates = {"adapter_lr": ADAPTER_RATES[0], "base_lr": BASE_RATES[0]}
            once = {"steps": 2, "eval_every": 2, "measure_test": False}
            output = {"output_dir": str(Path(folder) / "run")}
            written = Path(folder) / "run.yaml"
            written.write_text(json.dumps(self.config(name, rates, task=task, **once, **output)))
            # As in zofo.bench.whole_run: glibc returns large blocks at once.
            settings = {"MALLOC_ARENA_MAX": "1", "MALLOC_MMAP_THRESHOLD_": "65536"}
            command = [sys.executable, __file__, "--memory-of", str(written)]
            done = subprocess.run(
                command, stdout=subprocess.PIPE, text=True, env=os.environ | settings, check=True
            )
        return self.keep("memory", {**asked, **json.loads(done.stdout.splitlines()[-1])})


def _processor_seconds(command: list[str]) -> float:
    """Run a command, and return the seconds that it used the processor."""
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)  # stderr has the progress
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    return round(usage.ru_utime + usage.ru_stime, 3)


def measure_here(path: str) -> dict[str, Any]:
    """Train a configuration in this process, and return its memory in bytes and its times."""
    import peft  # noqa: F401
    import torch
    from transformers import AutoModelForCausalLM, LlamaForCausalLM, TrainerCallback  # noqa: F401

    from zofo.bench.device import used_bytes
    from zofo.bench.memory import load_kernels
    from zofo.bench.whole_run import PHASES, PhasePeaks
    from zofo.run.task_trainer import TaskTrainer
    from zofo.run.train import train

    cpu = torch.device("cpu")
    torch.set_num_threads(1)
    config = load_config(path)
    libraries = used_bytes(cpu)
    if config.method == "hybrid":
        load_kernels(config.model.dtype, config.distribution)
    kernels = used_bytes(cpu) - libraries
    moments: list[float] = []  # processor seconds: begin and end of each step
    started = 0

    class Clock(TrainerCallback):
        def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
            moments.append(time.process_time())

        on_step_end = on_step_begin

    fit = TaskTrainer.train

    def noted(trainer: TaskTrainer, **kwargs: Any) -> Any:
        nonlocal started
        trainer.add_callback(Clock())
        started = used_bytes(cpu)
        return fit(trainer, **kwargs)

    TaskTrainer.train = noted  # type: ignore[method-assign]
    peaks = PhasePeaks()
    for place in PHASES:
        peaks.wrap(*place)
    train(config)
    peak = peaks.bytes["training"]
    return {
        "libraries_bytes": libraries,
        "kernels_bytes": kernels,
        "model_bytes": started - libraries - kernels,
        "steps_bytes": peak - started,
        "peak_bytes": peak,
        "second_step_process_s": round(moments[-1] - moments[-2], 3),
    }


def grid(name: str) -> list[dict[str, float]]:
    """The rates to try."""
    if not name.startswith("hybrid"):
        return [{"adapter_lr": rate} for rate in ADAPTER_RATES]
    pairs = itertools.product(ADAPTER_RATES, BASE_RATES)
    return [{"adapter_lr": adapter, "base_lr": base} for adapter, base in pairs]


def print_runs(runs: dict[str, list[dict[str, Any]]]) -> None:
    """Print means over the seeds, and the paired differences to lora."""
    print("\n| contender | rates | steps |", " | ".join(c[0] for c in COLUMNS.values()), "|")
    print("|---|---|---:|" + "---:|" * len(COLUMNS))
    for name, of_name in runs.items():
        used = [of_name[0][key] for key in ("adapter_lr", "base_lr") if key in of_name[0]]
        cells = [name, ", ".join(f"{rate:g}" for rate in used), f"{of_name[0]['steps']}"]
        for key, (_, unit, form) in COLUMNS.items():
            cells.append(f"{statistics.fmean(run[key] for run in of_name) / unit:{form}}")
        print("|", " | ".join(cells), "|")
    if "lora" not in runs:
        return
    print("\n| minus lora |", " | ".join(COLUMNS[key][0] for key in COMPARED), "|")
    print("|---|" + "---:|" * len(COMPARED))
    for name in [name for name in runs if name != "lora"]:
        cells = [name]
        for key in COMPARED:
            own, other = ({run["seed"]: run[key] for run in runs[n]} for n in (name, "lora"))
            difference = paired_difference(own, other)
            form = "+.3f" if COLUMNS[key][2] == ".3f" else "+.0f"
            cells.append(f"{difference.estimate:{form}}" if difference else "")
        print("|", " | ".join(cells), "|")


def print_memory(found: list[dict[str, Any]]) -> None:
    """Print the memory of each contender in MiB."""
    print("\n| contender | libraries | kernels | model | steps | peak | processor s of a step |")
    print("|---|" + "---:|" * 6)
    for entry in found:
        parts = ("libraries", "kernels", "model", "steps", "peak")
        cells = [entry["name"], *(f"{entry[f'{part}_bytes'] / MIB:.0f}" for part in parts)]
        print("|", " | ".join(cells), f"| {entry['second_step_process_s']:.1f} |")


def main() -> None:
    if sys.argv[1:2] == ["--memory-of"]:
        print(json.dumps(measure_here(sys.argv[2])))
        return
    args = parse()
    study = Study(args)
    if args.memory:
        print_memory([study.memory(name) for name in study.names])
        return
    best: dict[str, dict[str, float]] = {}
    for name in study.names:
        tried = [(study.run(name, rates, args.seeds[0])["dev_loss"], rates) for rates in grid(name)]
        sound = [pair for pair in tried if pair[0] is not None]
        if sound:
            best[name] = min(sound, key=lambda pair: pair[0])[1]
    for seed, name in itertools.product(args.seeds[1:], best):
        study.run(name, best[name], seed)
    runs = {n: [study.run(n, best[n], seed) for seed in args.seeds] for n in best}
    print_runs({n: [run for run in runs[n] if run["dev_loss"] is not None] for n in runs})


if __name__ == "__main__":
    main()
