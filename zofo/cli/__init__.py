"""The command line. Each command is thin and imports the library only when it runs."""

from __future__ import annotations

from zofo.cli.app import main

__all__ = ["main"]
