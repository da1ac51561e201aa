"""Names that no file can have, and paths that cannot be used, in every command that takes one."""

from __future__ import annotations

import errno
import os

import pytest
from typer.testing import CliRunner

from tests.support.run_folders import write_run
from zofo.cli.app import app

COMMANDS = [
    ["train", "--resume", "NAME"],
    ["train", "task=sst2", "output_dir=NAME"],
    ["train", "NAME"],
    ["report", "NAME"],
    ["report", "RUN", "--to", "NAME"],
    ["info", "NAME"],
    ["verify", "NAME"],
    ["eval", "NAME"],
    ["export", "NAME", "--to", "elsewhere"],
    ["export", "RUN", "--to", "NAME"],
    ["study", "NAME"],
    ["study", "NAME", "--status"],
]


@pytest.mark.parametrize("name", ["x" * 300, "a\udcff"], ids=["long", "bytes"])
def test_a_name_that_no_file_can_have_is_one_error(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    write_run(tmp_path / "RUN")
    before = sorted(tmp_path.rglob("*"))
    for command in COMMANDS:
        done = CliRunner().invoke(app, [word.replace("NAME", name) for word in command])
        assert done.exit_code == 2, (command, done.output, done.exception)
        assert isinstance(done.exception, SystemExit), command  # There is no traceback.
        assert "error" in done.stderr.lower(), command
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize("number", [errno.EACCES, errno.ENOSPC, errno.EROFS])
def test_an_error_of_the_system_is_one_error(tmp_path, monkeypatch, number):
    def fail(*args, **kwargs):
        raise OSError(number, os.strerror(number), "the/file")

    monkeypatch.setattr("pathlib.Path.is_dir", fail)
    done = CliRunner().invoke(app, ["info", str(tmp_path)])
    assert done.exit_code == 2
    assert done.stderr.startswith(f"error: 'the/file': {os.strerror(number)}; choose another")
