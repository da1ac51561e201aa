"""Tests of uploading to the hub and downloading from it. A folder stands in for the hub."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import huggingface_hub
import pytest

import zofo
from tests.support.damage import edit, seal
from tests.support.models import build
from zofo.errors import UserError
from zofo.optim.trajectory import TRAJECTORY_FILE
from zofo.saved.artifact import BaseSpec, load, save_artifact
from zofo.saved.hub import looks_like_hub_id
from zofo.saved.manifest import check_files, read_header
from zofo.tasks.digests import RowDigests
from zofo.tasks.spec import TaskSpec

ROWS = RowDigests({"train": ((1, 2), (3, 4)), "dev": ((5, -6),), "test": ()})


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """Replace the hub by folders, one per repository. Return the list of calls."""
    root, calls = tmp_path / "hub", []

    class Api:
        def __init__(self, token=None):
            calls.append(("token", token))

        def create_repo(self, repo_id, *, private, exist_ok):
            calls.append(("create", repo_id, private, exist_ok))
            (root / repo_id).mkdir(parents=True, exist_ok=True)

        def create_commit(self, repo_id, operations, *, commit_message):
            for operation in operations:
                target = root / repo_id / operation.path_in_repo
                target.parent.mkdir(parents=True, exist_ok=True)
                with operation.as_file() as file:
                    target.write_bytes(file.read())
            return SimpleNamespace(commit_url=f"hub/{repo_id}/commit/1")

    def snapshot_download(repo_id, *, revision, token, allow_patterns):
        calls.append(("download", repo_id, revision))
        if not (root / repo_id).exists():
            raise huggingface_hub.errors.LocalEntryNotFoundError("cannot reach the hub")
        return str(root / repo_id)

    monkeypatch.setattr(huggingface_hub, "HfApi", Api)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    return calls


@pytest.fixture
def artefact(tmp_path, decoder_folder):
    """Return the artefact of an untrained adapter on the tiny decoder."""
    from zofo.models.adapters import create_adapter

    base = BaseSpec(decoder_folder)
    model, tokenizer = base.load()
    model = create_adapter(model, "lora", tokenizer=tokenizer)
    folder = tmp_path / "artefact"
    return save_artifact(folder, model, base=base, method="fo-peft", rows=ROWS)


def test_there_and_back(hub, artefact, decoder_folder, monkeypatch):
    monkeypatch.chdir(Path(decoder_folder).parent)  # The artefact finds its base by its name.
    (artefact / "notes.txt").write_text("mine")
    address = zofo.push_to_hub(artefact, "me/model", private=True, token="hf_x")
    assert address == "hub/me/model/commit/1"
    assert hub == [("token", "hf_x"), ("create", "me/model", True, True)]
    loaded = load("me/model", revision="v1")
    assert loaded.method == "fo-peft"
    assert loaded.rows == ROWS
    assert hub[-1] == ("download", "me/model", "v1")
    assert not (artefact.parent / "hub/me/model/notes.txt").exists()


@pytest.mark.parametrize("base", ["/home/me/bases/mine", "../mine", "~/x/mine", "C:\\\\me\\mine"])
def test_local_paths_are_not_uploaded(hub, artefact, base):
    def change(header):
        header["base"]["name"] = base
        header["task"] = TaskSpec(
            name="classification",
            train="/home/me/secret/rows.csv",
            dev="validation",
            test="a/b.csv",
            data_dir="secret/rows",
        ).model_dump()

    path = artefact / "adapter" / "adapter_config.json"
    values = {"base_model_name_or_path": base, "tokenizer_name_or_path": base, "revision": None}
    path.write_text(json.dumps(json.loads(path.read_text()) | values))
    edit(artefact, change)
    seal(artefact)
    zofo.push_to_hub(artefact, "me/model")
    pushed = artefact.parent / "hub/me/model"
    header = read_header(pushed)
    check_files(pushed, header)
    assert header["base"]["name"] == "mine"
    keys = ("train", "dev", "test", "data_dir")
    assert [header["task"][key] for key in keys] == ["rows.csv", "validation", "b.csv", "rows"]
    adapter = json.loads((pushed / "adapter" / "adapter_config.json").read_text())
    assert [adapter[key] for key in values] == ["mine", "mine", None]
    for file in pushed.rglob("*"):
        assert file.is_dir() or b"secret" not in file.read_bytes()
    assert read_header(artefact)["base"]["name"] == base


def test_names_of_the_hub_are_uploaded_as_they_are(hub, artefact):
    def change(header):
        header["base"]["name"] = "me/base"
        header["task"] = TaskSpec(name="classification", train="me/rows", dev="dev").model_dump()

    edit(artefact, change)
    zofo.push_to_hub(artefact, "me/model")
    pushed = read_header(artefact.parent / "hub/me/model")
    assert {**pushed, "files": 0, "digest": 0} == {**read_header(artefact), "files": 0, "digest": 0}


def test_a_damaged_artefact_is_not_pushed(hub, artefact):
    (artefact / "adapter" / "adapter_config.json").write_text("{}")
    with pytest.raises(UserError, match="damaged"):
        zofo.push_to_hub(artefact, "me/model")
    assert hub == []


def test_without_the_hub(hub):
    with pytest.raises(UserError, match=r"me/none is not a local folder .*cannot reach the hub"):
        load("me/none")
    with pytest.raises(UserError, match="does not exist"):
        load("./me/none")
    assert [call[0] for call in hub] == ["download"]


def test_the_hub_says_no(hub, artefact, monkeypatch):
    def refuse(self, repo_id, **kwargs):
        raise OSError("401 Client Error: Invalid token\nmore of it")

    monkeypatch.setattr(huggingface_hub.HfApi, "create_repo", refuse)
    with pytest.raises(UserError, match=r"me/model cannot be written \(401 .*token\)") as caught:
        zofo.push_to_hub(artefact, "me/model")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["runs/x/artifact", "./a/b", "~/a", "a", "/a/b", "../b", "a/.."])
def test_paths_are_not_asked_for(name):
    assert not looks_like_hub_id(name)


def test_offline_for_real(monkeypatch, tmp_path):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(UserError, match="cannot be downloaded from the hub"):
        load("zofo/there-is-none")


def test_a_method_that_moves_the_base_needs_its_history(tmp_path):
    for method, message in (("hybrid", "trajectory"), ("zo-ft", "trajectory")):
        with pytest.raises(UserError, match=message):
            save_artifact(tmp_path, build("llama"), base=BaseSpec("x"), method=method)
    assert not (tmp_path / TRAJECTORY_FILE).exists()
