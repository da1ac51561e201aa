"""YAML is read as version 1.2 has it, keys are names, and what is written reads back."""

import math

import pytest
import yaml

from zofo.config.load import load_config
from zofo.disk.yaml import parse_yaml, read_yaml, yaml_text
from zofo.errors import UserError

TEXTS = ["yes", "on", "No", "y", "1:30", "1:30:00", "2026-01-01", "1_000", "0b11", "1e", "=", "<<"]
VALUES = {
    "010": 10,
    "0o10": 8,
    "0x1F": 31,
    "-0": 0,
    "1e-5": 1e-5,
    "1.0e-05": 1e-5,
    "+.5E3": 500.0,
    "5.": 5.0,
    "-.INF": -math.inf,
    "True": True,
    "FALSE": False,
    "~": None,
    "Null": None,
    "": None,
    "!!float 3": 3.0,
    "!!str 5": "5",
    "'1e-5'": "1e-5",
}


@pytest.mark.parametrize(
    "key", ["no", "yes", "on", "off", "y", "true", "null", "~", "1", "1.0", "0x10", "2026-01-01"]
)
def test_a_key_is_what_was_written(tmp_path, key):
    text = f"{key}: {{{key}: 1, list: [{{{key}: false}}]}}\n"
    assert parse_yaml(text) == {key: {key: 1, "list": [{key: False}]}}
    (tmp_path / "a.yaml").write_text(text)
    assert read_yaml(tmp_path / "a.yaml").keys() == {key}


def test_words_of_version_1_1_are_texts():
    assert parse_yaml(f"[{', '.join(TEXTS)}]") == TEXTS
    assert parse_yaml("<<: {a: 1}\n'no': yes") == {"<<": {"a": 1}, "no": "yes"}


def test_words_of_version_1_2_have_their_values():
    for text, value in VALUES.items():
        found = parse_yaml(text)
        assert (type(found), found) == (type(value), value), text
    assert math.isnan(parse_yaml(".nan"))


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("steps: 1\nseed: 2\nsteps: 3", "'steps' appears twice.*line 3"),
        ("{a: {b: 1, 'b': 1}}", "'b' appears twice"),
        ("1: a\n'1': b", "'1' appears twice"),
        ("a: !!bool maybe", "'maybe' is no bool"),
        ("a: !!bool yes", "'yes' is no bool"),
        ("a: !!int 1:30", "'1:30' is no int"),
        ("a: !!int 0b1", "'0b1' is no int"),
        ("a: !!float x", "'x' is no float"),
        ("a: !!null x", "'x' is no null"),
        ("a: !!timestamp x", "timestamp"),
        ("a: !!timestamp 2026-01-01", "timestamp"),
        ("a: !!set {b}", "set"),
        ("!!map [a]", "expected a mapping"),
        ("!!merge <<: {a: 1}", "merge"),
    ],
)
def test_what_is_no_yaml_of_version_1_2_is_refused(tmp_path, text, words):
    (tmp_path / "a.yaml").write_text(text)
    with pytest.raises(UserError, match=words):
        read_yaml(tmp_path / "a.yaml")


def test_what_is_written_reads_back_in_both_versions():
    texts = [*TEXTS, *(text for text in VALUES if "!" not in text), "a\x85b", "\x1b[1m", "a\nb\n"]
    values = {"texts": texts, "numbers": [1, 1e-5, 1e22, -0.0, True, None], "no": {"1": "x"}}
    assert parse_yaml(yaml_text(values)) == values
    assert yaml.safe_load(yaml_text(values)) == values


def test_labels_and_unknown_keys_are_named_as_written():
    with pytest.raises(UserError, match=r"unknown key (task\.)?(no|on)\b") as said:
        load_config(overrides=["task={name: sst2, no: 1}"])
    assert "False" not in str(said.value)
