"""Whatever the files hold, a command ends with a message: no traceback, no hang, no flood."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest
from hypothesis import strategies as st

from tests.fuzz.explore import explore, run
from tests.support.damage import seal
from tests.support.mutations import DAMAGE, damage, restore

pytestmark = pytest.mark.filterwarnings("default")

RUNS = ("lora-float32", "lora-float32-interrupted", "fo-ft", "p-tuning")


def files_of(*names: str) -> list[str]:
    return sorted(str(p) for name in names for p in Path(name).rglob("*") if p.is_file())


def with_damage(path: str, change: tuple, check) -> None:
    """Check while the file is damaged, then put it back."""
    target = Path(path)
    content = target.read_bytes()
    try:
        damage(target, change)
        check()
    finally:
        restore(target, content)


def sealed(path: str) -> None:
    """Make the digests of an artefact fit the damage, as a hostile writer would."""
    run_folder = Path(path.split(os.sep)[0])
    try:
        seal(run_folder / "artifact")
    except Exception:  # noqa: BLE001 - there is nothing to seal
        return


def test_info_and_report(folder):
    def check(drawn):
        path, change = drawn
        name = path.split(os.sep)[0]

        def commands():
            run("info", str(Path(path).parent))
            run("info", name)
            run("info", name, "--json")
            run("report", name, "--to", "report.html")

        with_damage(path, change, commands)

    explore(st.tuples(st.sampled_from(files_of(*RUNS)), DAMAGE), check, quick=60)
