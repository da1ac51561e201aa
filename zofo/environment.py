"""The machine: devices, versions, memory."""

from __future__ import annotations

import os
import platform
import resource
import sys
from importlib import metadata
from typing import Any

import torch

from zofo.errors import UserError


def resolve_device(device: str) -> str:
    """The device of a name; "auto" means an accelerator if the machine has one, else the CPU.

    Raises:
        UserError: if the device is unknown or absent.
    """
    known = {
        "auto": True,
        "cpu": True,
        "cuda": torch.cuda.is_available(),
        "mps": torch.backends.mps.is_available(),
    }
    if device not in known:
        raise UserError(f"device is {device!r}; choose one of {', '.join(known)}")
    if not known[device]:
        raise UserError(f"device {device} is not available on this machine; choose auto or cpu")
    if device != "auto":
        return device
    return next(name for name in ("cuda", "mps", "cpu") if known[name])


def present_devices() -> list[str]:
    """The kinds of devices on which torch can compute on this machine."""
    present = {
        "cuda": torch.cuda.is_available(),
        "mps": torch.backends.mps.is_available(),
        "xpu": torch.xpu.is_available(),
    }
    return ["cpu", *(device for device, is_there in present.items() if is_there)]


def started_processes() -> int:
    """The number of processes that a launcher has started for this command; 1 without one."""
    names = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    return int(os.environ["WORLD_SIZE"]) if all(name in os.environ for name in names) else 1


def environment() -> dict[str, Any]:
    """The versions and the machine, as `environment.json` records them."""
    packages = ("zofo", "torch", "transformers", "peft", "accelerate", "numba", "numpy")
    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "processor": platform.processor() or platform.machine(),
        "num_threads": torch.get_num_threads(),
        "devices": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())],
        "packages": {name: metadata.version(name) for name in packages},
    }


def peak_memory_bytes(device: torch.device) -> int:
    """Peak memory in bytes: of the accelerator if one is used, else of the process."""
    if device.type == "cuda":
        return int(torch.cuda.max_memory_allocated(device))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    # macOS reports bytes, Linux KiB.
    return int(peak if sys.platform == "darwin" else peak * 1024)
