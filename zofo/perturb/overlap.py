"""Compute the next layer's perturbed weights while the current layer runs.

    main stream   layer 1 reads buffer A      layer 2 reads buffer B      layer 3 reads A
    side stream   layer 2 into buffer B       layer 3 into buffer A       ...

The order of layers in the previous evaluation predicts which layer comes next. A wrong guess costs
only its computation, because two rules always hold:

    fork   The side stream starts after everything that was queued on the main stream until then.
           This includes the last update of the weights, and every reader of the buffer.
    join   The main stream waits for the side stream before it uses the next layer's weights, and
           at the end of the evaluation, also after an error.

So at most one computation runs beside one layer's forward, and nothing else touches its buffer.
The main stream allocates buffers and launch tables before a fork and frees them after a join, as
torch's caching allocator requires.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch

from zofo.perturb.owners import Owner
from zofo.perturb.scratch import Scratch, Swap
from zofo.perturb.shards import is_sharded

# Layers alternate between two buffers. Level 1 is that of outermost layers without overlap too.
# Nested layers use the levels 2, 3, ..., so -1 is free.
_LEVELS = (1, -1)


def streams_of(device_type: str) -> Any:
    """The module that makes a device's streams, such as `torch.cuda`; None without streams."""
    return torch.cuda if device_type == "cuda" else None


class SideStream:
    """A second stream of a device; `streams` comes from `streams_of`."""

    def __init__(self, device: torch.device, streams: Any) -> None:
        self._device, self._streams = device, streams
        self._stream = streams.Stream(device)

    def fork(self, launch: Callable[[], None]) -> None:
        """Launch on the side stream, after everything that is queued on the current stream."""
        self._stream.wait_stream(self._streams.current_stream(self._device))
        with self._streams.stream(self._stream):
            launch()

    def join(self) -> None:
        """Let the current stream wait for everything that was forked."""
        self._streams.current_stream(self._device).wait_stream(self._stream)


@dataclass(frozen=True)
class _Guess:
    """Weights that are being computed ahead, and their versions when the computation began."""

    owner: Owner
    swap: Swap
    versions: list[int | None]


class Overlap:
    """Swaps of the outermost layers, each computed ahead on `side` if it was predicted.

    Weights on another device than `device` are computed when their layer is called.
    """

    def __init__(self, scratch: Scratch, device: torch.device, side: SideStream) -> None:
        self._scratch, self.device, self._side = scratch, device, side
        self._expected: list[Owner] = []
        self._called: list[Owner] = []
        self._position = 0
        self._guess: _Guess | None = None

    def begin(self) -> None:
        """Begin an evaluation."""
        self._called, self._position = [], 0

    def end(self, *, is_whole: bool) -> None:
        """End an evaluation. A whole one, without an error, predicts the order of the next."""
        self._side.join()
        self._guess = None
        if is_whole:
            self._expected = self._called

    def swap_of(self, owner: Owner, point: tuple[float, int, int]) -> Swap:
        """The owner's perturbed weights, ready for the current stream.

        Args:
            owner: an owner that is called now, outside the calls of other owners.
            point: scale, step and direction.
        """
        self._side.join()
        guess, self._guess = self._guess, None
        level = _LEVELS[len(self._called) % 2]
        self._called.append(owner)
        if guess is not None and guess.owner is owner and self._still_holds(guess, level):
            return guess.swap
        swap = self._scratch.swap_of(owner, level)
        swap.compute(*point)
        return swap

    def look_ahead(self, point: tuple[float, int, int]) -> None:
        """Start to compute the weights of the layer that should follow the last one."""
        following = self._following()
        if following is None or not self._can_be_ahead(following):
            return
        # The main stream allocates, so the layout comes before the fork.
        swap = self._scratch.swap_of(following, _LEVELS[len(self._called) % 2])
        versions = _versions(following)
        self._side.fork(lambda: swap.compute(*point))
        self._guess = _Guess(following, swap, versions)

    def _following(self) -> Owner | None:
        """The layer that followed the last one in the previous evaluation."""
        try:
            # The search starts behind the last match, because a layer may be called repeatedly.
            self._position = self._expected.index(self._called[-1], self._position) + 1
        except ValueError:
            return None
        return self._expected[self._position] if self._position < len(self._expected) else None

    def _can_be_ahead(self, owner: Owner) -> bool:
        # The kernels read another layout through a copy, which the side stream would allocate.
        weights = [slot.parameter for slot in owner.slots]
        # A sharded weight is gathered just before its layer is called.
        return all(
            w.device == self.device and w.is_contiguous() and not is_sharded(w) for w in weights
        )

    def _still_holds(self, guess: _Guess, level: int) -> bool:
        """Whether the weights and their buffer have stayed in place and unchanged."""
        swap = self._scratch.swap_of(guess.owner, level)
        return swap is guess.swap and guess.versions == _versions(guess.owner)


def overlap_on(device: torch.device, scratch: Scratch) -> Overlap | None:
    """An overlap for weights on a device; None, with one warning, on a device without streams."""
    streams = streams_of(device.type)
    if streams is None:
        _say_without_streams(device.type)
        return None
    return Overlap(scratch, device, SideStream(device, streams))


@lru_cache(maxsize=8)
def _say_without_streams(device_type: str) -> None:
    warnings.warn(
        f"overlap has no effect on {device_type}, because it needs CUDA streams; leave it out",
        stacklevel=6,
    )


def _versions(owner: Owner) -> list[int | None]:
    # Inference tensors do not count their in-place writes.
    weights = [slot.parameter for slot in owner.slots]
    return [None if w.is_inference() else w._version for w in weights]
