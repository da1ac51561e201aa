"""Runs a function in several connected processes of this machine, and leaves none behind."""

from __future__ import annotations

import json
import logging
import os
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import suppress
from datetime import timedelta
from pathlib import Path
from typing import Any, Final

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from zofo.disk.files import write_json
from zofo.errors import UserError

LIMIT_S: Final = 1800
"""Seconds after which the processes are stopped. A choice: a large model takes minutes to load."""
START_METHOD: Final = "spawn"
_FAILED: Final = "failed"
_LOOPBACK: Final = "lo" if sys.platform == "linux" else "lo0"


def in_processes(
    function: Callable[..., Any],
    *arguments: Any,
    num_processes: int,
    num_threads: int = 1,
    backend: str = "gloo",
) -> Any:
    """Run function(*arguments) in processes that form the default group of `torch.distributed`.

    Args:
        function: a function at the top level of a module. Its result must be representable in JSON.
        arguments: its arguments, which are pickled.
        num_processes: number of processes.
        num_threads: CPU threads of each.
        backend: "gloo", or "nccl" with a GPU for each process.

    Returns:
        What the function returned in process 0.

    Raises:
        UserError: with the first failure of a process, or if they take longer than `LIMIT_S`.
    """
    # Torch would report every process that it stops after the first failure.
    logging.getLogger("torch.multiprocessing.spawn").setLevel(logging.ERROR)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        started = mp.start_processes(
            _process,
            args=(num_processes, num_threads, backend, name, function, arguments),
            nprocs=num_processes,
            join=False,
            daemon=True,
            start_method=START_METHOD,
        )
        end = time.monotonic() + LIMIT_S
        try:
            while not started.join(timeout=1):
                if time.monotonic() > end:
                    raise UserError(f"the processes did not finish within {LIMIT_S} s")
        except mp.ProcessRaisedException as error:
            raise UserError((folder / _FAILED).read_text()) from error
        except mp.ProcessExitedException as error:
            why = error.signal_name or f"exit code {error.exit_code}"
            raise UserError(
                f"process {error.error_index} ended with {why}; if memory was short, choose a "
                "smaller model or fewer processes"
            ) from error
        finally:
            for process in started.processes:
                process.kill()
                process.join()
        return json.loads((folder / "result.json").read_text())


def _process(
    rank: int,
    num_processes: int,
    num_threads: int,
    backend: str,
    folder: str,
    function: Callable[..., Any],
    arguments: tuple[Any, ...],
) -> None:
    # Ctrl-C reaches every process of the terminal. The first one says so.
    signal.signal(signal.SIGINT, lambda *_: os._exit(130))
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    os.dup2(2, 1)  # The standard output is the caller's.
    os.environ.setdefault("GLOO_SOCKET_IFNAME", _LOOPBACK)
    torch.set_num_threads(num_threads)
    try:
        if backend == "nccl":
            torch.cuda.set_device(rank)
        dist.init_process_group(
            backend,
            init_method=f"file://{folder}/store",
            rank=rank,
            world_size=num_processes,
            timeout=timedelta(seconds=LIMIT_S),
        )
        result = function(*arguments)
        if rank == 0:
            write_json(Path(folder) / "result.json", result)
        dist.barrier()  # A process that ends first would close its connections.
        dist.destroy_process_group()
    except Exception as error:
        # Only the first failure says what is wrong: the others follow from it.
        with suppress(FileExistsError), (Path(folder) / _FAILED).open("x") as file:
            kind = "" if isinstance(error, UserError) else f"{type(error).__name__}: "
            file.write(f"process {rank} failed: {kind}{error}")
        raise
