"""Adapters by configuration file: what a file may hold, and what is refused with its name."""

from __future__ import annotations

import json

import pytest

from tests.support.models import build
from zofo.errors import UserError
from zofo.models.adapters import create_adapter
from zofo.optim.blocks import split_parameters

# peft warns that it uses the defaults of EVA and CorDA.
pytestmark = pytest.mark.filterwarnings("ignore:`init_lora_weights` is '")
LORA = {"peft_type": "LORA", "r": 2, "target_modules": ["q_proj"]}
PROMPT = {"peft_type": "PROMPT_TUNING", "num_virtual_tokens": 3}


def made(path, content):
    path.write_bytes(content if isinstance(content, bytes) else json.dumps(content).encode())
    return create_adapter(build("llama", None), config_file=path)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ('{"peft_type": "LORÄ"}'.encode("latin-1"), "byte 18 is not UTF-8; save it as UTF-8"),
        (json.dumps(LORA).encode("utf-16"), "is not UTF-8"),
        (b'{"peft_type": "LORA", "r": ' + b"9" * 5000 + b"}", "is not valid json .*digits"),
        (b'{"peft_type": "LORA", "r": ' + b"[" * 50_000, "is not valid json .*nested too deeply"),
        (b"\0" * 100, "is not valid json"),
        ({**LORA, "r": 10**30}, "is not valid json .*does not fit in 64 bits"),
        ({**LORA, "r": "two"}, "peft cannot attach LORA"),
        ({**LORA, "lora_alpha": "two"}, "peft cannot attach LORA"),
        ({**LORA, "init_lora_weights": "best"}, "init_lora_weights='best', and only true, false"),
        ({**LORA, "target_modules": 5}, "target_modules of the adapter file"),
        ({**LORA, "target_modules": "("}, "target_modules '.' is no regular expression"),
        ({**LORA, "rank_pattern": {"(": 4}}, "rank_pattern '.' is no regular expression"),
        ({**LORA, "peft_type": "LORAA"}, "peft_type 'LORAA'; did you mean LORA"),
        ({**LORA, "peft_type": ["LORA"]}, "has peft_type"),
        ({**LORA, "task_type": "CAUSAL"}, "no valid peft configuration .*CAUSAL_LM"),
        ({**PROMPT, "prompt_tuning_init": "FOO"}, "prompt_tuning_init 'FOO'.*choose one of TEXT"),
        (
            {**PROMPT, "prompt_tuning_init": "TEXT", "prompt_tuning_init_text": "a film"}
            | {"tokenizer_name_or_path": "/nowhere"},
            "peft cannot attach PROMPT_TUNING .*nowhere",
        ),
        ({"peft_type": "XLORA", "hidden_size": 16, "adapters": {"a": "b"}}, "XLORA, which needs"),
        ({**LORA, "peft_type": "POLY"}, "POLY, which needs the task_ids"),
        (
            {"peft_type": "MULTITASK_PROMPT_TUNING", "num_virtual_tokens": 3, "num_tasks": 1},
            "MULTITASK_PROMPT_TUNING, which needs the task_ids",
        ),
    ],
)
def test_what_a_file_cannot_hold(tmp_path, content, words):
    with pytest.raises(UserError, match=words):
        made(tmp_path / "adapter.json", content)


def test_yaml_is_read_by_the_same_rules(tmp_path):
    with pytest.raises(UserError, match="is not UTF-8"):
        made(tmp_path / "adapter.yaml", "peft_type: LORÄ".encode("latin-1"))
    with pytest.raises(UserError, match="is not valid YAML"):
        made(tmp_path / "adapter.yaml", b"a: [1")
    assert split_parameters(made(tmp_path / "adapter.yaml", LORA)).adapter


@pytest.mark.parametrize("start", ["pissa", "pissa_niter_4", "olora", "corda", "lora_ga"])
def test_initial_values_that_change_the_base_are_refused(tmp_path, start):
    with pytest.raises(UserError, match=f"init_lora_weights='{start}', and only"):
        made(tmp_path / "adapter.json", {**LORA, "init_lora_weights": start})


def test_a_kind_that_changes_the_base_is_found_by_its_weights(tmp_path, monkeypatch):
    monkeypatch.setattr("zofo.models.adapters.check_adapter_config", lambda config: None)
    with pytest.raises(UserError, match=r"peft changes 2 weights of the base .*q_proj"):
        made(tmp_path / "adapter.json", {**LORA, "init_lora_weights": "olora"})


@pytest.mark.parametrize("start", [True, False, "gaussian", "orthogonal", "eva"])
def test_initial_values_that_leave_the_base_alone(tmp_path, start):
    assert made(tmp_path / "adapter.json", {**LORA, "init_lora_weights": start})
