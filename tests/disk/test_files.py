"""A target that cannot be written is reported before any work starts; hostile files are refused."""

import os
from pathlib import Path

import pytest

from tests.support.damage import refused
from zofo.disk.files import (
    file_digest,
    open_tensors,
    problem_of_target,
    read_json,
    read_tensors,
    read_text,
)
from zofo.disk.yaml import read_yaml


@pytest.mark.parametrize("is_folder", [False, True])
def test_a_new_target_is_fine_and_nothing_is_left(tmp_path, is_folder):
    assert problem_of_target(tmp_path / "a" / "b", is_folder=is_folder) is None
    assert list(tmp_path.iterdir()) == []


def test_what_is_in_the_way_is_named(tmp_path):
    (tmp_path / "file").write_text("x")
    assert problem_of_target(tmp_path / "file") is None
    assert problem_of_target(tmp_path, is_folder=True) is None
    assert "is a folder" in problem_of_target(tmp_path)
    assert "name a folder" in problem_of_target(tmp_path / "file", is_folder=True)
    for is_folder in (False, True):
        found = problem_of_target(tmp_path / "file" / "x" / "y", is_folder=is_folder)
        assert f"{tmp_path / 'file'} is a file" in found
    assert (tmp_path / "file").read_text() == "x"


def test_a_name_that_no_file_can_have(tmp_path):
    assert "choose another" in problem_of_target(tmp_path / ("x" * 5000) / "y")


TEXTS = {
    "deep": b"[" * 100_000,
    "deep, in objects": b'{"a":' * 100_000,
    "deep, but closed": b"[" * 900 + b"]" * 900,
    "zeros": b"\0" * 100_000,
    "a huge number": b'{"a": ' + b"9" * 400 + b"}",
    "half a surrogate pair": b'{"a": "\\ud800"}',
    "half a surrogate pair as key": b'{"\\udfff": 1}',
    "not UTF-8": b'{"a": "\xff"}',
    "UTF-16": '{"a": 1}'.encode("utf-16"),
    "too large": b'"' + b"a" * (1 << 24) + b'"',
}
"""Contents that neither JSON nor YAML may bring further than the reader."""


@pytest.mark.parametrize("content", TEXTS.values(), ids=TEXTS)
@pytest.mark.parametrize("read", [read_json, read_yaml])
def test_hostile_texts(tmp_path, read, content):
    if read is read_yaml:
        content = content.replace(b"[" * 100_000, b"- " * 100_000)
    (tmp_path / "file").write_bytes(content)
    message = refused(lambda: read(tmp_path / "file"))
    assert str(tmp_path / "file") in message.replace("\n", " ")


@pytest.mark.parametrize("text", ["NaN", "[Infinity]", '{"a": -Infinity}'])
def test_nan_in_json_is_read_only_where_transformers_writes_it(tmp_path, text):
    (tmp_path / "file").write_text(text)
    assert "is no JSON" in refused(lambda: read_json(tmp_path / "file"))
    assert read_json(tmp_path / "file", has_nan=True) is not None


def make_special(path, kind):
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "folder":
        path.mkdir()
    elif kind != "nothing":
        path.symlink_to({"device": "/dev/zero", "loop": path, "dangling": "nowhere"}[kind])


@pytest.mark.parametrize("kind", ["pipe", "folder", "device", "loop", "dangling", "nothing"])
@pytest.mark.parametrize(
    "read", [read_json, read_yaml, read_text, file_digest, read_tensors, open_tensors]
)
def test_only_regular_files_are_opened(tmp_path, read, kind):
    make_special(tmp_path / "file", kind)
    words = {"device": "is a device", "pipe": "is a pipe", "folder": "is a folder"}
    message = refused(lambda: read(tmp_path / "file"))
    assert words.get(kind, str(tmp_path / "file")) in message


def test_a_name_that_no_file_has():
    refused(lambda: read_json(Path("a\0b")))
    refused(lambda: read_json(Path("a" * 5000)))
