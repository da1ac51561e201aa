"""An export is checked against the digests that were written with it."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest

from tests.support.damage import refused
from zofo.disk.folders import LIST_FILE
from zofo.models.loading import load_model
from zofo.saved.export import export_model
from zofo.saved.export_card import EXPORT_FILE
from zofo.saved.inspect import inspect
from zofo.saved.verify import verify

FILES = Path(__file__).parents[1] / "fixtures" / "written_by_50fe18a"


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """An export with an adapter apart and several files of weights."""
    root = tmp_path_factory.mktemp("exports")
    before = Path.cwd()
    for name in ("base", "p-tuning", "rows.csv"):
        (root / name).symlink_to(FILES / name)
    os.chdir(root)
    try:
        return export_model("p-tuning", root / "plain", max_shard_size="1KB").path
    finally:
        os.chdir(before)


@pytest.fixture
def folder(exported, tmp_path):
    return Path(shutil.copytree(exported, tmp_path / "plain"))


def assert_refused(folder, *words):
    """`info`, `verify` and loading as a base all refuse the folder, before they load a model."""
    problem = inspect(folder).problem or ""
    checks = {check.name: check for check in verify(folder)}
    assert checks["files"].is_sound is False
    assert checks["model"].is_sound is None
    for text in (problem, checks["files"].detail, refused(lambda: load_model(str(folder)))):
        assert all(word in text for word in words), text


def test_every_file_that_loading_reads_is_compared(folder):
    listed = json.loads((folder / LIST_FILE).read_text())["files"]
    names = {p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file()}
    assert names == {*listed, LIST_FILE}
    assert sum(name.startswith("model-") for name in names) > 1
    assert {"adapter/adapter_model.safetensors", "tokenizer.json", "config.json"} < names
    for name in names - {LIST_FILE, EXPORT_FILE, "README.md"}:
        path = folder / name
        sound = path.read_bytes()
        for place in (len(sound) // 2, len(sound) - 1):  # the weights lie at the end
            path.write_bytes(sound[:place] + bytes([sound[place] ^ 1]) + sound[place + 1 :])
            assert_refused(folder, name)
        path.unlink()
        assert_refused(folder, name)
        path.write_bytes(sound)
    assert inspect(folder).is_whole


@pytest.mark.parametrize(
    "name",
    [
        *("pytorch_model.bin", "model.safetensors", "adapter_config.json", "chat_template.jinja"),
        *(
            "special_tokens_map.json",
            "modeling.py",
            "adapter/adapter_model.bin",
            "adapter/x/a.json",
        ),
    ],
)
def test_a_file_that_a_loader_might_read_does_not_belong(folder, name):
    (folder / name).parent.mkdir(exist_ok=True)
    (folder / name).write_text("{}")
    assert inspect(folder).problem.endswith(
        f"{name} does not belong to it; export or copy it again"
    )
    refused(lambda: load_model(str(folder)))


def test_what_nobody_loads_may_change(folder):
    for name in ("README.md", "LICENSE", ".gitattributes", ".cache/huggingface/x.json", "notes.md"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("edited by its reader")
    assert inspect(folder).is_whole
    assert all(check.is_sound for check in verify(folder))
    load_model(str(folder))


LISTS = ("", "[]", "{}", '{"files": 3}', '{"files": {"a.json": 1}}', "[" * 100_000)


@pytest.mark.parametrize("text", LISTS, ids=lambda text: text[:12])
def test_a_list_that_says_nothing(folder, text):
    (folder / LIST_FILE).write_text(text)
    assert_refused(folder, LIST_FILE)


def test_a_list_that_is_gone_or_names_files_elsewhere(folder):
    (folder / LIST_FILE).rename(folder.parent / "list.json")
    assert f"lacks {LIST_FILE}" in inspect(folder).problem
    listed = json.loads((folder.parent / "list.json").read_text())
    listed["files"]["/etc/hosts.json"] = {"bytes": 1, "blake2b": "0" * 32}
    (folder / LIST_FILE).write_text(json.dumps(listed))
    assert_refused(folder, "/etc/hosts.json is missing")


def test_an_export_of_an_older_version_is_read_and_its_lack_is_said(folder):
    (folder / LIST_FILE).unlink()
    record = json.loads((folder / EXPORT_FILE).read_text())
    (folder / EXPORT_FILE).write_text(json.dumps({**record, "format": 1}))
    found = inspect(folder)
    assert found.is_whole
    assert "without digests" in found.note
    checks = {check.name: check for check in verify(folder)}
    assert all(check.is_sound for check in checks.values())
    assert "without digests" in checks["files"].detail
    load_model(str(folder))
