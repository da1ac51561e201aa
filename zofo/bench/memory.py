"""Measures the peak memory of each contender in a separate process.

On the CPU, memory is the resident set: libraries, code of the compiled kernels, the model, and what
the steps need. The parts are read in that order, to separate constant parts from the method's. On
CUDA, memory is what torch has allocated, which excludes libraries.
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
"""What a process measures that only loads the noise kernels."""
_NUM_STEPS: Final = 3


def measure(
    settings: Settings, memory: Memory, *, on_done: Callable[[str], None] = lambda name: None
) -> None:
    """Fill `memory`, one process after the other.

    Args:
        settings: what to measure; its first number of threads counts.
        memory: gets a row as soon as it is measured.
        on_done: told after each process.
    """
    device = torch.device(settings.device)
    if not can_measure_peak(device):
        memory.contenders = {
            name: {"failed": f"{device.type} keeps no peak"} for name in settings.only
        }
        return
    if _counts_kernels(settings):
        _in_a_process(settings, KERNELS)  # compiles what is not yet in numba's cache
        memory.kernels_bytes = _in_a_process(settings, KERNELS).get("kernels")
        on_done(KERNELS)
    for name in settings.only:
        memory.contenders[name] = _in_a_process(settings, name)
        on_done(name)


def num_processes(settings: Settings) -> int:
    """How often `measure` reports."""
    return len(settings.only) + _counts_kernels(settings)


def measure_here(settings: Settings, name: str) -> dict[str, int]:
    """Memory of one contender in this process, bytes by part; `peak` is all of it."""
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
        parameter.detach().sum()  # reading makes a weight resident that is mapped from its file
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
    """What every contender loads, whether it needs it or not."""
    import peft  # noqa: F401
    from transformers import AutoModelForCausalLM, LlamaForCausalLM  # noqa: F401

    from zofo.bench import contenders  # noqa: F401


def load_kernels(dtype: str, distribution: str) -> None:
    """Perturbation and update of a step, on a few weights."""
    from zofo.models.loading import DTYPES
    from zofo.noise.combine import combine, combine_rows

    weight = torch.zeros(8, 8, dtype=DTYPES[dtype])
    address: dict[str, Any] = {
        "seed": 1,
        "step": 2,
        "tensor": 3,
        "distribution": distribution,
    }
    combine(weight, (1e-3,), out=torch.empty_like(weight), **address)
    combine(weight, (1e-3,), rounding="stochastic", **address)
    combine_rows(weight, torch.arange(2), 1e-3, **address)


def _in_a_process(settings: Settings, name: str) -> dict[str, Any]:
    command: Sequence[str] = [sys.executable, "-m", "zofo", "bench", *settings.arguments()]
    done = subprocess.run(
        [*command, "--memory-of", name], capture_output=True, text=True, check=False
    )
    if done.returncode == 0:
        return json.loads(done.stdout.splitlines()[-1])
    said = [line for line in done.stderr.splitlines() if line.strip()]
    how = f"exit code {done.returncode}" if done.returncode > 0 else f"signal {-done.returncode}"
    return {"failed": said[-1] if said else how}
