"""Pipes and devices in place of any file of a saved folder are refused before they are opened."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from tests.support.damage import make_special, refused
from zofo.disk.folders import files_below
from zofo.saved.checkpoint_folders import find_damage
from zofo.saved.inspect import inspect
from zofo.saved.source import open_source
from zofo.saved.verify import verify

FILES = Path(__file__).parents[1] / "fixtures" / "written_by_50fe18a"
ARTEFACTS = {"lora-float32": "adapter/", "p-tuning": "adapter/", "fo-ft": "model/"}
NEW = ("chat_template.jinja", "adapter_model.bin", "pytorch_model.bin", "inner/config.json")


@pytest.fixture
def saved(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("base", *ARTEFACTS, "lora-float32-interrupted"):
        shutil.copytree(FILES / name, tmp_path / name)
    return tmp_path


def replaced(folder, names, kind):
    """Put a special file in place of each file in turn, and restore the file afterwards."""
    for name in names:
        path = folder / name
        path.parent.mkdir(exist_ok=True)
        if path.exists():
            path.rename(path.with_name("kept"))
        make_special(path, kind)
        if path.with_name("kept").exists():
            kept = folder.parent / "kept"
            path.with_name("kept").rename(kept)
        else:
            kept = None
        yield name
        path.unlink()
        if kept is not None:
            kept.rename(path)


@pytest.mark.parametrize("kind", ["pipe", "device"])
@pytest.mark.parametrize("run", ARTEFACTS)
def test_artefacts(saved, run, kind):
    folder = saved / run / "artifact"
    names = {*files_below(folder), *(ARTEFACTS[run] + name for name in NEW)} - {"README.md"}
    for name in replaced(folder, sorted(names), kind):
        if name != "zofo.json":  # Without a header it is no artefact.
            assert not inspect(folder).is_whole, name
            assert False in [check.is_sound for check in verify(folder)], name
    assert inspect(folder).is_whole


@pytest.mark.parametrize("kind", ["pipe", "device"])
def test_checkpoints_and_runs(saved, kind):
    run = saved / "lora-float32-interrupted"
    checkpoint = run / "checkpoint-4"
    for name in replaced(checkpoint, files_below(checkpoint), kind):
        assert find_damage(checkpoint), name
    assert find_damage(checkpoint) is None
    for name in replaced(run, ["run.yaml", "base.json"], kind):
        refused(lambda: open_source(checkpoint), name if name == "base.json" else "")
