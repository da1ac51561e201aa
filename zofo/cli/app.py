"""The application with all its commands, in the order in which the help lists them."""

from __future__ import annotations

from typing import Annotated

import typer

from zofo.cli.exits import app
from zofo.console import say

# isort: off
# A module registers its commands when it is imported; the help lists them in this order.
from zofo.cli import (  # noqa: F401
    train,
    use,
    study,
    advise,
    doctor,
    tasks,
    saved,
    report,
    smoothness,
    bench,
    convergence,
)


def _version(wanted: bool) -> None:
    if wanted:
        from zofo.version import __version__

        say(f"zofo {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version.")
    ] = False,
) -> None:
    pass


def main() -> None:
    """Run the command line. The script `zofo` calls this function."""
    app()
