"""The budget of the fuzz tests, and the folders that they damage.

`make test` tries the same few examples every time. `make fuzz` sets FUZZ_SECONDS: the tests share
this time, and hypothesis draws other examples in each round.
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest
from hypothesis import HealthCheck, Phase, settings

FUZZ_SECONDS = float(os.environ.get("FUZZ_SECONDS", "0"))
FILES = Path(__file__).parents[1] / "fixtures" / "written_by_50fe18a"

_SHARED = {
    "deadline": None,
    "database": None,
    "print_blob": False,
    "suppress_health_check": list(HealthCheck),
}
settings.register_profile(
    "zofo-test",
    derandomize=True,
    phases=[Phase.generate],
    **_SHARED,  # type: ignore[arg-type]
)
settings.register_profile("zofo-fuzz", max_examples=200, **_SHARED)  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Runs, bases and rows, with the working folder in the middle of them."""
    root = tmp_path_factory.mktemp("fuzz") / "files"
    shutil.copytree(FILES, root, ignore=shutil.ignore_patterns("make.py", "expected.json"))
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(root)
        patch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
        yield root
