"""The bytes that a step sends, beside what other ways of training would send.

`zofo bench --wire` starts processes that take hybrid steps together over the loopback (gloo), each
with its own model, and counts in three places:

    base        `Processes.bytes_sent`: scalars, loss and checksum
    adapter     `GradientBytes.sent`: the buckets of gradients that DistributedDataParallel sends
    TCP         what the kernel's counters of this process's connections say (Linux). They
                include the headers of gloo's messages and, in the row of the adapter, the buffers
                that DistributedDataParallel sends before a forward

The rows of other ways are computed from the sizes of the weights. A step of DistributedDataParallel
sends 2 (n − 1) / n of the gradients' bytes. A round of FedAvg sends every trained weight once from
each client, and once back.

References:
    McMahan et al., "Communication-Efficient Learning of Deep Networks from Decentralized Data",
    2017, Algorithm 1 (FedAvg).
"""

from __future__ import annotations

import os
import socket
import struct
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

import torch
import torch.distributed as dist
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from zofo.bench.contenders import EPS, RATE
from zofo.bench.launch import in_processes
from zofo.bench.models import Workbench, model_facts
from zofo.bench.settings import Settings
from zofo.environment import environment
from zofo.errors import UserError
from zofo.optim.blocks import split_parameters
from zofo.optim.gradient_bytes import GradientBytes, all_reduce_bytes
from zofo.optim.methods import param_groups
from zofo.optim.optimizer import HybridOptimizer

MAX_PROCESSES: Final = 64
_CONTENDERS: Final = {
    "hybrid": "one direction",
    "hybrid-rows": "a direction for each row",
}


def measure(settings: Settings, num_processes: int, console: Console) -> dict[str, Any]:
    """Count what processes send, each of which takes `settings.rounds` steps of each contender.

    Args:
        settings: model, adapter, batch (the rows of one process), length, dtype, distribution,
            rounds. The first number of threads is that of each process.
        num_processes: at least 2.
        console: says what is done.

    Returns:
        What `--json` writes: the rows of the table, sizes, arguments and environment.

    Raises:
        UserError: for bad settings, before a process starts; or if a process fails.
    """
    if not 2 <= num_processes <= MAX_PROCESSES:
        raise UserError(
            f"processes is {num_processes}; it must lie in [2, {MAX_PROCESSES}], because one "
            "process sends nothing"
        )
    if settings.device != "cpu":
        raise UserError(
            f"device is {settings.device}; --wire counts on the CPU, and the bytes are the same on "
            "every device: use --device cpu"
        )
    if not dist.is_available() or not dist.is_gloo_available():
        raise UserError("this build of torch has no gloo, so processes cannot be connected")
    model_facts(settings)  # refuses a model that cannot be found
    console.print(
        f"{num_processes} processes take {settings.rounds} steps of each contender",
        highlight=False,
    )
    counted = in_processes(
        count_here, settings, num_processes=num_processes, num_threads=settings.threads[0]
    )
    chosen = settings.as_dict()
    keys = ("model", "adapter", "batch", "length", "dtype", "distribution", "rounds")
    words = [word for key in keys for word in (f"--{key}", str(chosen[key]))]
    return {
        "arguments": {key: chosen[key] for key in keys} | {"processes": num_processes},
        "command": ["zofo", "bench", "--wire", "--processes", str(num_processes), *words],
        "environment": environment(),
        "sizes": counted["sizes"],
        "rows": table_rows(counted, num_processes),
    }


def table_rows(counted: dict[str, Any], num_processes: int) -> list[dict[str, Any]]:
    """The rows of the table, from what `count_here` returned.

    Each has "name", "per" ("step" or "round"), "bytes" that a process sends, "tcp_bytes" (None: not
    counted), "how" ("counted" or "computed"), and "ratio" to the first contender's step.
    """
    base, adapter = counted["sizes"]["base"], counted["sizes"]["adapter"]
    rows = []
    for name, what in _CONTENDERS.items():
        found = counted[name]
        rows += [
            (f"{name}: base, {what}", "step", found["base"], found["base_tcp"], "counted"),
            (f"{name}: adapter", "step", found["adapter"], found["adapter_tcp"], "counted"),
        ]
    whole = all_reduce_bytes(base, num_processes)
    rows += [
        ("DDP of the adapter", "step", all_reduce_bytes(adapter, num_processes), None, "computed"),
        ("DDP of the whole model", "step", whole, None, "computed"),
        ("FedAvg of the adapter", "round", adapter, None, "computed"),
        ("FedAvg of the whole model", "round", base, None, "computed"),
    ]
    one = counted["hybrid"]["base"] + counted["hybrid"]["adapter"]
    keys = ("name", "per", "bytes", "tcp_bytes", "how")
    return [dict(zip(keys, row, strict=True)) | {"ratio": row[2] / one} for row in rows]


def show(found: dict[str, Any], console: Console) -> None:
    """Print the table."""
    asked = found["arguments"]
    table = Table(
        title=f"bytes that a process sends: {asked['model']}, {asked['adapter']}, "
        f"{asked['processes']} processes of {asked['batch']} rows"
    )
    for name in ("what", "bytes", "per", "TCP bytes", "of a hybrid step", "how"):
        is_text = name in ("what", "per", "how")
        table.add_column(name, justify="left" if is_text else "right")
    for row in found["rows"]:
        tcp = "-" if row["tcp_bytes"] is None else f"{row['tcp_bytes']:,.0f}"
        cells = [row["name"], f"{row['bytes']:,.0f}", row["per"], tcp]
        table.add_row(*cells, f"{row['ratio']:.3g}", row["how"])
    console.print(table)
    console.print(
        "A client of FedAvg also receives what it sends. TCP bytes are the kernel's count, with "
        "the headers of messages.",
        highlight=False,
    )


def count_here(settings: Settings) -> dict[str, Any]:
    """What this process of the default group sends in a step.

    Returns:
        "sizes": bytes of "base" and "adapter"; contender -> bytes a step: "base", "adapter", and
        "base_tcp", "adapter_tcp" (None where the kernel does not count).
    """
    bench = Workbench(settings)
    inner = bench.adapted
    blocks = split_parameters(inner)
    for weight in blocks.base.values():
        weight.requires_grad_(False)
    outer = DistributedDataParallel(inner)
    gradients = GradientBytes()
    gradients.count(outer)
    sizes = {
        "base": sum(p.nbytes for p in blocks.base.values()),
        "adapter": sum(p.nbytes for p in blocks.adapter.values()),
    }
    found: dict[str, Any] = {"sizes": sizes}
    for name in _CONTENDERS:
        by_rows = name == "hybrid-rows"
        optimizer = HybridOptimizer(
            param_groups(inner, "hybrid", base_lr=RATE, adapter_lr=RATE),
            inner,
            optimizer="AdamW",
            process_group=dist.group.WORLD,
            distribution="rank-one" if by_rows else settings.distribution,
            directions_per_step="rows" if by_rows else 1,
            eps=EPS,
            self_check=False,
        )
        closure = _closure(bench, outer, by_rows=by_rows)
        found[name] = _count_steps(optimizer, closure, outer, gradients, settings.rounds)
    return found


def _closure(
    bench: Workbench, outer: DistributedDataParallel, *, by_rows: bool
) -> Callable[[], Tensor]:
    from zofo.trainer.row_losses import row_shares

    def closure() -> Tensor:
        # As in a Trainer, the perturbed evaluations send nothing.
        model = outer if torch.is_grad_enabled() else outer.module
        if not by_rows:
            return bench.loss(model)
        inputs = {key: value for key, value in bench.batch.items() if key != "labels"}
        return row_shares(outer.module, model(**inputs), bench.batch["labels"])

    return closure


def _count_steps(
    optimizer: HybridOptimizer,
    closure: Callable[[], Tensor],
    outer: DistributedDataParallel,
    gradients: GradientBytes,
    num_steps: int,
) -> dict[str, float | None]:
    processes = optimizer.processes
    assert processes is not None

    def counted(num: int) -> tuple[float, float, float | None]:
        """The bytes for the base, for gradients, and by the kernel's count, of `num` steps."""
        before = (processes.bytes_sent, gradients.sent or 0.0, tcp_bytes_sent())
        for _ in range(num):
            optimizer.step(closure)
        after = (processes.bytes_sent, gradients.sent or 0.0, tcp_bytes_sent())
        tcp = None if before[2] is None or after[2] is None else after[2] - before[2]
        return after[0] - before[0], after[1] - before[1], tcp

    counted(2)  # The first step compares the models, the second has new buckets of gradients.
    base, adapter, tcp = counted(num_steps)
    # All processes have the same batch, so their adapters stay equal without an average.
    with outer.no_sync():
        _, _, base_tcp = counted(num_steps)
    is_known = tcp is not None and base_tcp is not None
    return {
        "base": base / num_steps,
        "adapter": adapter / num_steps,
        "base_tcp": base_tcp / num_steps if base_tcp is not None else None,
        "adapter_tcp": (tcp - base_tcp) / num_steps if is_known else None,  # type: ignore[operator]
    }


def tcp_bytes_sent() -> int | None:
    """The bytes of data that this process has sent on its open TCP connections.

    Repetitions of lost segments do not count. None: the kernel does not tell (other than Linux).
    """
    if sys.platform != "linux":
        return None
    total = 0
    for entry in list(Path("/proc/self/fd").iterdir()):
        try:
            if not str(entry.readlink()).startswith("socket:"):
                continue
            with socket.socket(fileno=os.dup(int(entry.name))) as connection:
                if connection.family not in (socket.AF_INET, socket.AF_INET6):
                    continue
                info = connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 256)
        except OSError:
            continue
        if len(info) < 216:  # before Linux 4.19
            return None
        # struct tcp_info of linux/tcp.h: notsent_bytes, bytes_sent, bytes_retrans.
        (waiting,) = struct.unpack_from("I", info, 144)
        sent, again = struct.unpack_from("QQ", info, 200)
        total += waiting + sent - again
    return total
