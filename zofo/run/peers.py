"""The processes that torchrun or accelerate launch started for one run.

Each of them trains on its own rows. The first one alone writes files, evaluates and speaks. What it
finds, the others receive. An error of any process ends all of them, and the first one reports it.
"""

from __future__ import annotations

import contextlib
import os
import socket
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, Final, TypeVar

import torch
import torch.distributed as dist

from zofo.environment import started_processes
from zofo.errors import TrainingStoppedError, UserError

_T = TypeVar("_T")
_ENDINGS: Final = (UserError, TrainingStoppedError, OSError)
"""What the first process reports without a traceback."""
_LIMIT: Final = timedelta(days=1)  # The others wait while the first one evaluates.
_START: Final = timedelta(minutes=5)  # The processes need not start at the same time.
_ANSWER: Final = timedelta(seconds=10)  # of a store that listens
_LOST: Final = ("onnection closed", "onnection reset", "NCCL", "ncclRemoteError", "Timed out")


def may_restart() -> bool:
    """Whether torchrun would start the command again, or has done so."""
    return int(os.environ.get("TORCHELASTIC_MAX_RESTARTS", "0")) > 0


class Peers:
    """All processes of this run, which are one or more.

    Attributes:
        rank: the number of this process.
        size: the number of processes.
    """

    def __init__(self) -> None:
        is_alone = not dist.is_available() or not dist.is_initialized()
        self.rank, self.size = (0, 1) if is_alone else (dist.get_rank(), dist.get_world_size())
        self._raised: Exception | None = None

    @property
    def is_first(self) -> bool:
        """Whether this process writes and speaks."""
        return self.rank == 0

    def knows(self, error: Exception) -> bool:
        """Whether all processes have raised this error, so that the first one reports it."""
        return error is self._raised

    @contextmanager
    def together(self) -> Iterator[None]:
        """Run the block in every process; an error in any of them is raised in all.

        Raises:
            UserError: the error of the first process that has one.
        """
        error = None
        try:
            yield
        except _ENDINGS as caught:
            if self.size == 1:
                raise
            error = caught
        if self.size == 1:
            return
        errors: list[Any] = [None] * self.size
        dist.all_gather_object(errors, error)
        for rank, found in enumerate(errors):
            if found is not None:
                # The others may have another message, such as of a file that only they lack.
                self._raised = found if rank == 0 else UserError(f"process {rank}: {found}")
                raise self._raised

    def from_first(self, compute: Callable[[], _T]) -> _T:
        """What the function returns in the first process, in all; its error is raised in all."""
        if self.size == 1:
            return compute()
        found: list[Any] = [None, None]
        if self.is_first:
            try:
                found[0] = compute()
            except _ENDINGS as error:
                found[1] = error
        dist.broadcast_object_list(found, src=0)
        if found[1] is not None:
            self._raised = found[1]
            raise found[1]
        return found[0]

    def check_equal(self, values: Mapping[str, Any]) -> None:
        """Check that all processes have the same values.

        Raises:
            UserError: in all of them; it names the first value that differs.
        """
        found: list[Any] = [None] * self.size
        if self.size > 1:
            dist.all_gather_object(found, dict(values))
        for rank, other in enumerate(found[1:], 1):
            for name in {**found[0], **other}:
                if found[0].get(name) != other.get(name):
                    self._raised = UserError(
                        f"process 0 and process {rank} have different values of {name}: "
                        f"{found[0].get(name)} and {other.get(name)}; start every process with the "
                        "same command, model and data"
                    )
                    raise self._raised

    @contextmanager
    def naming_loss(self) -> Iterator[None]:
        """Turn the error of a connection to a process that has ended into one message.

        Raises:
            TrainingStoppedError: if a process was lost.
        """
        try:
            yield
        except RuntimeError as error:
            is_lost = isinstance(error, dist.DistError) or any(s in str(error) for s in _LOST)
            if self.size == 1 or not is_lost:
                raise
            raise TrainingStoppedError(
                "another process of this run has ended, so all end. The checkpoints are whole: "
                "start the processes again with --resume"
            ) from error


_open: list[Peers] = []  # of the outermost block


@contextmanager
def joined() -> Iterator[Peers]:
    """Connect this process with the others of its launcher, until the outermost block ends.

    Raises:
        UserError: if there are more processes than GPUs, or they cannot be connected.
    """
    if _open:
        yield _open[0]
        return
    is_ours = started_processes() > 1 and not dist.is_initialized()
    if is_ours:
        _connect()
    _open.append(Peers())
    try:
        yield _open[0]
    finally:
        _open.clear()
        if is_ours:
            # After an error, NCCL may wait for a process that has ended.
            ending = threading.Thread(target=_part, daemon=True)
            ending.start()
            ending.join(10)


def _connect() -> None:
    local, backend = int(os.environ.get("LOCAL_RANK", "0")), "gloo"
    if torch.cuda.is_available():
        num_devices = torch.cuda.device_count()
        if local >= num_devices:
            raise UserError(
                f"process {local} of this machine has no GPU of its own, because there are "
                f"{num_devices}; start at most {num_devices} with --nproc-per-node"
            )
        torch.cuda.set_device(local)
        backend = "cpu:gloo,cuda:nccl"
    try:
        _check_store()
        store, rank, size = next(dist.rendezvous("env://", timeout=_START))
        # Under torchrun, the store still holds the addresses of processes before a restart.
        count = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
        store = dist.PrefixStore(f"start {count}", store)
        dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=_LIMIT)
    except (RuntimeError, ValueError) as error:
        address = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
        reason = " ".join(str(error).split())[:200]
        raise UserError(
            f"the {started_processes()} processes cannot be connected at {address} ({reason}); let "
            "torchrun choose a free port with --standalone, or give another --master-port"
        ) from error


def _check_store() -> None:
    """Check that a free-standing process finds the store of process 0 at its address.

    Torch would wait without an end for the answer of another program.

    Raises:
        RuntimeError, ValueError: if nothing listens there, or another program does.
    """
    host, port = os.environ.get("MASTER_ADDR"), int(os.environ.get("MASTER_PORT", "0"))
    is_started = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"  # by torchrun
    if is_started or not host or os.environ.get("RANK", "0") == "0":
        return
    end = time.monotonic() + _START.total_seconds()
    while True:
        try:
            socket.create_connection((host, port), timeout=5).close()
            break
        except OSError:
            if time.monotonic() > end:
                raise RuntimeError("nothing listens there") from None
            time.sleep(0.2)
    found = []

    def ask() -> None:
        with contextlib.suppress(Exception):
            found.append(
                dist.TCPStore(host, port, is_master=False, wait_for_workers=False, timeout=_ANSWER)
            )

    asking = threading.Thread(target=ask, daemon=True)
    asking.start()
    asking.join(2 * _ANSWER.total_seconds())
    if not found:
        raise RuntimeError("another program listens there")


def _part() -> None:
    with contextlib.suppress(Exception):
        dist.destroy_process_group()
