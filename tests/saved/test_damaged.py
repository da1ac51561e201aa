"""Damaged, mixed-up and hostile files: each is one clear error, and none of them runs code.

Damage is what happens to a file by accident; the digests must tell. Hostile files carry digests
that fit, so what they say must be refused for itself, or must not matter.
"""

from __future__ import annotations

import json
import random
import shutil
import struct
from pathlib import Path

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from tests.support.models import assert_same_bits, build
from tests.support.trainers import trainer_for
from zofo.cli.app import app
from zofo.config.load import load_config
from zofo.disk.files import json_digest, read_json, read_tensors, write_tensors
from zofo.errors import UserError
from zofo.optim.trajectory import TRAJECTORY_FILE, Trajectory, _digest
from zofo.run.train import train
from zofo.saved import manifest
from zofo.saved.artifact import load
from zofo.saved.checkpoint import load_checkpoint

ADAPTER = "adapter/adapter_model.safetensors"
CONFIG = "adapter/adapter_config.json"
FILES = ("zofo.json", TRAJECTORY_FILE, ADAPTER, CONFIG)
CHECKPOINT_FILES = (TRAJECTORY_FILE, "adapter_model.safetensors", "adapter_config.json")
DAMAGES = [f"cut at {k}/12" for k in range(12)] + [f"flip {k}" for k in range(20)]
NEVER = Path("zofo-was-here")
"""What hostile files would make, in the working folder."""


@pytest.fixture(autouse=True)
def _own_working_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Bases, runs "a" and "b" of one configuration but for the seed, one of another base, and a
    whole model."""
    from tests.support.hub_folders import save_decoder

    root = tmp_path_factory.mktemp("made")
    save_decoder(root / "base")
    shutil.copytree(root / "base", root / "other-base")
    weights = load_file(root / "other-base" / "model.safetensors")
    weights["model.norm.weight"][0] += 1
    save_file(weights, root / "other-base" / "model.safetensors", {"format": "pt"})
    rows = [f"film {i} is {('great', 'dull')[i % 2]},{('good', 'bad')[i % 2]}" for i in range(40)]
    (root / "reviews.csv").write_text("\n".join(["text,label", *rows]) + "\n")
    runs = {"a": ("base", 0, "hybrid"), "b": ("base", 1, "hybrid")}
    runs |= {"c": ("other-base", 0, "hybrid"), "whole": ("base", 0, "fo-ft")}
    for name, (base, seed, method) in runs.items():
        options = {
            "model": root / base,
            "method": method,
            "task": "classification",
            "task.train": root / "reviews.csv",
            "task.num_dev": 8,
            "task.num_test": 8,
            "steps": 3,
            "batch_size": 4,
            "seed": seed,
            "output_dir": root / name,
        }
        config = load_config(overrides=[f"{key}={value}" for key, value in options.items()])
        train(config, console=Console(quiet=True))
    for seed in (0, 1):
        trainer = trainer_for(root / f"trainer-{seed}", build("llama", "lora"), seed=seed)
        trainer.train()
        trainer.save_model(str(root / f"checkpoint-of-{seed}"))
    return root


@pytest.fixture
def artefact(made, tmp_path):
    return Path(shutil.copytree(made / "a" / "artifact", tmp_path / "artefact"))


@pytest.fixture
def checkpoint(made, tmp_path):
    return Path(shutil.copytree(made / "checkpoint-of-0", tmp_path / "checkpoint"))


def refused(action, *words):
    """The error is one short message that says what to do."""
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
    """Cut a file short, or flip one bit of it, at places drawn anew for each file."""
    content = bytearray(path.read_bytes())
    how, _, number = kind.partition(" ")
    if how == "cut":
        part = int(number.removeprefix("at ").partition("/")[0])
        # The last byte of a JSON file is a newline, which is no loss.
        content = content[: (len(content) - 2) * part // 11]
    else:
        place = random.Random(f"{path.name} {kind}").randrange(8 * len(content))
        content[place // 8] ^= 1 << place % 8
    path.write_bytes(content)


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
    """Run b differs in its seed, which the adapter's configuration does not hold."""
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


# Hostile values under digests that fit.


def edit(artefact, change):
    """Change zofo.json and seal it again."""
    header = read_json(artefact / "zofo.json")
    header.pop("digest")
    change(header)
    header["digest"] = json_digest(header)
    (artefact / "zofo.json").write_text(json.dumps(header))


def seal(artefact):
    """Make the digests fit what lies in the folder."""
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


HEADERS = {
    **{
        f"without {key}": (lambda header, key=key: header.pop(key))
        for key in (
            "format",
            "zofo_version",
            "method",
            "base",
            "base_fingerprint",
            "task",
            "labels",
            "files",
        )
    },
    "without the base's name": lambda header: header["base"].pop("name"),
    "an unknown key": put("exec", value="touch"),
    "an unknown key of the base": put("base", "code", value="x"),
    "another format": put("format", value=99),
    "format as text": put("format", value="1"),
    "format as true": put("format", value=True),
    "another method": put("method", value="hybird"),
    "a method that is a list": put("method", value=["hybrid"]),
    "a method without these files": put("method", value="fo-ft"),
    "a base that is text": put("base", value="smollm2-135m"),
    "a name that is a number": put("base", "name", value=7),
    "no name": put("base", "name", value=""),
    "a name of zeros": put("base", "name", value="a\0b"),
    "a long name": put("base", "name", value="x" * 100_000),
    "a name outside": put("base", "name", value="../../../../etc"),
    "a name of a home": put("base", "name", value="~nobody-of-this-name/x"),
    "a name that is an address": put("base", "name", value="file:///etc/passwd"),
    "an unknown dtype": put("base", "dtype", value="float31"),
    "an unknown head": put("base", "head", value="hydra"),
    "endless labels": put("base", "num_labels", value=10**15),
    "no labels": put("base", "num_labels", value=0),
    "a huge seed": put("base", "seed", value=1 << 4000),
    "a seed of text": put("base", "seed", value="1"),
    "another fingerprint": put("base_fingerprint", value="0" * 32),
    "no fingerprint": put("base_fingerprint", value=None),
    "a fingerprint that is a list": put("base_fingerprint", value=[]),
    "a task that is text": put("task", value="boolq"),
    "a task with an unknown key": put("task", "command", value="rm"),
    "labels that are numbers": put("labels", value=[1, 2]),
    "files that are a list": put("files", value=[TRAJECTORY_FILE]),
    "digests that are numbers": put("files", TRAJECTORY_FILE, value=1),
    "a file outside": put("files", "../base/model.safetensors", value="0" * 32),
    "a file by its full name": put("files", "/etc/passwd", value="0" * 32),
    "a kernel from a repository": put("base", "attn_implementation", value="someone/kernel"),
    "remote code": put("base", "trust_remote_code", value=True),
}


@pytest.mark.parametrize("change", HEADERS.values(), ids=HEADERS)
def test_a_hostile_header(artefact, change):
    edit(artefact, change)
    refused(lambda: load(artefact))


BROKEN_JSON = {
    "empty": b"",
    "a list": b"[]",
    "null": b"null",
    "deep nesting": b"[" * 200_000,
    "deep nesting that closes": b'{"a":' * 50_000 + b"1" + b"}" * 50_000,
    "a huge number": b'{"format": ' + b"9" * 20_000 + b"}",
    "NaN": b'{"format": NaN}',
    "infinity": b'{"format": 1e999, "method": "hybrid"}',
    "not UTF-8": b'{"format": "\xff\xfe"}',
    "a lone surrogate": b'{"format": "\\ud800", "method": "\\ud800"}',
    "a pickle": b"\x80\x04\x95\x1d\x00\x00\x00\x8c\x05posix\x8c\x06system\x93.",
    "larger than any": b" " * (1 << 24) + b"{}",
}


@pytest.mark.parametrize("content", BROKEN_JSON.values(), ids=BROKEN_JSON)
@pytest.mark.parametrize("name", ["zofo.json", CONFIG])
def test_hostile_json(artefact, name, content):
    (artefact / name).write_bytes(content)
    if name != "zofo.json":
        seal(artefact)
    refused(lambda: load(artefact))


def test_a_folder_in_the_place_of_a_file(artefact):
    (artefact / TRAJECTORY_FILE).unlink()
    (artefact / TRAJECTORY_FILE).mkdir()
    refused(lambda: load(artefact))
    refused(lambda: Trajectory.load(artefact / TRAJECTORY_FILE))


ADAPTER_CONFIGS = {
    "no type": {"peft_type": None},
    "an unknown type": {"peft_type": "EVIL"},
    "a type of other tensors": {"peft_type": "PROMPT_TUNING", "num_virtual_tokens": 3},
    "a rank of zero": {"r": 0},
    "a negative rank": {"r": -1},
    "another rank": {"r": 3},
    "a rank of text": {"r": "8"},
    "a giant rank": {"r": 1 << 50},
    "modules that are not there": {"target_modules": ["nowhere"]},
    "a broken pattern": {"target_modules": "(("},
    "more modules than weights": {"target_modules": "all-linear"},
    "a module of its own": {"megatron_config": {"a": 1}, "megatron_core": "antigravity"},
}


@pytest.mark.parametrize("values", ADAPTER_CONFIGS.values(), ids=ADAPTER_CONFIGS)
def test_a_hostile_adapter_configuration(artefact, values):
    config = read_json(artefact / CONFIG)
    (artefact / CONFIG).write_text(json.dumps({**config, **values}))
    seal(artefact)
    refused(lambda: load(artefact), "adapter")


def test_an_adapter_that_lacks_a_tensor(artefact, checkpoint):
    tensors = load_file(artefact / ADAPTER)
    save_file(dict(list(tensors.items())[1:]), artefact / ADAPTER, {"format": "pt"})
    seal(artefact)
    refused(lambda: load(artefact), "missing adapter keys")


def test_a_trajectory_of_another_base(made, artefact):
    shutil.copy(made / "c" / "artifact" / TRAJECTORY_FILE, artefact)
    seal(artefact)
    refused(lambda: load(artefact), "another base")


# Hostile safetensors.


def with_header(header, data=b"", *, length=None):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


def tensor(dtype="F64", shape=(1, 1), offsets=(0, 8)):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets)}


EIGHT = b"\0" * 8
SAFETENSORS = {
    "empty": b"",
    "only a length": struct.pack("<Q", 0),
    "a huge header": with_header({}, length=(1 << 64) - 1),
    "a header beyond the file": with_header({}, length=1 << 20),
    "a header of 99 MB": with_header({}, length=99_000_000),
    "a negative offset": with_header({"step": tensor(offsets=(-8, 0))}, EIGHT),
    "offsets that end before they begin": with_header({"step": tensor(offsets=(8, 0))}, EIGHT),
    "an offset beyond the file": with_header({"step": tensor(offsets=(0, 1 << 40))}, EIGHT),
    "overlapping tensors": with_header({"step": tensor(), "lr": tensor()}, EIGHT),
    "a gap": with_header({"step": tensor(), "lr": tensor(offsets=(16, 24))}, EIGHT * 3),
    "bytes left over": with_header({"step": tensor()}, EIGHT * 9),
    "an unknown dtype": with_header({"step": tensor(dtype="EVIL")}, EIGHT),
    "a dtype of another size": with_header({"step": tensor(dtype="F16")}, EIGHT),
    "a giant shape": with_header({"step": tensor(shape=(1 << 40, 1 << 40))}, EIGHT),
    "a shape that overflows": with_header({"step": tensor(shape=(1 << 63, 1 << 63, 4))}, EIGHT),
    "a negative shape": with_header({"step": tensor(shape=(-1, -1))}, EIGHT),
    "an endless empty shape": with_header({"step": tensor(shape=(1 << 62, 0), offsets=(0, 0))}),
    "a shape of text": with_header({"step": {**tensor(), "shape": "11"}}, EIGHT),
    "not UTF-8": with_header(b'{"\xff\xfe": 1}'),
    "not JSON": with_header(b"import os"),
    "deep JSON": with_header(b"[" * 100_000),
    "deep JSON that closes": with_header(b'{"a":' * 9_000 + b"1" + b"}" * 9_000),
    "a list": with_header([]),
    "metadata of numbers": with_header({"__metadata__": {"zofo": 1}}),
    "metadata of deep JSON": with_header({"__metadata__": {"zofo": "[" * 100_000}}),
    "metadata that are no header": with_header({"__metadata__": {"zofo": "[1]"}}),
    "metadata of NaN": with_header({"__metadata__": {"zofo": '{"format": NaN}'}}),
    "metadata with a huge number": with_header(
        {"__metadata__": {"zofo": '{"format": ' + "9" * 9999 + "}"}}
    ),
    "no metadata": with_header({"step": tensor()}, EIGHT),
    "a pickle": b"\x80\x04\x95\x1d\x00\x00\x00\x00\x00\x00\x00\x8c\x05posix\x8c\x06system\x93.",
    "a zip": b"PK\x03\x04" + b"\0" * 100,
}


@pytest.mark.parametrize("content", SAFETENSORS.values(), ids=SAFETENSORS)
@pytest.mark.parametrize("name", [TRAJECTORY_FILE, ADAPTER])
def test_hostile_safetensors(artefact, name, content):
    (artefact / name).write_bytes(content)
    seal(artefact)
    refused(lambda: load(artefact))
    if name == TRAJECTORY_FILE:
        refused(lambda: Trajectory.load(artefact / name), str(artefact / name))


def rows(num=3, columns=1, dtype=torch.float64, value=1e-3):
    return torch.full((num, columns), value, dtype=dtype)


NAN, INFINITY = float("nan"), float("inf")
TRAJECTORIES = {
    "another format": {"format": 2},
    "another noise": {"noise_version": 99},
    "no noise version": {"noise_version": None},
    "a format of deep text": {"format": "x" * 100_000},
    "a negative seed": {"seed": -1},
    "a huge seed": {"seed": 1 << 64},
    "a seed of text": {"seed": "0"},
    "an unknown distribution": {"distribution": "cauchy"},
    "a distribution that is a list": {"distribution": []},
    "an eps of NaN": {"eps": NAN},
    "an eps of zero": {"eps": 0},
    "an estimator that is a number": {"estimator": 3},
    "no groups": {"groups": []},
    "groups that are text": {"groups": "abc"},
    "a group without names": {"groups": [{"tensors": [0]}]},
    "more names than tensors": {"groups": [{"names": ["a", "b"], "tensors": [0]}]},
    "a name twice": {"groups": [{"names": ["a", "a"], "tensors": [0, 1]}]},
    "names that are numbers": {"groups": [{"names": [1], "tensors": [0]}]},
    "a negative tensor": {"groups": [{"names": ["a"], "tensors": [-1]}]},
    "a tensor beyond all": {"groups": [{"names": ["a"], "tensors": [1 << 21]}]},
    "a name that the base lacks": {"groups": [{"names": ["a"], "tensors": [0]}]},
    "steps as numbers with points": {"step": rows(3).flatten()},
    "steps in a table": {"step": rows(3, dtype=torch.int64)},
    "negative steps": {"step": torch.tensor([-1, 0, 1])},
    "steps beyond all": {"step": torch.tensor([0, 1, 1 << 33])},
    "a scalar for a step": {"step": torch.tensor(3)},
    "rates of NaN": {"lr": rows(value=NAN)},
    "rates without end": {"lr": rows(value=INFINITY)},
    "rates for more groups": {"lr": rows(3, 2)},
    "rates for fewer steps": {"lr": rows(2)},
    "rates in half precision": {"lr": rows(dtype=torch.float16)},
    "rates that are complex": {"lr": rows(dtype=torch.complex64)},
    "decay without end": {"weight_decay": rows(value=-INFINITY)},
    "decay that is true": {"weight_decay": rows(dtype=torch.bool, value=True)},
    "scalars of NaN": {"projected_grad": rows(value=NAN)},
    "scalars in one row": {"projected_grad": rows(3).flatten()},
    "fewer scalars than steps": {"projected_grad": rows(2)},
    "no directions": {"projected_grad": rows(3, 0)},
    "endless steps without directions": {"projected_grad": torch.empty(1 << 40, 0).double()},
    "no scalars": {"projected_grad": None},
}


@pytest.mark.parametrize("changes", TRAJECTORIES.values(), ids=TRAJECTORIES)
def test_a_hostile_trajectory(artefact, changes):
    """Its own digest fits, too."""
    path = artefact / TRAJECTORY_FILE
    tensors, metadata = read_tensors(path)
    header = json.loads(metadata["zofo"])
    header.pop("digest")
    for key, value in changes.items():
        if key not in tensors:
            header[key] = value
        elif value is None:
            del tensors[key]
        else:
            tensors[key] = value
    header["digest"] = _digest(header, tensors)
    write_tensors(path, tensors, {"zofo": json.dumps(header)})
    seal(artefact)
    refused(lambda: load(artefact))


# Code.


def test_code_of_the_base_is_run_only_when_the_reader_says_so(made, tmp_path):
    """A base whose config.json maps its class to a file beside it."""
    base = Path(shutil.copytree(made / "base", tmp_path / "base"))
    marker = tmp_path / "ran"
    (base / "evil.py").write_text(
        f"open({str(marker)!r}, 'w').close()\n"
        "from transformers import LlamaConfig as EvilConfig, LlamaForCausalLM as EvilModel\n"
    )
    config = read_json(base / "config.json")
    config |= {"model_type": "evil", "auto_map": {"AutoConfig": "evil.EvilConfig"}}
    (base / "config.json").write_text(json.dumps(config))
    for method, asks in (("a", True), ("a", False), ("whole", True), ("whole", False)):
        name = f"{method}-{asks}"
        artefact = Path(shutil.copytree(made / method / "artifact", tmp_path / name))
        if method == "whole":
            for file in ("evil.py", "config.json"):
                shutil.copy(base / file, artefact / "model" / file)
            seal(artefact)
        edit(
            artefact,
            lambda header, asks=asks: header["base"].update(name=str(base), trust_remote_code=asks),
        )
        refused(lambda artefact=artefact: load(artefact), "trust_remote_code")
        done = CliRunner().invoke(app, ["predict", str(artefact), "film"])
        assert done.exit_code == 2, done.output
        assert done.stderr.startswith("error: ")
    assert not marker.exists()


# Configurations.


TOUCH = f"touch {NEVER}"
YAML = {
    "an object": f"!!python/object/apply:os.system ['{TOUCH}']",
    "an object in a value": f"steps: !!python/object/apply:os.system ['{TOUCH}']",
    "a name": "method: !!python/name:os.system ''",
    "a module": "method: !!python/module:antigravity ''",
    "an instance": f"!!python/object/new:subprocess.Popen [['touch', '{NEVER}']]",
    "a tuple": "task: !!python/tuple [1, 2]",
    "an unknown tag": "steps: !evil 3",
    "aliases that multiply": "a: &a [x, x, x, x, x, x, x, x, x]\n"
    + "".join(
        f"{n}: &{n} [{', '.join(['*' + m] * 9)}]\n"
        for m, n in zip("abcdefgh", "bcdefghi", strict=True)
    ),
    "an alias of itself": "task: &t {train: *t}",
    "an alias": "seed: &s 1\nsteps: *s",
    "deep nesting": "task: " + "[" * 5_000,
    "deep nesting that closes": "task: " + "[" * 3_000 + "]" * 3_000,
    "deep nesting in blocks": "".join(" " * n + "a:\n" for n in range(2_000)),
    "a huge number": "steps: " + "9" * 9_999,
    "a large number": "steps: " + "9" * 400,
    "a number in base 60": "steps: " + "59:" * 400 + "59",
    "a date that is none": "steps: 2026-99-99",
    "a date": "steps: 2026-01-01",
    "binary": "steps: !!binary '*'",
    "NaN": "eps: .nan",
    "infinity": "adapter_lr: .inf",
    "a list": "- 1",
    "text": "steps",
    "two documents": "steps: 1\n---\nsteps: 2",
    "a key that is a list": "? [a]\n: 1",
    "a merge of nothing": "<<: 1",
    "control characters": "steps: \x00",
    "a list for a section": "task: [1]",
    "long text for a number": "steps: " + "x" * 100_000,
    "a deep value for a number": "steps: " + "{a: " * 80 + "1" + "}" * 80,
    "a broken map of rates": "base_lr: {a: [1]}",
}


@pytest.mark.parametrize("text", YAML.values(), ids=YAML)
def test_hostile_yaml(tmp_path, text):
    path = tmp_path / "run.yaml"
    path.write_text(text)
    with pytest.raises(UserError) as caught:
        load_config(path)
    assert str(path) in str(caught.value)
    assert len(str(caught.value)) < 5000
    assert not NEVER.exists()


def test_configurations_that_are_no_text(tmp_path):
    (tmp_path / "run.yaml").write_bytes(b"steps: \xff\xfe\n")
    refused(lambda: load_config(tmp_path / "run.yaml"), "cannot be read")
    refused(lambda: load_config(tmp_path), "is a folder")


# The command line.


@pytest.mark.parametrize("command", [["eval"], ["predict", "a film"]], ids=["eval", "predict"])
@pytest.mark.parametrize("name", FILES)
def test_the_commands_say_the_same_and_exit_with_2(artefact, command, name):
    damage(artefact / name, "flip 3")
    done = CliRunner().invoke(app, [command[0], str(artefact), *command[1:]])
    assert done.exit_code == 2, done.output
    assert done.stderr.startswith("error: ")
    assert "Traceback" not in done.output
    assert len(done.stderr.splitlines()) <= 4


def test_a_refused_artefact_leaves_the_whole_one_as_it_was(made, artefact):
    before = {n: p.detach().clone() for n, p in load(artefact).model.named_parameters()}
    edit(artefact, HEADERS["another fingerprint"])
    refused(lambda: load(artefact))
    after = dict(load(made / "a").model.named_parameters())
    assert_same_bits(before, after)
