"""The command line: thin commands over the library, each importing what it needs when it runs."""

from __future__ import annotations

from zofo.cli.app import main

__all__ = ["main"]
