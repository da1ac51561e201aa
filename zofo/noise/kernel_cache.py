"""Where numba keeps compiled kernels, if neither the package nor the home folder can be written."""

from __future__ import annotations

import os
import stat
import tempfile
import warnings
from functools import lru_cache
from pathlib import Path

import numba


@lru_cache(maxsize=1)
def can_cache() -> bool:
    """Whether numba can keep compiled functions, as the value of its option `cache`.

    If need be, a private folder in the temporary directory becomes the place.
    """
    if _finds_place():
        return True
    folder = _private_folder()
    if folder is not None:
        numba.config.CACHE_DIR = str(folder)
    found = _finds_place()
    place = f"in {folder}" if found else "only until this process ends, and compiles for a minute"
    warnings.warn(
        "neither the folder of zofo nor the home folder can be written, so numba keeps compiled "
        f"kernels {place}; set NUMBA_CACHE_DIR to a folder that can be written",
        stacklevel=2,
    )
    return found


def _finds_place() -> bool:
    try:
        numba.njit(cache=True)(_nothing)  # looks for a place, and compiles nothing
    except (RuntimeError, OSError):
        return False
    return True


def _nothing() -> None:
    pass


def _private_folder() -> Path | None:
    """A folder of this user that nobody else can write; None if there is none."""
    try:
        user = os.getuid() if hasattr(os, "getuid") else 0
        folder = Path(tempfile.gettempdir()) / f"zofo-numba-{user}"
        folder.mkdir(mode=0o700, exist_ok=True)
        found = folder.lstat()
    except OSError:
        return None
    # Numba reads pickles there, so a folder that another user has prepared could run code.
    is_ours = stat.S_ISDIR(found.st_mode) and found.st_uid == user and not found.st_mode & 0o022
    return folder if is_ours or os.name == "nt" else None
