"""Run a function of a user with a limit on its time, and keep what it prints off the terminal.

In the main thread, an alarm interrupts it wherever Python looks for signals: in loops, in regular
expressions and while it sleeps. Elsewhere it runs in a thread that is left behind when time is up.
Nothing stops code in C that never returns to Python.
"""

from __future__ import annotations

import io
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from typing import Any, Final

_KEPT: Final = 200  # characters of what is printed


class TimeIsUp(BaseException):
    """Raised inside the function; no `except Exception` catches it."""


class Printed(io.TextIOBase):
    """Takes what is printed; keeps the beginning, and counts the rest."""

    def __init__(self) -> None:
        self.beginning, self.num_characters = "", 0

    def write(self, text: str) -> int:
        """Take a text; returns its length."""
        if len(self.beginning) < _KEPT:
            self.beginning += text[: _KEPT - len(self.beginning)]
        self.num_characters += len(text)
        return len(text)


def run_limited(function: Callable[[], Any], limit_s: float, printed: Printed) -> Any:
    """The value of the function.

    Args:
        function: may raise anything.
        limit_s: seconds that it may take.
        printed: takes what it prints.

    Raises:
        TimeoutError: if it takes longer.
        Exception: what it raises; a `SystemExit` becomes a `RuntimeError`.
    """
    can_alarm = threading.current_thread() is threading.main_thread() and hasattr(
        signal, "setitimer"
    )
    with redirect_stdout(printed), redirect_stderr(printed):
        try:
            if can_alarm:
                with _alarm(limit_s):
                    return function()
            return in_thread(function, limit_s)
        except TimeIsUp:
            raise TimeoutError(f"took longer than {limit_s:g} s") from None
        except (SystemExit, GeneratorExit) as error:
            raise RuntimeError(f"ended with {type(error).__name__}") from error


@contextmanager
def _alarm(limit_s: float) -> Iterator[None]:
    def interrupt(*_: Any) -> None:
        raise TimeIsUp

    before = signal.signal(signal.SIGALRM, interrupt)
    try:
        # Again every second, in case the function catches the first.
        signal.setitimer(signal.ITIMER_REAL, limit_s, 1.0)
        try:
            yield
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
    finally:
        signal.signal(signal.SIGALRM, before)


def in_thread(function: Callable[[], Any], limit_s: float) -> Any:
    """The value of the function, from a thread of its own; `TimeIsUp` if it takes longer."""
    found: list[tuple[bool, Any]] = []

    def run() -> None:
        try:
            found.append((True, function()))
        except BaseException as error:
            found.append((False, error))

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(limit_s)
    if not found:
        raise TimeIsUp
    is_value, value = found[0]
    if is_value:
        return value
    raise value
