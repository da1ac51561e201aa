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
"""Calls before the first sample: the first compiles, the second allocates lasting buffers."""


class Timeable(Protocol):
    """Something to time: `enter` and `leave` surround each call, outside the clock."""

    def enter(self) -> None:
        """Make the shared model ready for this contender."""

    def step(self) -> object:
        """What is timed."""

    def leave(self) -> None:
        """Remove everything that could affect another contender."""


def warm_up(
    contenders: dict[str, Any],
    device: torch.device,
    *,
    failed: dict[str, str],
    on_done: Callable[[str], None] = lambda name: None,
) -> None:
    """Call each contender a few times; those that lack memory move from it to `failed`."""
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
        contenders: name -> what is timed, warmed up.
        rounds: how many.
        device: where they run.
        seconds: name -> one sample a round; appended to at once, so that an interruption keeps
            what was measured.
        repeats: calls in a sample, whose mean it is.
        on_done: told after each sample, outside the clock.
    """
    names = list(contenders)
    for name in names:
        seconds.setdefault(name, [])
    collected = gc.isenabled()
    try:
        for number in range(rounds):
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
