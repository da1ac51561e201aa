"""Files and folders: bad targets, permissions, full disks, leftovers, hostile files."""

import errno
import os
import signal
import stat
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

from tests.support.damage import make_special, refused
from tests.support.forks import in_forks
from zofo.disk.files import (
    file_digest,
    open_tensors,
    problem_of_target,
    read_json,
    read_tensors,
    read_text,
    remove_file,
    write_json,
    write_tensors,
    write_text,
)
from zofo.disk.folders import remove_partial, writing_folder
from zofo.disk.yaml import read_yaml
from zofo.errors import UserError


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


def test_names_that_no_file_can_have(tmp_path):
    for name, words in (("x" * 300, "too long"), ("a\0b", "null"), ("a\udcff", "UTF-8")):
        for is_folder in (False, True):
            assert words in problem_of_target(tmp_path / name, is_folder=is_folder)


def test_a_link_to_nothing(tmp_path):
    (tmp_path / "link").symlink_to("nowhere")
    for is_folder in (False, True):
        problem = problem_of_target(tmp_path / "link", is_folder=is_folder)
        assert "link to nowhere" in problem
        assert "remove the link" in problem


def test_a_name_of_the_greatest_length(tmp_path):
    write_text(tmp_path / ("x" * 255), "y")
    with writing_folder(tmp_path / ("z" * 255)):
        pass
    assert sorted(len(p.name) for p in tmp_path.iterdir()) == [255, 255]


@pytest.fixture(params=[0o077, 0o022, 0o002])
def umask(request):
    before = os.umask(request.param)
    yield request.param
    os.umask(before)


def test_what_is_written_has_the_permissions_that_the_umask_allows(tmp_path, umask):
    write_json(tmp_path / "a.json", {})
    write_tensors(tmp_path / "b.safetensors", {"x": torch.zeros(2)}, {})
    write_json(tmp_path / "a.json", {"again": 1})
    for is_checkpoint in (False, True):
        with writing_folder(tmp_path / f"c{is_checkpoint}", is_checkpoint=is_checkpoint) as folder:
            (folder / "inner").mkdir()
            save_file({"x": torch.zeros(2)}, folder / "inner" / "d.safetensors")
    for path in tmp_path.rglob("*"):
        wanted = (0o777 if path.is_dir() else 0o666) & ~umask
        assert stat.S_IMODE(path.stat().st_mode) == wanted, path


def small_disk(*args, **kwargs):
    raise SafetensorError("Error while serializing: I/O error: No space left on device")


@pytest.mark.parametrize(
    ("fault", "function"),
    [
        ("safetensors.torch.save_file", small_disk),
        ("os.fsync", lambda handle: os.write(os.open("/dev/full", os.O_WRONLY), b"x")),
    ],
)
def test_a_full_disk_is_one_error_and_the_old_file_stays(tmp_path, monkeypatch, fault, function):
    path = tmp_path / "a.safetensors"
    write_tensors(path, {"x": torch.zeros(2)}, {})
    before = path.read_bytes()
    monkeypatch.setattr(fault, function)
    with pytest.raises(UserError, match=r"a\.safetensors: No space left on device; nothing was"):
        write_tensors(path, {"x": torch.ones(2)}, {})
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


def cannot(*args, **kwargs):
    raise PermissionError(errno.EPERM, os.strerror(errno.EPERM))


def test_a_file_that_cannot_be_removed(tmp_path, monkeypatch):
    monkeypatch.setattr("pathlib.Path.unlink", cannot)
    write_text(tmp_path / "a", "x")  # whose temporary file is renamed
    assert (tmp_path / "a").read_text() == "x"
    monkeypatch.setattr("os.fsync", cannot)
    with pytest.raises(UserError, match="cannot write"):
        write_text(tmp_path / "a", "y")
    with pytest.raises(UserError, match=r"cannot remove .*a: Operation not permitted; make"):
        remove_file(tmp_path / "a")
    with pytest.warns(UserWarning, match=r"cannot remove .*a: Operation not permitted"):
        remove_file(tmp_path / "a", is_needed=False)
    assert (tmp_path / "a").read_text() == "x"


def write_and_die(place):
    with writing_folder(place, is_checkpoint=False) as folder:
        (folder / "file").write_text("x")
        os.kill(os.getpid(), signal.SIGKILL)


def test_what_a_killed_writer_left_goes_and_what_a_living_one_writes_stays(tmp_path):
    place = tmp_path / "out[1]"
    in_forks((write_and_die, place))
    (tmp_path / ".out[1].12345678.partial" / "inner").mkdir(parents=True)  # rmdir had failed
    (tmp_path / ".out[1].mine").mkdir()
    (tmp_path / ".out1.12345678.partial").mkdir()
    assert len(list(tmp_path.iterdir())) == 4
    with writing_folder(place, is_checkpoint=False) as folder:
        (folder / "file").write_text("first")
        assert (tmp_path / ".out1.12345678.partial").is_dir()
        remove_partial(tmp_path, ".*")
        assert folder.is_dir()
    left = [".out[1].mine", "out[1]"]
    assert sorted(p.name for p in tmp_path.iterdir()) == left
    assert (place / "file").read_text() == "first"
