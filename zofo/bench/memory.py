"""Measures the peak memory of each contender in a separate process.

On the CPU, memory is the resident set of the process. It grows in this order: libraries, code of
the compiled kernels, the model, the steps. Readings in between separate the constant parts from the
part of the method. On CUDA, memory is what torch has allocated, which excludes libraries.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Sequence
from typing import Any, Final

import torch

from zofo.bench.device import can_measure_peak, peak_bytes, reset_peak, used_bytes
from zofo.bench.results import Memory
from zofo.bench.settings import Settings

KERNELS: Final = "kernels"
"""Name of the process that only loads the noise kernels."""
_NUM_STEPS: Final = 3  # The optimizer allocates its state in the first step.


def measure(
    settings: Settings, memory: Memory, *, on_done: Callable[[str], None] = lambda name: None
) -> None:
    """Fill `memory`, one process after the other; `on_done` is called after each.

    Each process uses the first number of threads in the settings.
    """
    device = torch.device(settings.device)
    if not can_measure_peak(device):
        memory.contenders = {
            name: {"failed": f"{device.type} keeps no peak"} for name in settings.only
        }
        return
    if _counts_kernels(settings):
        _in_a_process(settings, KERNELS)  # fills numba's cache, so that compiling does not count
        memory.kernels_bytes = _in_a_process(settings, KERNELS).get("kernels")
        on_done(KERNELS)
    for name in settings.only:
        memory.contenders[name] = _in_a_process(settings, name)
        on_done(name)


def num_processes(settings: Settings) -> int:
    """The number of processes that `measure` starts."""
    return len(settings.only) + _counts_kernels(settings)


def measure_here(settings: Settings, name: str) -> dict[str, int]:
    """Part -> bytes of one contender in this process; `peak` is the whole."""
    from zofo.bench.contenders import KINDS
    from zofo.bench.models import Workbench

    torch.set_num_threads(settings.threads[0])
    device = torch.device(settings.device)
    on_cpu = device.type == "cpu"
    _import_all()
    libraries = used_bytes(device)
    if on_cpu and (name == KERNELS or KINDS[name].uses_kernels):
        load_kernels(settings.dtype, settings.distribution)
    kernels = used_bytes(device) - libraries
    if name == KERNELS:
        return {"libraries": libraries, "kernels": kernels}

    contender = KINDS[name](Workbench(settings))
    contender.is_alone = True
    for parameter in contender.base:
        parameter.detach().sum()  # A mapped weight becomes resident only when it is read.
    model = used_bytes(device) - libraries - kernels
    reset_peak(device)
    for _ in range(_NUM_STEPS):
        contender.enter()
        contender.step()
        contender.leave()
    peak = peak_bytes(device)
    return {
        "peak": peak,
        "libraries": libraries,
        "kernels": kernels,
        "model": model,
        "step": peak - libraries - kernels - model,
        "optimizer_state": contender.state_bytes,
    }


def _counts_kernels(settings: Settings) -> bool:
    from zofo.bench.contenders import KINDS

    return settings.device == "cpu" and any(KINDS[name].uses_kernels for name in settings.only)


def _import_all() -> None:
    """Load the libraries in every process alike, so that the contenders differ only in the rest."""
    import peft  # noqa: F401
    from transformers import AutoModelForCausalLM, LlamaForCausalLM  # noqa: F401

    from zofo.bench import contenders  # noqa: F401


def load_kernels(dtype: str, distribution: str) -> None:
    """Compile and load the kernels of a step by running each on a few weights."""
    from zofo.models.loading import DTYPES
    from zofo.noise.combine import combine, combine_rows

    weight = torch.zeros(8, 8, dtype=DTYPES[dtype])
    address: dict[str, Any] = {"seed": 1, "step": 2, "tensor": 3, "distribution": distribution}
    combine(weight, (1e-3,), out=torch.empty_like(weight), **address)
    combine(weight, (1e-3,), rounding="stochastic", **address)
    combine_rows(weight, torch.arange(2), 1e-3, **address)


def _in_a_process(settings: Settings, name: str) -> dict[str, Any]:
    command: Sequence[str] = [sys.executable, "-m", "zofo", "bench", *settings.arguments()]
    done = subprocess.run(
        [*command, "--memory-of", name], capture_output=True, text=True, check=False
    )
    if done.returncode == 0:
        # The result is the last line, whatever a library prints before it.
        return json.loads(done.stdout.splitlines()[-1])
    said = [line for line in done.stderr.splitlines() if line.strip()]
    how = f"exit code {done.returncode}" if done.returncode > 0 else f"signal {-done.returncode}"
    return {"failed": said[-1] if said else how}
