"""The application with its exit codes and its handling of errors, which all commands share.

If the user can correct an error, the command ends with a message and an exit code, and without a
traceback.
"""

from __future__ import annotations

import errno
import functools
import logging
import os
import signal
import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, Final, TypeVar

import typer

from zofo.console import say
from zofo.errors import TrainingStoppedError, UserError, shown

EXIT_STOPPED: Final = 1
EXIT_USER_ERROR: Final = 2
EXIT_INTERRUPTED: Final = 130  # 128 + SIGINT, as shells report it
EXIT_TERMINATED: Final = 128 + signal.SIGTERM


class Terminated(KeyboardInterrupt):
    """SIGTERM arrived. A command then ends as after Ctrl-C, with the exit code of SIGTERM."""

    exit_code: Final = EXIT_TERMINATED


F = TypeVar("F", bound=Callable[..., Any])

app = typer.Typer(
    name="zofo",
    help="Hybrid fine-tuning of language models: zeroth-order steps for every base weight, exact "
    "gradients for a PEFT adapter.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

Overrides = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="[CONFIG.yaml] [KEY=VALUE]...",
        help="A configuration file, and values that override it, such as steps=500 "
        "task.num_train=200.",
        show_default=False,
    ),
]
TrustRemoteCode = Annotated[
    bool, typer.Option("--trust-remote-code", help="Run code from the base's repository.")
]


def reports_errors(command: F) -> F:
    """Turn bad input, Ctrl-C and SIGTERM into a message and an exit code."""

    @functools.wraps(command)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        try:
            with warnings.catch_warnings(), _bitsandbytes_errors_only(), _ending_on_sigterm():
                warnings.showwarning = _show_warning
                _check_alone(command.__name__)
                return command(*args, **kwargs)
        except (UserError, TrainingStoppedError) as error:
            say(f"error: {error}", stderr=True)
            raise typer.Exit(code_of_problem(error)) from None
        except (OSError, UnicodeEncodeError) as error:
            message = _problem_of_path(error)
            if message is None:
                raise
            say(f"error: {message}", stderr=True)
            raise typer.Exit(EXIT_USER_ERROR) from None
        except KeyboardInterrupt as error:
            say("interrupted; what was not finished is removed", stderr=True)
            raise typer.Exit(exit_code_of(error)) from None

    return wrapped  # type: ignore[return-value]


def _check_alone(command: str) -> None:
    """Check that a launcher of several processes has not started a command for one process."""
    if command == "train" or "RANK" not in os.environ:
        return
    from zofo.environment import started_processes

    if started_processes() > 1:
        raise UserError(
            f"a launcher has started {started_processes()} processes, and of the commands only "
            f"'zofo train' shares its work among them; start 'zofo {command}' by itself"
        )


def _problem_of_path(error: OSError | UnicodeEncodeError) -> str | None:
    """What is wrong with a name, a permission or a disk; None if the error is about none of them.

    The commands check their paths before they work. This is for paths that no check foresaw.
    """
    if isinstance(error, UnicodeEncodeError):
        return f"{shown(error.object)} is no text in UTF-8; rename it, or write it in UTF-8"
    if error.filename is None and error.errno != errno.ENOSPC:
        return None
    where = "" if error.filename is None else f"{shown(str(error.filename))}: "
    return f"{where}{error.strerror}; choose another name or folder, or correct its permissions"


def code_of_problem(error: Exception) -> int:
    """The exit code after an error that a message explains."""
    return EXIT_STOPPED if isinstance(error, TrainingStoppedError) else EXIT_USER_ERROR


def exit_code_of(error: KeyboardInterrupt) -> int:
    """The exit code after the signal that stopped a command; that of Ctrl-C if none is known."""
    return int(getattr(error, "exit_code", EXIT_INTERRUPTED))


@contextmanager
def _ending_on_sigterm() -> Iterator[None]:
    """Turn SIGTERM into an exception, so that a command removes what is incomplete.

    A training loop and a study handle the signal themselves meanwhile.
    """

    def end(*_: Any) -> None:
        raise Terminated

    is_main = threading.current_thread() is threading.main_thread()
    # Whoever has set another handler, or ignores the signal, keeps it.
    is_ours = is_main and signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    if is_ours:
        signal.signal(signal.SIGTERM, end)
    try:
        yield
    finally:
        if is_ours:
            signal.signal(signal.SIGTERM, signal.SIG_DFL)


def _show_warning(message: Warning | str, *_: Any, **__: Any) -> None:
    """Print a warning on one line, without the file and line of code that raised it."""
    say(f"warning: {message}", stderr=True)


@contextmanager
def _bitsandbytes_errors_only() -> Iterator[None]:
    """Silence bitsandbytes, which peft imports: it warns of kernels that zofo does not use."""
    logger = logging.getLogger("bitsandbytes")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


def split_arguments(arguments: list[str] | None) -> tuple[Path | None, list[str]]:
    """The configuration file, if the first argument names one, and the overrides."""
    given = list(arguments or [])
    if given and "=" not in given[0]:
        return Path(given[0]), given[1:]
    return None, given
