"""Damaged, incomplete and mixed-up files fail their digests, and each gives one clear error."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from typer.testing import CliRunner

from tests.support.damage import CHECKPOINT_FILES, CONFIG, FILES, damage, edit, refused
from tests.support.models import build
from zofo.cli.app import app
from zofo.optim.trajectory import TRAJECTORY_FILE
from zofo.saved.artifact import load
from zofo.saved.checkpoint import load_checkpoint

pytestmark = pytest.mark.usefixtures("own_working_folder")
DAMAGES = [f"cut at {k}/12" for k in range(12)] + [f"flip {k}" for k in range(20)]


def test_what_is_whole_is_loaded(made, artefact, checkpoint):
    assert load(artefact).method == "hybrid"
    assert load(made / "whole").method == "fo-ft"
    load_checkpoint(build("llama", None), checkpoint)
    (artefact / "README.md").write_text("edited by its reader")
    (artefact / ".gitattributes").write_text("as hubs add")
    load(artefact)


@pytest.mark.parametrize("kind", DAMAGES)
@pytest.mark.parametrize("name", FILES)
def test_a_damaged_artefact(artefact, name, kind):
    damage(artefact / name, kind)
    refused(lambda: load(artefact), str(artefact))


@pytest.mark.parametrize("kind", DAMAGES)
@pytest.mark.parametrize("name", CHECKPOINT_FILES)
def test_a_damaged_checkpoint(checkpoint, name, kind):
    damage(checkpoint / name, kind)
    refused(lambda: load_checkpoint(build("llama", None), checkpoint), str(checkpoint))


@pytest.mark.parametrize("kind", ["cut at 5/12", "cut at 11/12", "flip 0", "flip 1", "flip 2"])
@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "tokenizer.json"])
def test_a_damaged_whole_model(made, tmp_path, name, kind):
    folder = shutil.copytree(made / "whole" / "artifact", tmp_path / "whole")
    damage(Path(folder) / "model" / name, kind)
    refused(lambda: load(folder), name)


@pytest.mark.parametrize("name", FILES)
def test_a_missing_file(artefact, name):
    (artefact / name).unlink()
    refused(lambda: load(artefact))


@pytest.mark.parametrize("name", CHECKPOINT_FILES)
def test_a_missing_file_of_a_checkpoint(checkpoint, name):
    (checkpoint / name).unlink()
    refused(lambda: load_checkpoint(build("llama", None), checkpoint))


@pytest.mark.parametrize(
    ("other", "name"),
    [("b", name) for name in FILES if name != CONFIG] + [("c", name) for name in FILES],
)
def test_a_file_of_another_run(made, artefact, other, name):
    """A file of another run is refused.

    The adapter's configuration of run b is not tested: b differs only in its seed, which that file
    does not contain.
    """
    shutil.copy(made / other / "artifact" / name, artefact / name)
    refused(lambda: load(artefact))


@pytest.mark.parametrize("name", ["adapter_model.safetensors", TRAJECTORY_FILE])
def test_a_file_of_another_checkpoint(made, checkpoint, name):
    shutil.copy(made / "checkpoint-of-1" / name, checkpoint / name)
    refused(lambda: load_checkpoint(build("llama", None), checkpoint), "another run")


@pytest.mark.parametrize("name", ["adapter/adapter_model.bin", "model/config.json", "adapter/x/y"])
def test_a_file_that_does_not_belong(artefact, name):
    (artefact / name).parent.mkdir(exist_ok=True)
    (artefact / name).write_bytes(b"\x80\x04.")
    refused(lambda: load(artefact), "does not belong to it")


def test_another_base(made, artefact, checkpoint, tmp_path):
    edit(artefact, lambda header: header["base"].update(name=str(made / "other-base")))
    refused(lambda: load(artefact), "load the base that the run began with")
    refused(
        lambda: load_checkpoint(build("llama", None, seed=9), checkpoint),
        "load the base that the run began with",
    )


@pytest.mark.parametrize("command", [["eval"], ["predict", "a film"]], ids=["eval", "predict"])
@pytest.mark.parametrize("name", FILES)
def test_the_commands_say_the_same_and_exit_with_2(artefact, command, name):
    damage(artefact / name, "flip 3")
    done = CliRunner().invoke(app, [command[0], str(artefact), *command[1:]])
    assert done.exit_code == 2, done.output
    assert done.stderr.startswith("error: ")
    assert "Traceback" not in done.output
    assert len(done.stderr.splitlines()) <= 4
