"""The version of zofo, in a file that imports nothing."""

from typing import Final

__version__: Final = "0.1.0"
