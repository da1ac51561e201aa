"""Hostile files with valid digests are refused for their content, and none of them runs code."""

from __future__ import annotations

import json
import shutil
import struct
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from tests.support.damage import ADAPTER, CONFIG, edit, put, refused, seal
from tests.support.models import assert_same_bits
from zofo.cli.app import app
from zofo.disk.files import read_json, read_tensors, write_tensors
from zofo.optim.trajectory import TRAJECTORY_FILE, Trajectory, _digest
from zofo.saved.artifact import load

pytestmark = pytest.mark.usefixtures("own_working_folder")


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
    "a rank of millions": {"r": 4_000_000},
    "a rank of millions in a pattern": {"rank_pattern": {"q_proj": 4_000_000}},
    "a pattern of many entries": {"rank_pattern": {f"q{i}": 2 for i in range(5000)}},
    "a pattern that matches for years": {"target_modules": "(([a-z._0-9]+)+)+X"},
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


# Tests of hostile safetensors files.


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
    """A hostile trajectory is refused, even if its own digest is valid."""
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


# Tests of code in a base.


def test_code_of_the_base_is_run_only_when_the_reader_says_so(made, tmp_path):
    """A base whose config.json names a class in a file beside it is refused.

    The artefact's own `trust_remote_code` makes no difference.
    """
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


def test_a_refused_artefact_leaves_the_whole_one_as_it_was(made, artefact):
    before = {n: p.detach().clone() for n, p in load(artefact).model.named_parameters()}
    edit(artefact, HEADERS["another fingerprint"])
    refused(lambda: load(artefact))
    after = dict(load(made / "a").model.named_parameters())
    assert_same_bits(before, after)
