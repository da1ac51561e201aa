"""Draw examples within a budget, and run a command on each in this process."""

from __future__ import annotations

import random
import resource
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import hypothesis
from hypothesis import settings
from hypothesis.strategies import SearchStrategy
from typer.testing import CliRunner

from tests.fuzz.conftest import FUZZ_SECONDS
from zofo.cli.app import app
from zofo.console import printable

LIMIT_CPU_S = 20  # of one command, far above what any takes
LIMIT_WALL_S = 180  # for a command that waits; other processes may slow down this one
LIMIT_BYTES = 1 << 30  # by which one command may raise the peak memory of the process
EXIT_CODES = (0, 1, 2, 130, 143)
NUM_TESTS = 8  # which share FUZZ_SECONDS
QUICK_CPU_S = 1.5  # of each test in `make test`


class TooSlowError(BaseException):
    """A command ran into the limit; no `except Exception` holds it up."""


def explore(strategy: SearchStrategy[Any], check: Callable[[Any], None], *, quick: int) -> None:
    """Check examples: at most `quick` in `make test`, and for the given time in `make fuzz`."""
    stop, spent = time.monotonic() + FUZZ_SECONDS / NUM_TESTS, [0.0]

    def example(value: Any) -> None:
        is_over = time.monotonic() > stop if FUZZ_SECONDS else spent[0] > QUICK_CPU_S
        if is_over:
            return
        start = time.process_time()
        check(value)
        # One example that imports half of all packages leaves time for others.
        spent[0] += min(time.process_time() - start, QUICK_CPU_S / 4)

    if not FUZZ_SECONDS:
        examples = hypothesis.given(strategy)(example)
        settings(settings.get_profile("zofo-test"), max_examples=quick)(examples)()
    while time.monotonic() < stop:
        # hypothesis takes settings once for each function, so every round has a new one.
        examples = hypothesis.given(strategy)(example)
        drawn = hypothesis.seed(random.SystemRandom().getrandbits(64))(examples)
        settings(settings.get_profile("zofo-fuzz"))(drawn)()


def run(*arguments: str) -> str:
    """Run `zofo` in this process, check how it ends, and return all that it prints."""
    before = peak_bytes()
    with time_limit():
        done = CliRunner().invoke(app, [*arguments])
    said = done.output
    if done.exception is not None and not isinstance(done.exception, SystemExit):
        raise AssertionError(f"zofo {arguments} raised {done.exception!r}") from done.exception
    assert done.exit_code in EXIT_CODES, (arguments, done.exit_code, said)
    assert "Traceback" not in said, (arguments, said)
    assert done.exit_code == 0 or said.strip(), (arguments, "said nothing")
    assert len(said) < 50_000, (arguments, len(said))
    assert said == printable(said), (arguments, said)
    assert peak_bytes() - before < LIMIT_BYTES, (arguments, "took too much memory")
    return said


def peak_bytes() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


@contextmanager
def time_limit() -> Iterator[None]:
    """Interrupt a command that computes or waits for too long."""

    def end(number: int, _: Any) -> None:
        raise TooSlowError(f"a command was stopped by {signal.Signals(number).name}")

    timers = {signal.SIGPROF: signal.ITIMER_PROF, signal.SIGALRM: signal.ITIMER_REAL}
    limits = {signal.SIGPROF: LIMIT_CPU_S, signal.SIGALRM: LIMIT_WALL_S}
    previous = {number: signal.signal(number, end) for number in timers}
    try:
        for number, timer in timers.items():
            signal.setitimer(timer, limits[number])
        yield
    finally:
        for number, timer in timers.items():
            signal.setitimer(timer, 0)
            signal.signal(number, previous[number])
