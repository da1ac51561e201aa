"""The next layer's perturbed weights, computed while the layer before it runs.

    main stream   layer 1 reads buffer A      layer 2 reads buffer B      layer 3 reads A
    side stream   layer 2 into buffer B       layer 3 into buffer A       ...

Which layer comes next is guessed: the one that did in the evaluation before. A wrong guess costs
its computation and nothing else, because two rules hold whatever was guessed:

    fork   what the side stream is asked for begins after all that the main stream was asked for
           until then: the weights' last update, and every reader of the buffer that is written.
    join   the main stream waits for the side stream before the next layer's weights are put in,
           guessed or not, and when the evaluation ends, an error included.

So at most one computation is under way, beside one layer's forward, and nobody else touches its
buffer meanwhile. Buffers and launch tables are allocated by the main stream before a fork and freed
by it after a join, which is all that torch's caching allocator asks for.
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

_LEVELS = (1, -1)
"""Of the two buffers that layers alternate between; the first is that of every outermost layer."""


def streams_of(device_type: str) -> Any:
    """What makes streams on such a device, as `torch.cuda` does; None where nothing can."""
    return torch.cuda if device_type == "cuda" else None


class SideStream:
    """A stream of a device beside the one that its caller computes on.

    Args:
        device: where.
        streams: from `streams_of`.
    """

    def __init__(self, device: torch.device, streams: Any) -> None:
        self._device, self._streams = device, streams
        self._stream = streams.Stream(device)

    def fork(self, launch: Callable[[], None]) -> None:
        """Launch on the side stream, after all that the current stream was asked for so far."""
        self._stream.wait_stream(self._streams.current_stream(self._device))
        with self._streams.stream(self._stream):
            launch()

    def join(self) -> None:
        """What the current stream is asked for from now on comes after all that was forked."""
        self._streams.current_stream(self._device).wait_stream(self._stream)


@dataclass(frozen=True)
class _Guess:
    """Weights that are being computed ahead."""

    owner: Owner
    swap: Swap
    versions: list[int | None]


class Overlap:
    """Swaps of the outermost layers of one device, each computed ahead where it was foreseen.

    Args:
        scratch: has the buffers.
        device: where the weights lie; layers elsewhere are computed when they are called.
        side: of that device.
    """

    def __init__(self, scratch: Scratch, device: torch.device, side: SideStream) -> None:
        self._scratch, self.device, self._side = scratch, device, side
        self._expected: list[Owner] = []
        self._called: list[Owner] = []
        self._position = 0
        self._guess: _Guess | None = None

    def begin(self) -> None:
        """An evaluation begins."""
        self._called, self._position = [], 0

    def end(self, *, is_whole: bool) -> None:
        """An evaluation has ended; one that was whole tells what to expect of the next."""
        self._side.join()
        self._guess = None
        if is_whole:
            self._expected = self._called

    def swap_of(self, owner: Owner, point: tuple[float, int, int]) -> Swap:
        """The owner's perturbed weights, computed, for the current stream.

        Args:
            owner: a module that is called, by no other owner.
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
        """Have the weights of the layer after the last one computed beside it."""
        following = self._following()
        if following is None or not self._can_be_ahead(following):
            return
        # Laid out before the fork, by the main stream.
        swap = self._scratch.swap_of(following, _LEVELS[len(self._called) % 2])
        versions = _versions(following)
        self._side.fork(lambda: swap.compute(*point))
        self._guess = _Guess(following, swap, versions)

    def _following(self) -> Owner | None:
        """What came after the last layer when it was called from the expected position on."""
        try:
            self._position = self._expected.index(self._called[-1], self._position) + 1
        except ValueError:
            return None
        return self._expected[self._position] if self._position < len(self._expected) else None

    def _can_be_ahead(self, owner: Owner) -> bool:
        """Not with weights that lie elsewhere, or that are copied to be read."""
        weights = [slot.parameter for slot in owner.slots]
        return all(w.device == self.device and w.is_contiguous() for w in weights)

    def _still_holds(self, guess: _Guess, level: int) -> bool:
        """Whether the weights are where and what they were when the guess was made."""
        swap = self._scratch.swap_of(guess.owner, level)
        return swap is guess.swap and guess.versions == _versions(guess.owner)


def overlap_on(device: torch.device, scratch: Scratch) -> Overlap | None:
    """An overlap for weights on a device; None, and said once, where there are no streams."""
    streams = streams_of(device.type)
    if streams is None:
        _say_without_streams(device.type)
        return None
    return Overlap(scratch, device, SideStream(device, streams))


@lru_cache(maxsize=8)
def _say_without_streams(device_type: str) -> None:
    warnings.warn(
        f"overlap has no effect on {device_type}: it needs the streams of CUDA; leave it out",
        stacklevel=6,
    )


def _versions(owner: Owner) -> list[int | None]:
    weights = [slot.parameter for slot in owner.slots]
    return [None if w.is_inference() else w._version for w in weights]
