"""Times every contender once a round, in rotating order.

A slow phase of the machine slows all contenders of a round alike. Ratios are therefore taken within
a round, and their median is reported.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Mapping
from typing import Any, Protocol

import torch

from zofo.bench.device import free_cached, is_out_of_memory, seconds_of

NUM_WARM_UPS = 2
"""Calls before the first sample. The first compiles; the second allocates lasting buffers."""


class Timeable(Protocol):
    """A contender or a kernel. `enter` and `leave` surround each sample and are not timed."""

    def enter(self) -> None:
        """Make the shared model ready for this contender."""

    def step(self) -> object:
        """Run the part that is timed."""

    def leave(self) -> None:
        """Remove everything that could affect another contender."""


def warm_up(
    contenders: dict[str, Any],
    device: torch.device,
    *,
    failed: dict[str, str],
    on_done: Callable[[str], None] = lambda name: None,
) -> None:
    """Call each contender a few times; one that lacks memory is dropped and named in `failed`."""
    for name in list(contenders):
        try:
            for _ in range(NUM_WARM_UPS):
                _call(contenders[name], device, repeats=1)
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            failed[name] = "out of memory"
        if name in failed:
            del contenders[name]
            free_cached(device)
        on_done(name)


def time_rounds(
    contenders: Mapping[str, Timeable],
    rounds: int,
    device: torch.device,
    *,
    seconds: dict[str, list[float]],
    repeats: int = 1,
    on_done: Callable[[str], None] = lambda name: None,
) -> None:
    """Time every contender once a round.

    Args:
        contenders: name -> contender, warmed up.
        rounds: number of rounds.
        device: the device that they run on.
        seconds: name -> one sample per round. Each sample is appended at once, so that an
            interruption keeps it.
        repeats: number of calls whose mean is a sample.
        on_done: called with the name after each sample, while no clock runs.
    """
    names = list(contenders)
    for name in names:
        seconds.setdefault(name, [])
    collected = gc.isenabled()
    try:
        for number in range(rounds):
            # The collector runs between the rounds, so that no sample includes its pauses.
            gc.collect()
            gc.disable()
            turn = number % max(len(names), 1)
            for name in names[turn:] + names[:turn]:
                seconds[name].append(_call(contenders[name], device, repeats=repeats))
                on_done(name)
    finally:
        if collected:
            gc.enable()


def _call(contender: Timeable, device: torch.device, *, repeats: int) -> float:
    contender.enter()
    try:
        return seconds_of(contender.step, device, repeats=repeats)
    finally:
        contender.leave()
