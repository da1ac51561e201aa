"""Tests of the adapters by name.

They cover the kinds, the initial values, and the inputs that zofo refuses.
"""

from __future__ import annotations

import pytest
import torch

from tests.models.test_matrix import PAGE, TABLE
from tests.support import zoo
from zofo.config.checks import idle_options
from zofo.config.load import load_config
from zofo.config.schema import AdapterConfig
from zofo.errors import UserError
from zofo.models.adapter_kinds import ADAPTER_TYPES, KINDS
from zofo.models.adapters import create_adapter
from zofo.models.loading import empty_model, load_model
from zofo.optim.blocks import split_parameters

KIND_OF = {
    "lora": "LORA",
    "dora": "LORA",
    "rslora": "LORA",
    "ia3": "IA3",
    "prefix": "PREFIX_TUNING",
    "prompt": "PROMPT_TUNING",
    "p-tuning": "P_TUNING",
}


def attach(architecture, adapter, **options):
    return create_adapter(
        zoo.bare(architecture), adapter, head=zoo.head_of(architecture), **options
    ).eval()


def words(ids):
    """Return a tokenizer that gives `ids` for every text."""
    return lambda text, **_: {"input_ids": list(ids)}


# The tests below check the kind of each adapter.


@pytest.mark.parametrize("adapter", KINDS)
def test_each_name_is_pefts_kind(adapter):
    config = attach("llama", adapter).peft_config["default"]
    assert config.peft_type.value == KIND_OF[adapter]
    assert getattr(config, "use_dora", False) == (adapter == "dora")
    assert getattr(config, "use_rslora", False) == (adapter == "rslora")


@pytest.mark.parametrize(("adapter", "scale"), [("lora", 2.0), ("dora", 2.0), ("rslora", 4.0)])
def test_the_scale_of_lora_and_its_kin(adapter, scale):
    model = attach("llama", adapter, r=4, alpha=8)
    scales = [m.scaling["default"] for m in model.modules() if hasattr(m, "lora_A")]
    assert scales
    assert set(scales) == {scale}


@pytest.mark.parametrize("adapter", ["lora", "dora", "rslora"])
@pytest.mark.parametrize(("alpha", "written"), [(16, "16"), (16.0, "16"), (8.5, "8.5")])
def test_equal_scales_are_written_in_one_way(adapter, alpha, written):
    made = attach("llama", adapter, alpha=alpha)
    assert repr(made.peft_config["default"].lora_alpha) == written


@pytest.mark.parametrize(("adapter", "num"), [("prefix", 5), ("prompt", 10), ("p-tuning", 10)])
def test_default_lengths(adapter, num):
    assert attach("llama", adapter).peft_config["default"].num_virtual_tokens == num


@pytest.mark.parametrize("adapter", ["lora", "dora", "rslora", "ia3"])
@pytest.mark.parametrize("architecture", ["llama", "gpt2", "bert", "t5"])
@torch.no_grad()
def test_tuners_begin_as_the_base(architecture, adapter):
    batch = zoo.batch_for(architecture)
    expected = zoo.bare(architecture).eval()(**batch).logits
    assert torch.allclose(attach(architecture, adapter)(**batch).logits, expected, atol=1e-5)


@pytest.mark.parametrize("adapter", ["lora", "dora", "rslora", "ia3"])
def test_every_target_must_match(adapter):
    with pytest.raises(UserError, match=r"'wq' matches no linear module.*q_proj"):
        attach("llama", adapter, targets=["q_proj", "wq"])
    model = attach("llama", adapter, targets="o_proj")
    assert all("o_proj" in name for name in split_parameters(model).adapter)
    assert split_parameters(attach("llama", adapter, targets="all-linear")).adapter


def test_ia3_scales_the_input_of_the_inner_layer_and_other_outputs():
    sizes = {
        name.split(".")[-3]: tuple(p.shape)
        for name, p in split_parameters(attach("llama", "ia3")).adapter.items()
    }
    assert sizes == {"k_proj": (8, 1), "v_proj": (8, 1), "down_proj": (1, 24)}


@pytest.mark.parametrize("adapter", ["lora", "ia3"])
def test_an_architecture_that_peft_does_not_know(adapter):
    model = zoo.bare("llama")
    model.config.model_type = "brand-new"
    found = split_parameters(create_adapter(model, adapter)).adapter
    ends = {"lora": {"q_proj", "v_proj"}, "ia3": {"k_proj", "v_proj", "down_proj"}}
    assert {next(part for part in name.split(".") if "_proj" in part) for name in found} == ends[
        adapter
    ]
    model = zoo.bare("gpt2")
    model.config.model_type = "brand-new"
    with pytest.raises(UserError, match=r"no .* targets for models of type 'brand-new'.*c_attn"):
        create_adapter(model, adapter)


def test_a_pattern_of_pefts_is_one_pattern(monkeypatch):
    import peft.utils

    known = peft.utils.TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING
    monkeypatch.setitem(known, "llama", r".*\.(q_proj|v_proj)")
    names = split_parameters(attach("llama", "lora")).adapter
    assert {name.split(".")[-4] for name in names} == {"q_proj", "v_proj"}


# The tests below check the initial values of the adapters.


@pytest.mark.parametrize("architecture", zoo.DECODERS)
@pytest.mark.parametrize("adapter", ["prefix", "prompt"])
@torch.no_grad()
def test_a_decoders_text_computes_what_it_would_before_the_input(architecture, adapter):
    ids = torch.tensor([[5, 9, 11, 7, 3, 8, 20]])
    whole = zoo.bare(architecture).eval()(ids).logits[:, 3:]
    model = attach(
        architecture,
        adapter,
        num_virtual_tokens=3,
        init_text="a text",
        tokenizer=words([5, 9, 11]),
    )
    rest = ids[:, 3:]
    seen = model(input_ids=rest, attention_mask=torch.ones_like(rest)).logits[:, -4:]
    assert torch.allclose(seen, whole, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("architecture", ["bert", "roberta"])
@torch.no_grad()
def test_an_encoders_prefix_is_keys_and_values_of_its_tokens(architecture):
    base, seen = zoo.bare(architecture).eval(), {}
    for name, module in base.named_modules():
        if name.endswith((".key", ".value")):
            module.register_forward_hook(
                lambda _, __, out, name=name: seen.setdefault(name, out[0])
            )
    base(input_ids=torch.tensor([[5, 9, 11]]))
    # The prefix is ordered by layer, and the keys of a layer stand before its values.
    expected = torch.cat([seen[name] for name in sorted(seen)], dim=1)
    options = {"num_virtual_tokens": 3, "init_text": "a text", "tokenizer": words([5, 9, 11])}
    model = attach(architecture, "prefix", **options)
    assert torch.allclose(model.prompt_encoder["default"].embedding.weight, expected, atol=1e-6)


@pytest.mark.parametrize("architecture", ["bert", "deberta-v3", "t5", "flan-t5"])
def test_prompts_of_other_models_are_embeddings_of_their_tokens(architecture):
    options = {"num_virtual_tokens": 3, "init_text": "a text", "tokenizer": words([5, 9, 11])}
    model = attach(architecture, "prompt", **options)
    rows = zoo.bare(architecture).get_input_embeddings().weight[[5, 9, 11]]
    assert torch.equal(model.prompt_encoder["default"].embedding.weight, rows)


@pytest.mark.parametrize("adapter", KINDS)
@pytest.mark.parametrize("architecture", ["llama", "bert", "t5"])
def test_the_start_depends_on_the_seed_and_leaves_generators_alone(architecture, adapter):
    state = torch.get_rng_state()
    one, same, other = (attach(architecture, adapter, seed=seed) for seed in (1, 1, 2))
    assert torch.equal(torch.get_rng_state(), state)
    values = [list(split_parameters(m).adapter.values()) for m in (one, same, other)]
    assert all(torch.equal(a, b) for a, b in zip(values[0], values[1], strict=True))
    is_random = adapter != "ia3"
    assert any(not torch.equal(a, b) for a, b in zip(values[0], values[2], strict=True)) == (
        is_random
    )


def test_a_short_text_is_repeated_and_an_empty_one_refused():
    options = {"num_virtual_tokens": 5, "init_text": "a text"}
    model = attach("llama", "prompt", tokenizer=words([5, 9]), **options)
    rows = model.get_base_model().get_input_embeddings().weight[[5, 9, 5, 9, 5]]
    assert torch.equal(model.prompt_encoder["default"].embedding.weight, rows)
    with pytest.raises(UserError, match="holds no token"):
        attach("llama", "prompt", tokenizer=words([]), **options)
    with pytest.raises(UserError, match="needs a tokenizer"):
        attach("llama", "prompt", **options)


@pytest.mark.parametrize("architecture", ["t5", "flan-t5"])
def test_an_encoder_decoders_prompt_has_no_dead_half(architecture):
    model = attach(architecture, "prompt", num_virtual_tokens=3).train()
    model(**zoo.batch_for(architecture)).loss.backward()
    (prompt,) = split_parameters(model).adapter.values()
    assert prompt.shape[0] == 3
    assert prompt.grad.abs().sum(dim=1).min() > 0


@pytest.mark.parametrize(
    ("architecture", "cell"),
    [(a, cell) for (a, k), cell in TABLE.items() if k == "prefix" and cell != "no"],
)
def test_a_prefix_begins_with_its_text_where_the_page_says_so(architecture, cell):
    options = {"num_virtual_tokens": 3, "init_text": "a text"}
    one, other = (
        attach(architecture, "prefix", tokenizer=words(ids), **options)
        for ids in ([5, 9, 11], [4, 8, 15])
    )
    same = torch.equal(*(m.prompt_encoder["default"].embedding.weight for m in (one, other)))
    assert same == (cell == "random")


@torch.no_grad()
def test_why_the_prefix_of_an_encoder_decoder_begins_at_random():
    """peft gives all layers of an encoder-decoder the same prefix.

    This is why zofo initialises it at random. If this test fails, peft has changed, and zofo can
    initialise that prefix from a text.
    """
    layers = list(attach("t5", "prefix").get_prompt(1).self_attention_cache)
    assert torch.equal(layers[0][0], layers[1][0])
    layers = list(attach("llama", "prefix").get_prompt(1))
    assert not torch.equal(layers[0][0], layers[1][0])


# The tests below check what zofo refuses.


def test_names_that_do_not_exist():
    with pytest.raises(UserError) as caught:
        create_adapter(zoo.bare("llama"), "qlora")
    assert all(name in str(caught.value) for name in ADAPTER_TYPES)
    with pytest.raises(UserError, match="did you mean p-tuning"):
        load_config(overrides=["adapter=ptuning"])


def test_what_peft_cannot_run_is_one_message():
    with pytest.raises(UserError, match=r"DebertaV2.* no prefix; choose adapter prompt"):
        attach("deberta-v2", "prefix")
    with pytest.raises(UserError, match=r"peft cannot attach IA3 .*choose another"):
        attach("llama", "ia3", targets=["embed_tokens"])


def test_a_plan_refuses_what_a_run_would(tmp_path):
    zoo.ARCHITECTURES["deberta-v3"]().save_pretrained(tmp_path)
    model = empty_model(str(tmp_path), head="classification")
    with pytest.raises(UserError, match="no prefix; choose"):
        create_adapter(model, "prefix", head="classification")


def test_a_model_without_weights_gets_every_adapter(decoder_folder):
    for adapter in KINDS:
        made = split_parameters(create_adapter(empty_model(decoder_folder), adapter)).adapter
        assert {p.device.type for p in made.values()} <= {"meta", "cpu"}
        real = split_parameters(create_adapter(load_model(decoder_folder)[0], adapter)).adapter
        assert {n: p.shape for n, p in made.items()} == {n: p.shape for n, p in real.items()}


# The tests below check learning rates and options.


@pytest.mark.parametrize("adapter", KINDS)
def test_rates_left_out_are_the_kinds(adapter):
    kind = KINDS[adapter]
    for method in ("hybrid", "fo-peft"):
        config = load_config(overrides=[f"adapter={adapter}", f"method={method}"])
        assert (config.adapter_lr, config.eps) == (kind.lr, 1e-3)
    config = load_config(overrides=[f"adapter={adapter}", "method=zo-peft"])
    assert (config.adapter_lr, config.eps) == (kind.zo_lr, kind.zo_eps)
    given = ["adapter_lr=0.5", "eps=1e-3", f"adapter={adapter}", "method=zo-peft"]
    config = load_config(overrides=given)
    assert (config.adapter_lr, config.eps) == (0.5, 1e-3)


def test_zeroth_order_rates_lie_in_the_papers_grids():
    for adapter, low, high in (
        ("lora", 1e-6, 1e-3),
        ("prompt", 1e-6, 1e-3),
        ("prefix", 1e-4, 1e-2),
    ):
        assert low <= KINDS[adapter].zo_lr <= high
    assert KINDS["prefix"].zo_eps == 1e-1
    assert all(1e-4 <= KINDS[adapter].zo_eps <= 1e-2 for adapter in ("lora", "prompt"))


@pytest.mark.parametrize("adapter", KINDS)
def test_options_that_an_adapter_does_not_take_are_named(adapter):
    given = {
        "r": 4,
        "alpha": 8,
        "dropout": 0.1,
        "targets": "q_proj",
        "layers": "last 1",
        "budget": 9999,
        "budget_batches": 3,
        "num_virtual_tokens": 3,
        "init_text": "words",
    }
    assert {*given, "type", "modules", "config_file"} == set(AdapterConfig.model_fields)
    if "layers" not in KINDS[adapter].options:
        del given["layers"], given["budget"]  # They are refused, as other tests check.
    values = [f"adapter.{key}={value}" for key, value in given.items()]
    found = idle_options(load_config(overrides=[f"adapter={adapter}", *values]))
    expected = [key for key in given if key not in KINDS[adapter].options]
    assert found == [f"adapter.{key} has no effect with adapter {adapter}" for key in expected]
    assert idle_options(load_config(overrides=[f"adapter={adapter}"])) == []


def test_a_file_makes_every_other_option_idle():
    config = load_config(overrides=["adapter.config_file=a.json", "adapter.r=4", "adapter=prompt"])
    assert idle_options(config) == [
        "adapter.type has no effect with adapter.config_file",
        "adapter.r has no effect with adapter.config_file",
    ]
    assert config.adapter_lr == KINDS["lora"].lr


def test_what_a_run_is_called():
    assert load_config(overrides=["adapter=dora"]).adapter.label == "dora"
    assert load_config(overrides=["adapter.config_file=my/loha.json"]).adapter.label == "loha"
    assert load_config(overrides=["method=zo-ft"]).adapter.label == "none"


@pytest.mark.parametrize("adapter", KINDS)
def test_options_are_what_peft_is_given(adapter):
    """Each option that a kind accepts changes the attached adapter, and no other option does."""

    def made(**options):
        model = attach("llama", adapter, tokenizer=words([5, 9, 11]), **options)
        scales = [str(m.scaling) for m in model.modules() if hasattr(m, "scaling")]
        return [repr(model), *scales], list(split_parameters(model).adapter.values())

    plain = made()
    given = {
        "r": 4,
        "alpha": 8,
        "dropout": 0.1,
        "targets": "o_proj",
        "layers": [1],
        "num_virtual_tokens": 3,
        "init_text": "words",
    }
    for key, value in given.items():
        if key == "layers" and key not in KINDS[adapter].options:
            with pytest.raises(UserError):
                made(layers=value)
            continue
        changed = made(**{key: value})
        same = changed[0] == plain[0] and all(map(torch.equal, changed[1], plain[1]))
        assert same == (key not in KINDS[adapter].options), key


@pytest.mark.parametrize("adapter", KINDS)
def test_the_page_has_every_kind_with_its_defaults(adapter):
    kind = KINDS[adapter]
    cells = [
        f"`{adapter}`",
        kind.description,
        ", ".join(f"`{option}`" for option in kind.options),
        f"{kind.lr:g}, {kind.lr_source}",
        f"{kind.zo_lr:g}, {kind.zo_lr_source}",
        f"{kind.zo_eps:g}, {kind.zo_eps_source}",
    ]
    assert f"| {' | '.join(cells)} |" in PAGE.read_text()


def test_a_prefix_and_gradient_checkpointing():
    with pytest.raises(UserError, match="drops the cache that holds a prefix"):
        load_config(overrides=["adapter=prefix", "gradient_checkpointing=true"])
    load_config(overrides=["adapter=prompt", "gradient_checkpointing=true"])
