"""Functions that several processes run together, connected by gloo on the loopback."""

import tempfile
import traceback
from contextlib import suppress
from datetime import timedelta
from pathlib import Path

from tests.support.forks import context


def in_group(size, function, *arguments, limit_s=180):
    """Run function(*arguments) in `size` connected processes; what they return, by rank.

    An exception arrives as a string, and None from a process that has ended without an answer. No
    process is left when this returns.
    """
    found = [None] * size
    with tempfile.TemporaryDirectory() as folder:
        calls = []
        for rank in range(size):
            reader, writer = context().Pipe(duplex=False)
            asked = (rank, size, str(Path(folder) / "store"), function, arguments, writer)
            process = context().Process(target=_join, args=asked)
            process.start()
            writer.close()
            calls.append((process, reader))
        try:
            for rank, (process, reader) in enumerate(calls):
                with suppress(EOFError):
                    if reader.poll(limit_s):
                        found[rank] = reader.recv()
                process.join(10)
        finally:
            for process, _ in calls:
                process.kill()
                process.join()
    return found


def _join(rank, size, store, function, arguments, writer):
    import os

    import torch
    import torch.distributed as dist

    os.environ |= {"GLOO_SOCKET_IFNAME": "lo", "RANK": str(rank), "WORLD_SIZE": str(size)}
    os.environ |= {"LOCAL_RANK": str(rank), "LOCAL_WORLD_SIZE": str(size)}
    torch.set_num_threads(1)
    limit = timedelta(seconds=60)
    try:
        dist.init_process_group(
            "gloo", init_method=f"file://{store}", rank=rank, world_size=size, timeout=limit
        )
        answer = function(*arguments)
        with suppress(RuntimeError):  # of a process that has ended
            dist.barrier()
    except Exception as error:
        traceback.print_exc()
        answer = f"{type(error).__name__}: {error}"
    writer.send(answer)
    writer.close()
    os._exit(0)  # without the exit handlers of the process that was forked
