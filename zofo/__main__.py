"""`python -m zofo` is `zofo`."""

from __future__ import annotations

from zofo.cli import main

if __name__ == "__main__":
    main()
