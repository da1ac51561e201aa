"""Helpers that damage saved files, change them under valid digests, and check the refusal."""

from __future__ import annotations

import json
import os
import random
from pathlib import Path

import pytest

from zofo.disk.files import json_digest, read_json
from zofo.errors import UserError
from zofo.optim.trajectory import TRAJECTORY_FILE
from zofo.saved import manifest

ADAPTER = "adapter/adapter_model.safetensors"
CONFIG = "adapter/adapter_config.json"
FILES = ("zofo.json", TRAJECTORY_FILE, ADAPTER, CONFIG)
CHECKPOINT_FILES = (TRAJECTORY_FILE, "adapter_model.safetensors", "adapter_config.json")
NEVER = Path("zofo-was-here")
"""A file in the working folder that a hostile file would create."""


def refused(action, *words):
    """Assert that the action raises one short message with these words, and return the message."""
    with pytest.raises(UserError) as caught:
        action()
    message = str(caught.value)
    assert 20 < len(message) < 1500
    assert "\n" not in message
    assert not NEVER.exists()
    for word in words:
        assert word in message
    return message


def damage(path, kind):
    """Cut a file short or flip one bit of it.

    The place depends only on the file's name and on `kind`.
    """
    content = bytearray(path.read_bytes())
    how, _, number = kind.partition(" ")
    if how == "cut":
        part = int(number.removeprefix("at ").partition("/")[0])
        # The last byte of a JSON file is a newline, and losing it does no harm.
        content = content[: (len(content) - 2) * part // 11]
    else:
        place = random.Random(f"{path.name} {kind}").randrange(8 * len(content))
        content[place // 8] ^= 1 << place % 8
    path.write_bytes(content)


def make_special(path, kind):
    """Make a pipe, a folder, or a link to a device, to itself or to nothing, at the path."""
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "folder":
        path.mkdir()
    elif kind != "nothing":
        path.symlink_to({"device": "/dev/zero", "loop": path, "dangling": "nowhere"}[kind])


def edit(artefact, change):
    """Change zofo.json and compute its digest again."""
    header = read_json(artefact / "zofo.json")
    header.pop("digest")
    change(header)
    header["digest"] = json_digest(header)
    (artefact / "zofo.json").write_text(json.dumps(header))


def seal(artefact):
    """Compute the digests of the files in the folder again."""
    header = read_json(artefact / "zofo.json")
    for key in ("format", "zofo_version", "files", "digest"):
        header.pop(key)
    manifest.write_header(artefact, header)


def put(*path, value):
    def change(header):
        target = header
        for key in path[:-1]:
            target = target[key]
        target[path[-1]] = value

    return change
