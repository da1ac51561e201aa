"""How long training has taken, without what is no training."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch


class TrainingClock:
    """Seconds of training; stands still while dev rows are scored and checkpoints are written.

    Those take as long for every method and as often as one asks for them, so they would bring the
    methods closer together than they are.
    """

    def __init__(self) -> None:
        self._done = 0.0
        self._since: float | None = None

    def start(self, done: float = 0.0) -> None:
        """Begin to count.

        Args:
            done: seconds that a run which is continued has behind it.
        """
        self._done, self._since = done, time.monotonic()

    @property
    def seconds(self) -> float:
        """Counted so far."""
        running = 0.0 if self._since is None else time.monotonic() - self._since
        return round(self._done + running, 3)

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Stand still, from when the device has done what it was given."""
        if torch.cuda.is_initialized():
            torch.cuda.synchronize()
        was_running = self._since is not None
        self._done, self._since = self.seconds, None
        try:
            yield
        finally:
            if was_running:
                self._since = time.monotonic()
