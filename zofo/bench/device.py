"""Synchronisation, timing and peak memory of each kind of device."""

from __future__ import annotations

import contextlib
import gc
import resource
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Final

import torch

_STATUS: Final = Path("/proc/self/status")
_CLEAR_REFS: Final = Path("/proc/self/clear_refs")


def synchronise(device: torch.device) -> None:
    """Wait until the device has finished its queued work."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()


def seconds_of(run: Callable[[], object], device: torch.device, *, repeats: int = 1) -> float:
    """Wall-clock seconds of one call, from an idle device to an idle device.

    Args:
        run: the call to time.
        device: the device that it runs on.
        repeats: calls between two synchronisations; a queue hides the launch time of short calls.
    """
    synchronise(device)
    began = time.perf_counter()
    for _ in range(repeats):
        run()
    synchronise(device)
    return (time.perf_counter() - began) / repeats


def device_name(device: torch.device) -> str:
    """For the record."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error means a lack of memory; on the CPU torch has no class for it."""
    return isinstance(error, (torch.OutOfMemoryError, MemoryError)) or (
        isinstance(error, RuntimeError) and "allocate memory" in str(error)
    )


def free_cached(device: torch.device) -> None:
    """Return the allocator's unused memory."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def can_measure_peak(device: torch.device) -> bool:
    """Whether the device keeps a record of its peak."""
    return device.type in ("cpu", "cuda")


def used_bytes(device: torch.device) -> int:
    """Memory in use: allocated on the accelerator, else resident in the process."""
    if device.type == "cuda":
        return int(torch.cuda.memory_allocated(device))
    import psutil

    return int(psutil.Process().memory_info().rss)


def peak_bytes(device: torch.device) -> int:
    """Peak of `used_bytes` since `reset_peak`, or since the start where that has no effect."""
    if device.type == "cuda":
        return int(torch.cuda.max_memory_allocated(device))
    # Not ru_maxrss on Linux: a new program inherits the peak of the process that started it.
    with contextlib.suppress(OSError):
        for line in _STATUS.read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return int(peak if sys.platform == "darwin" else peak * 1024)


def reset_peak(device: torch.device) -> None:
    """Reset the recorded peak, if the system can."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return
    with contextlib.suppress(OSError):
        _CLEAR_REFS.write_text("5")  # proc(5): resets the peak resident set size
