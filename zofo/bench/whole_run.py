"""Peak memory of a whole run, phase by phase: hybrid beside FO-PEFT.

Each method trains the same configuration in a process of its own. `zofo verify` and `zofo export`
of the result also run in their own processes. A phase is a call of one of the functions in
`PHASES`. This module wraps them, so that the code of a run needs no measuring. The operating
system's record of the peak is reset at each beginning and end of a phase. The peak of a phase
inside another one counts for the inner phase only.
"""

from __future__ import annotations

import functools
import importlib
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import torch
from rich.console import Console
from rich.table import Table

from zofo.bench.device import peak_bytes, reset_peak, used_bytes
from zofo.errors import UserError
from zofo.optim.methods import METHODS

if TYPE_CHECKING:
    from zofo.config.schema import RunConfig

METHODS_COMPARED: Final = ("fo-peft", "hybrid")
PHASES: Final = (  # module, function or method in it, name of the phase
    ("zofo.run.train", "prepare", "load"),
    ("zofo.run.train", "evaluate", "evaluation"),
    ("zofo.run.task_trainer", "TaskTrainer.evaluate", "evaluation"),
    ("zofo.run.task_trainer", "TaskTrainer.train", "training"),
    ("zofo.run.task_trainer", "TaskTrainer._save_checkpoint", "checkpoint"),
    ("zofo.run.task_trainer", "TaskTrainer._load_best_model", "going back to the best step"),
    ("zofo.run.result", "save_artifact", "artefact"),
)
_CPU: Final = torch.device("cpu")
_MIB: Final = 2**20


def function_at(module_name: str, path: str) -> tuple[Any, str, Callable[..., Any]]:
    """The owner of a function, its name there, and the function."""
    owner: Any = importlib.import_module(module_name)
    *classes, name = path.split(".")
    for part in classes:
        owner = getattr(owner, part)
    return owner, name, getattr(owner, name)


class PhasePeaks:
    """Records the peak memory of each phase of this process."""

    def __init__(self) -> None:
        self.bytes: dict[str, int] = {}  # phase -> its highest peak so far
        self._open = ["between the phases"]  # names of the running phases, the innermost last
        reset_peak(_CPU)

    def wrap(self, module_name: str, path: str, phase: str) -> None:
        """From now on, measure each call of a function or of a method as a phase."""
        owner, name, function = function_at(module_name, path)

        @functools.wraps(function)
        def measured(*args: Any, **kwargs: Any) -> Any:
            with self.phase(phase):
                return function(*args, **kwargs)

        setattr(owner, name, measured)

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Count the memory of everything that runs inside the block for this phase."""
        self._note()
        self._open.append(name)
        try:
            yield
        finally:
            self._note()
            self._open.pop()

    def _note(self) -> None:
        phase = self._open[-1]
        self.bytes[phase] = max(self.bytes.get(phase, 0), peak_bytes(_CPU))
        reset_peak(_CPU)


def measure_here(run: str, what: str, overrides: Sequence[str] = ()) -> dict[str, Any]:
    """Train a configuration, verify a run or export it in this process.

    Args:
        run: the run folder. The file `run`.yaml beside it holds the configuration.
        what: a name in `METHODS_COMPARED`, "verify" or "export".
        overrides: options of the configuration, such as the permission to run code.

    Returns:
        "phases": phase -> peak resident bytes; "kernels_bytes": resident code of the noise kernels.
    """
    # Libraries that every process needs are loaded before the first phase begins.
    import peft  # noqa: F401
    from transformers import AutoModelForCausalLM, LlamaForCausalLM  # noqa: F401

    from zofo.bench.memory import load_kernels
    from zofo.config.load import load_config
    from zofo.run.train import train
    from zofo.saved.export import export_model
    from zofo.saved.verify import verify

    peaks, before = PhasePeaks(), used_bytes(_CPU)
    config = load_config(f"{run}.yaml", overrides)
    is_trusted = config.model.trust_remote_code
    if METHODS[config.method].base == "zeroth":
        load_kernels(config.model.dtype, config.distribution)
    kernels = used_bytes(_CPU) - before
    if what == "verify":
        with peaks.phase(what):
            wrong = [
                check.detail
                for check in verify(run, trust_remote_code=is_trusted)
                if not check.is_sound
            ]
        if wrong:
            raise UserError(f"the run that was measured cannot be loaded: {wrong[0]}")
    elif what == "export":
        with peaks.phase(what):
            export_model(run, f"{run}-plain", trust_remote_code=is_trusted)
    else:
        for place in PHASES:
            peaks.wrap(*place)
        train(config)
    return {"phases": peaks.bytes, "kernels_bytes": kernels}


def measure(config: RunConfig, console: Console) -> dict[str, Any]:
    """Measure both methods.

    Returns:
        Method -> the result of `measure_here`, with the phases of all its processes.

    Raises:
        UserError: if a process fails; its own message has been shown.
    """
    found: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        for method in METHODS_COMPARED:
            run = Path(folder) / method
            given = {"method": method, "output_dir": str(run), "device": "cpu"}
            run.with_suffix(".yaml").write_text(config.model_copy(update=given).to_yaml())
            found[method] = {"phases": {}}
            for what in (method, "verify", "export"):
                console.print(f"{method}: {'train' if what == method else what}", highlight=False)
                row = _in_a_process(run, what, config.model.trust_remote_code)
                found[method]["phases"] |= row["phases"]
                found[method]["kernels_bytes"] = row["kernels_bytes"]
    return found


def _in_a_process(run: Path, what: str, is_trusted: bool) -> dict[str, Any]:
    trusting = ["model.trust_remote_code=true"] if is_trusted else []
    asked = ["--whole-run", str(run), "--memory-of", what, *trusting]
    command = [sys.executable, "-m", "zofo", "bench", *asked]
    # By default, glibc keeps an amount of freed memory that depends on the order of the frees.
    # These settings make it return large blocks at once, so that the methods can be compared.
    environment = os.environ | {"MALLOC_ARENA_MAX": "1", "MALLOC_MMAP_THRESHOLD_": "65536"}
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, env=environment, check=False)
    if done.returncode:
        raise UserError(f"{what} failed; see its message above")
    return dict(json.loads(done.stdout.splitlines()[-1]))


def show(found: dict[str, Any], console: Console) -> None:
    """Print the peaks, and hybrid's over FO-PEFT's with and without the kernels' code."""
    table = Table(title="peak resident memory of a whole run, MiB")
    table.add_column("phase")
    peaks = {method: row["phases"] for method, row in found.items()}
    for method in peaks:
        table.add_column(method, justify="right")
    for phase in dict.fromkeys(phase for row in peaks.values() for phase in row):
        cells = [row.get(phase) for row in peaks.values()]
        table.add_row(phase, *("-" if c is None else f"{c / _MIB:,.0f}" for c in cells))
    peft, hybrid = (max(peaks[method].values()) for method in METHODS_COMPARED)
    table.add_row("the whole run", f"{peft / _MIB:,.0f}", f"{hybrid / _MIB:,.0f}")
    console.print(table)
    kernels = found["hybrid"]["kernels_bytes"]
    console.print(f"hybrid / fo-peft, whole run                 {hybrid / peft:.3f}")
    console.print(f"the same without the kernels' code          {(hybrid - kernels) / peft:.3f}")
