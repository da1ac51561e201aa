"""What the terminal shows: lines, progress bars, and nothing of transformers in quiet mode.

Anyone may have chosen the names in a file. All text for the terminal therefore goes through `say`
or a `plain_console`, which show a character that could move the cursor or reorder a line as �.
"""

from __future__ import annotations

import contextlib
import json
import sys
import unicodedata
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Final

from rich.console import Console
from rich.segment import Segment

if TYPE_CHECKING:
    from rich.progress import Progress, TaskID

_UNSAFE: Final = ("Cc", "Cf", "Cs", "Zl", "Zp")  # controls, formats, surrogates, separators
_KEPT: Final = "\n\t\u200c\u200d"  # Scripts and emoji join their signs with the last two.


def printable(text: str) -> str:
    """The text with � for each character that could move the cursor or reorder the line."""
    return _with_unsafe(text, lambda sign: "\N{REPLACEMENT CHARACTER}")


def printable_json(text: str) -> str:
    """The same JSON with an escape for each character that `printable` replaces."""
    return _with_unsafe(text, lambda sign: json.dumps(sign)[1:-1])


def _with_unsafe(text: str, other: Callable[[str], str]) -> str:
    if text.isprintable():
        return text
    is_safe = {c: c in _KEPT or unicodedata.category(c) not in _UNSAFE for c in {*text}}
    return "".join(c if is_safe[c] else other(c) for c in text)


def say(text: str, *, stderr: bool = False) -> None:
    """Print text on standard output, or on standard error."""
    print(printable(text), file=sys.stderr if stderr else sys.stdout)


class _PlainConsole(Console):
    """A console that styles text itself, and in which no text can style anything."""

    def render(self, *args: Any, **options: Any) -> Iterable[Segment]:
        for segment in super().render(*args, **options):
            yield segment if segment.control else segment._replace(text=printable(segment.text))


def plain_console(
    *, stderr: bool = False, width: int | None = None, soft_wrap: bool = False
) -> Console:
    """A console that prints every name as it is, because [x] in a path is no markup."""
    return _PlainConsole(
        stderr=stderr,
        width=width,
        soft_wrap=soft_wrap,
        highlight=False,
        markup=False,
        emoji=False,
    )


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Silence the messages, warnings and progress bars of transformers; exceptions still rise."""
    from transformers.utils import logging

    level = logging.get_verbosity()
    had_progress = logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.set_verbosity(level)
        if had_progress:
            logging.enable_progress_bar()


def new_progress(console: Console, unit: str) -> Progress:
    """A progress bar with a count, the remaining time and the text of its task."""
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeRemainingColumn,
    )

    return Progress(
        TextColumn("{task.description}", markup=False),
        BarColumn(bar_width=20),
        MofNCompleteColumn(),
        TextColumn(unit),
        TimeRemainingColumn(),
        TextColumn("{task.fields[text]}", markup=False),
        console=console,
        transient=True,
    )


@contextmanager
def replay_bar(console: Console) -> Iterator[Callable[[int, int], None]]:
    """A progress bar that appears at its first `report(weights done, all weights)`."""
    progress = new_progress(console, "M weights")
    task: TaskID | None = None

    def report(num_done: int, num_weights: int) -> None:
        nonlocal task
        if task is None:
            progress.start()
            task = progress.add_task("replaying", total=num_weights // 10**6, text="")
        progress.update(task, completed=num_done // 10**6)

    try:
        yield report
    finally:
        if task is not None:
            progress.stop()


def duration_text(seconds: float) -> str:
    """A duration as `minutes:seconds`, from an hour on as `hours:minutes:seconds`."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"
