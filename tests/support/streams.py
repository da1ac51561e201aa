"""Fake streams on the CPU, which behave as badly as a device may.

The side stream does its work as late as possible, namely when the main stream waits for it. Until
then, the tensors that it writes are NaN. Every access to a tensor is also checked against earlier
accesses. If two streams touch a tensor, one of them writes, and neither has waited for the other,
this is a race. The check finds races that the CPU, which never lags behind, would hide.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter


class RaceError(AssertionError):
    """Two streams touch a tensor, and neither has waited for the other."""


class FakeStream:
    """Counts what it has done, and what it knows that other streams have done."""

    def __init__(self):
        self.num_done = 0
        self.known: dict[FakeStream, int] = {}
        self.queue: list[Callable[[], None]] = []

    def wait_stream(self, other: FakeStream) -> None:
        self.known[other] = other.num_done
        for stream, num in other.known.items():
            self.known[stream] = max(num, self.known.get(stream, 0))
        for launch in other.queue:
            launch()
        other.queue.clear()


class FakeStreams(TorchDispatchMode):
    """Replaces `torch.cuda`. As a context it watches what the current stream touches."""

    def __init__(self):
        super().__init__()
        self.main = self.current = FakeStream()
        self.num_forks = 0
        self._touched: dict[int, dict[FakeStream, tuple[int, int]]] = {}

    def Stream(self, device: torch.device) -> FakeStream:  # noqa: N802
        return FakeStream()

    def current_stream(self, device: torch.device) -> FakeStream:
        return self.current

    @contextlib.contextmanager
    def stream(self, stream: FakeStream):
        before, self.current = self.current, stream
        try:
            yield
        finally:
            self.current = before

    def launch(
        self, work: Callable[[], None], reads: Sequence[Tensor], writes: Sequence[Tensor]
    ) -> None:
        """Launch a kernel on the current stream."""
        self.touch(reads, writes=False)
        self.touch(writes, writes=True)
        if self.current is self.main:
            work()
            return
        self.num_forks += 1
        for tensor in writes:
            tensor.detach().fill_(torch.nan)
        self.current.queue.append(work)

    def touch(self, tensors: Sequence[Tensor], *, writes: bool) -> None:
        me = self.current
        me.num_done += 1
        for tensor in tensors:
            history = self._touched.setdefault(tensor.untyped_storage().data_ptr(), {})
            for other, (last, last_write) in history.items():
                if other is not me and (last if writes else last_write) > me.known.get(other, 0):
                    raise RaceError(f"{'write' if writes else 'read'} beside another stream")
            _, last_write = history.get(me, (0, 0))
            history[me] = (me.num_done, me.num_done if writes else last_write)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if self.current is self.main:  # The side stream only runs kernels, which `launch` records.
            for argument, value in zip(func._schema.arguments, args, strict=False):
                alias = argument.alias_info
                tensors = [t for t in tree_iter(value) if isinstance(t, Tensor)]
                self.touch(tensors, writes=bool(alias and alias.is_write))
        return func(*args, **(kwargs or {}))
