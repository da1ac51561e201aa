"""Quiet mode and progress bars for the terminal."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeRemainingColumn,
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
