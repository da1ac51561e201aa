"""What a few bytes of a configuration ask for is bounded before anything is built."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest
import torch

from tests.support.damage import refused
from tests.support.models import build
from zofo.models.adapters import create_adapter
from zofo.models.limits import check_model_config, check_pattern
from zofo.models.loading import empty_model

FAST = (
    "q_proj",
    r".*\.(q_proj|v_proj)",
    r"model\.layers\.(\d+)\.self_attn\..*",
    r".*layers\.(1[0-9]|2[0-3])\..*\.(q_proj|v_proj)$",
    r"^(?!.*vision).*(?:q|k|v|o|gate|up|down)_proj.*$",
    "(a|ab)(c|bcd)(d*)",
    # as unsloth writes it
    r"^(?:(?:.*?(?:language|text).*?(?:self_attn|attention|attn|mlp|feed_forward|ffn|dense).*?"
    r"(?:q_proj|k_proj|v_proj|o_proj|gate_proj|up_proj|down_proj).*?)|(?:\bmodel\.layers\."
    r"[\d]{1,}\.(?:self_attn|attention|attn|mlp|feed_forward|ffn|dense)\.(?:(?:q_proj|k_proj))))$",
)
SLOW = (
    *("(a+)+b", "(a*)*b", "(a|a)*b", "(ab|a|b)*c", "((a?)*)*b", "(?:a?){40}a{40}", "(?=(a+)+b)c"),
    *(".*a.*a.*a.*a.*a.*b", "a?" * 40 + "a" * 40, "(a|ab)" * 40, "((((a*)*)*)*)*b", "(.*)*x"),
)
INVALID = ("(", "*", "a" * 10_000, r"\d{1,99999999999999999999}", "[", "(" * 5000)


@pytest.mark.parametrize("pattern", FAST)
def test_ordinary_patterns_pass(pattern):
    check_pattern("target_modules", pattern)


@pytest.mark.parametrize("pattern", SLOW)
def test_patterns_that_could_match_for_years(pattern):
    with pytest.raises(ValueError, match="could take too long"):
        check_pattern("target_modules", pattern)


@pytest.mark.parametrize("pattern", INVALID)
def test_invalid_patterns(pattern):
    with pytest.raises(ValueError, match="is no regular expression"):
        check_pattern("rank_pattern", pattern)


LORA = {"peft_type": "LORA", "target_modules": ["q_proj", "v_proj"]}
SIZES = {
    "a rank": {**LORA, "r": 4_000_000},
    "a rank in a pattern": {**LORA, "r": 2, "rank_pattern": {"q_proj": 4_000_000}},
    "a rank of another kind": {"peft_type": "LOHA", "r": 4_000_000, "target_modules": ["q_proj"]},
    "a long prompt": {"peft_type": "PROMPT_TUNING", "num_virtual_tokens": 10**8},
    "a wide encoder": {
        "peft_type": "P_TUNING",
        "num_virtual_tokens": 3,
        "encoder_hidden_size": 10**6,
    },
    "a large pattern": {**LORA, "rank_pattern": {f"q_{i}": 2 for i in range(5000)}},
    "a slow pattern": {**LORA, "target_modules": "(([a-z._0-9]+)+)+X"},
    "a slow rank pattern": {**LORA, "rank_pattern": {"(.*)*X": 2}},
    "a slow alpha pattern": {**LORA, "alpha_pattern": {"(.*)*X": 2}},
    "slow excluded modules": {**LORA, "exclude_modules": "(.*)*X"},
}
VALUES = {
    "an unknown type": {"peft_type": "EVIL"},
    "a type of another type": {"peft_type": ["LORA"]},
    "an unknown task": {**LORA, "task_type": "EVIL"},
    "an unknown start": {**LORA, "init_lora_weights": "evil"},
    "an unknown key": {**LORA, "evil": 1},
    "a text for a number": {**LORA, "r": "8"},
    "a text for a scale": {**LORA, "lora_alpha": "x"},
    "a huge number": {**LORA, "r": 10**400},
    "NaN": {**LORA, "lora_alpha": float("nan")},
    "infinity": {**LORA, "lora_dropout": float("inf")},
    "a negative rank": {**LORA, "r": -1},
    "X-LoRA": {"peft_type": "XLORA", "hidden_size": 32, "adapters": {"a": "b"}},
    "another tokenizer": {
        "peft_type": "PROMPT_TUNING",
        "num_virtual_tokens": 3,
        "prompt_tuning_init": "TEXT",
        "prompt_tuning_init_text": "x",
        "tokenizer_name_or_path": "/does/not/exist",
    },
}


@pytest.mark.parametrize("values", [*SIZES.values(), *VALUES.values()], ids=[*SIZES, *VALUES])
@pytest.mark.parametrize("suffix", [".json"])
def test_adapter_files_that_ask_for_too_much_or_nonsense(tmp_path, values, suffix):
    path = tmp_path / f"adapter{suffix}"
    path.write_text(json.dumps(values))
    start = time.process_time()
    refused(lambda: create_adapter(build("llama", None), config_file=path))
    assert time.process_time() - start < 5


def test_the_plan_of_a_run_refuses_what_the_run_would():
    with torch.device("meta"):
        refused(lambda: create_adapter(build("llama", None), r=4_000_000), "MiB", "rank")


def test_models_of_endless_sizes(decoder_folder, tmp_path):
    import transformers as hf

    known = ("num_hidden_layers", "hidden_size", "intermediate_size", "vocab_size")
    for key in (*known, "num_experts", "encoder_layers", "head_dim"):
        config = hf.LlamaConfig()
        setattr(config, key, 1 << 31)
        refused(lambda config=config: check_model_config(config, "m"), key, "at most")
    config = hf.LlamaConfig(max_position_embeddings=1 << 31)
    config.vocab_size_per_layer_input = 262_144  # of Gemma 3n
    check_model_config(config, "m")
    saved = json.loads((Path(decoder_folder) / "config.json").read_text())
    for key in known[:2]:
        (tmp_path / "config.json").write_text(json.dumps({**saved, key: 1 << 31}))
        refused(lambda: empty_model(str(tmp_path)), key)


def test_what_draws_with_a_generator_is_counted_too(tmp_path):
    """FourierFT chooses its frequencies with a generator of its own."""
    for kind, values in {
        "FOURIERFT": {"n_frequency": 8},
        "VERA": {"r": 4},
        "LORA": {"r": 2, "init_lora_weights": "orthogonal"},
    }.items():
        path = tmp_path / f"{kind}.json"
        path.write_text(json.dumps({"peft_type": kind, "target_modules": ["q_proj"], **values}))
        create_adapter(build("llama", None), config_file=path)
