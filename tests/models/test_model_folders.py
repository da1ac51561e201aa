"""A model folder is checked before transformers opens its files."""

import json
import os
import shutil
from pathlib import Path

import pytest

from tests.support.damage import make_special, refused
from zofo.models.loading import head_of, load_model, load_tokenizer, resolve
from zofo.models.model_folders import MAX_BYTES

NAMES = ("config.json", "model.safetensors", "tokenizer.json", "generation_config.json")
NEW = ("chat_template.jinja", "pytorch_model.bin", "modeling.py", "vocab.txt")


@pytest.fixture
def folder(tmp_path, decoder_folder):
    return Path(shutil.copytree(decoder_folder, tmp_path / "model"))


@pytest.mark.parametrize("kind", ["pipe", "device", "loop", "dangling"])
@pytest.mark.parametrize("name", [*NAMES, *NEW])
def test_what_is_no_regular_file_is_never_opened(folder, name, kind):
    (folder / name).unlink(missing_ok=True)
    make_special(folder / name, kind)
    for load in (load_model, load_tokenizer, head_of):
        refused(lambda load=load: load(str(folder)), str(folder))


def test_a_text_that_is_too_large(folder):
    for name in ("tokenizer.json", "vocab.txt"):
        before = (folder / name).read_bytes() if (folder / name).exists() else b""
        (folder / name).write_bytes(before)
        os.truncate(folder / name, MAX_BYTES + 1)
        refused(lambda: load_model(str(folder)), name, "larger than")
        (folder / name).write_bytes(before)


@pytest.mark.parametrize("name", ["model.safetensors.index.json", "pytorch_model.bin.index.json"])
@pytest.mark.parametrize("file", ["../other/model.safetensors", "/dev/zero", "a/b.safetensors", 3])
def test_an_index_that_leads_outside(folder, name, file):
    shutil.copytree(folder, folder.parent / "other")
    (folder / name).write_text(json.dumps({"metadata": {}, "weight_map": {"a": file}}))
    refused(lambda: load_model(str(folder)), name, "no file of this folder")


def test_links_to_regular_files_are_fine(folder):
    """The cache of the hub holds links."""
    for path in list(folder.iterdir()):
        path.rename(folder.parent / path.name)
        path.symlink_to(folder.parent / path.name)
    (folder / "model.safetensors.index.json").write_text('{"weight_map": {"a": "x.safetensors"}}')
    assert resolve(str(folder)) == str(folder)
