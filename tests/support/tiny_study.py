"""Studies of a tiny model on rows that it can learn. Each run takes a second."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import psutil

from zofo.study.spec import StudySpec, load_spec


def write_rows(folder: Path) -> Path:
    path = folder / "reviews.csv"
    kinds = ("great warm story,good", "dull mess,bad")
    rows = [f"the film number {i} is a {kinds[i % 2]}" for i in range(90)]
    path.write_text("\n".join(["text,label", *rows]) + "\n")
    return path


def values(folder, model, rows, **changes):
    task = {"name": "classification", "train": str(rows)}
    sizes = {"num_train": 40, "num_dev": 20, "num_test": 20}
    return {
        "name": "tiny",
        "output": str(folder / "study"),
        "models": [{"name": str(model), "label": "tiny"}],
        "tasks": [{**task, **sizes, "label": "reviews"}],
        "methods": ["hybrid", "fo-peft"],
        "adapters": ["lora"],
        "seeds": [0, 1],
        "rates": [{"base_lr": [1e-4], "adapter_lr": [1e-3, 1e-2]}],
        "steps": 4,
        "num_evaluations": 4,
        "base": {"batch_size": 4, "log_every": 1, "device": "cpu"},
        **changes,
    }


def write_study(folder: Path, model, rows, **changes) -> Path:
    path = folder / "tiny.yaml"
    path.write_text(json.dumps(values(folder, model, rows, **changes)))  # JSON is valid YAML.
    return path


def spec_of(folder: Path, model, rows, **changes) -> StudySpec:
    return load_spec(write_study(folder, model, rows, **changes))


def start(path, *arguments, program=(sys.executable, "-m")) -> subprocess.Popen:
    """Start `zofo study` in a session of its own, as in a terminal."""
    return subprocess.Popen(
        [*program, "zofo", "study", str(path), *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def complete(path, *arguments, code=0, **options) -> str:
    process = start(path, *arguments, **options)
    output, _ = process.communicate(timeout=900)
    assert process.returncode == code, output
    return output


def kill_all(process) -> None:
    """Send SIGKILL to the worker and to every process that it has started."""
    try:
        family = [psutil.Process(process.pid), *psutil.Process(process.pid).children(True)]
    except psutil.NoSuchProcess:
        return
    for member in family:
        try:
            os.kill(member.pid, signal.SIGKILL)
        except ProcessLookupError:
            continue
    process.wait(60)
    process.stdout.close()


def results(folder: Path):
    """Return results.json without the timings, which differ between runs."""
    found = json.loads((folder / "study" / "results.json").read_text())
    del found["timings"]
    return found


def num_ended(folder: Path) -> int:
    return len(list((folder / "study" / "runs").glob("*/study.json")))
