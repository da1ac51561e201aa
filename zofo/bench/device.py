"""Synchronisation, timing and peak memory on the CPU, CUDA and MPS."""

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
    """Mean wall-clock seconds of one of `repeats` calls, from an idle device to an idle device."""
    synchronise(device)
    began = time.perf_counter()
    for _ in range(repeats):
        run()
    synchronise(device)
    return (time.perf_counter() - began) / repeats


def device_name(device: torch.device) -> str:
    """The name of a GPU, or else the type of the device."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error means a lack of memory."""
    # On the CPU, torch raises a plain RuntimeError, so its message must decide.
    return isinstance(error, (torch.OutOfMemoryError, MemoryError)) or (
        isinstance(error, RuntimeError) and "allocate memory" in str(error)
    )


def free_cached(device: torch.device) -> None:
    """Return the memory of dead objects and of the allocator's cache to the device."""
    gc.collect()  # Only the collector frees objects in reference cycles.
    if device.type == "cuda":
        torch.cuda.empty_cache()


def can_measure_peak(device: torch.device) -> bool:
    """Whether the device records its peak memory."""
    return device.type in ("cpu", "cuda")


def used_bytes(device: torch.device) -> int:
    """Bytes in use: allocated on CUDA, or else resident in the process."""
    if device.type == "cuda":
        return int(torch.cuda.memory_allocated(device))
    import psutil

    return int(psutil.Process().memory_info().rss)


def peak_bytes(device: torch.device) -> int:
    """Peak of `used_bytes` since `reset_peak`, or since the start if the system cannot reset it."""
    if device.type == "cuda":
        return int(torch.cuda.max_memory_allocated(device))
    # On Linux, a new program inherits ru_maxrss from the process that started it, so VmHWM is read.
    with contextlib.suppress(OSError):
        for line in _STATUS.read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # KiB; bytes on macOS
    return int(peak if sys.platform == "darwin" else peak * 1024)


def reset_peak(device: torch.device) -> None:
    """Reset the recorded peak, if the system supports it."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return
    with contextlib.suppress(OSError):
        _CLEAR_REFS.write_text("5")  # proc(5): resets the peak resident set size
