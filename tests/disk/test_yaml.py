"""Keys of YAML files are names, whatever YAML 1.1 makes of the word."""

import pytest

from zofo.config.load import load_config
from zofo.disk.yaml import parse_yaml, read_yaml
from zofo.errors import UserError


@pytest.mark.parametrize(
    "key", ["no", "yes", "on", "off", "y", "true", "null", "~", "1", "1.0", "0x10", "2026-01-01"]
)
def test_a_key_is_what_was_written(tmp_path, key):
    text = f"{key}: {{{key}: 1, list: [{{{key}: no}}]}}\n"
    assert parse_yaml(text) == {key: {key: 1, "list": [{key: False}]}}
    (tmp_path / "a.yaml").write_text(text)
    assert read_yaml(tmp_path / "a.yaml").keys() == {key}


def test_what_is_no_plain_word_stays(tmp_path):
    assert parse_yaml("<<: {a: 1}\nb: yes") == {"a": 1, "b": True}
    assert parse_yaml("'no': 1") == {"no": 1}


def test_labels_and_unknown_keys_are_named_as_written():
    with pytest.raises(UserError, match=r"unknown key (task\.)?(no|on)\b") as said:
        load_config(overrides=["task={name: sst2, no: 1}"])
    assert "False" not in str(said.value)
