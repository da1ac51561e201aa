import dataclasses

import pytest
import yaml

from zofo.config.checks import idle_options
from zofo.config.load import load_config
from zofo.config.schema import RunConfig
from zofo.errors import UserError
from zofo.optim.options import StepOptions
from zofo.trainer.options import HybridOptions


def test_a_written_configuration_reads_back():
    config = load_config(
        overrides=["task=boolq", "base_lr={'*mlp*': 1e-6, '*': 3e-6}", "adapter=prompt", "seed=3"]
    )
    assert load_config(values=yaml.safe_load(config.to_yaml())) == config


@pytest.mark.parametrize("alpha", [None, 8, 8.5, "8", "1e2"])
def test_what_a_resumed_run_writes_is_what_the_run_has_written(alpha):
    config = load_config(overrides=[] if alpha is None else [f"adapter.alpha={alpha}"])
    text = config.to_yaml()
    assert load_config(values=yaml.safe_load(text)).to_yaml() == text


def test_overrides_go_before_the_file(tmp_path):
    path = tmp_path / "a.yaml"
    path.write_text("steps: 5\ntask: {name: boolq, num_train: 7}\nadapter: prefix\n")
    config = load_config(path, ["steps=9", "task.num_dev=3", "base_lr=1e-5"])
    assert (config.steps, config.base_lr) == (9, 1e-5)
    assert (config.task.name, config.task.num_train, config.task.num_dev) == ("boolq", 7, 3)
    assert config.adapter.type == "prefix"


@pytest.mark.parametrize(
    "kind", ["cosine_with_min_lr", "cosine_warmup_with_min_lr", "warmup_stable_decay"]
)
def test_a_schedule_that_needs_arguments_is_refused_with_those_that_work(kind):
    with pytest.raises(
        UserError, match=r"needs arguments.* choose one of linear, cosine"
    ) as caught:
        load_config(overrides=[f"scheduler={kind}"])
    choices = str(caught.value).partition("choose one of")[2]
    assert "with_min_lr" not in choices
    assert "stable" not in choices


@pytest.mark.parametrize(
    ("overrides", "adapter_lr", "base_lr", "adapter"),
    [
        ([], 1e-3, 1e-5, "lora"),
        (["adapter=prompt"], 1e-2, 1e-5, "prompt"),
        (["method=fo-peft"], 1e-3, None, "lora"),
        (["method=zo-peft"], 1e-4, None, "lora"),
        (["method=zo-ft"], None, 1e-5, "none"),
        (["adapter_lr=0", "base_lr=0"], 0.0, 0.0, "lora"),
    ],
)
def test_rates_left_out_are_filled_in(overrides, adapter_lr, base_lr, adapter):
    config = load_config(overrides=overrides)
    assert (config.adapter_lr, config.base_lr) == (adapter_lr, base_lr)
    assert config.adapter.type == adapter


def test_all_problems_come_in_one_error():
    with pytest.raises(UserError) as caught:
        load_config(
            overrides=[
                "stepss=3",
                "eps=-1",
                "batch_size=two",
                "method=hybird",
                "task=boolk",
                "adapter.rank=4",
                "r=3",
                "base_lr=high",
                "scheduler=linaer",
                "nonsense",
            ]
        )
    message = str(caught.value)
    for part in (
        "10 problems",
        "stepss; did you mean steps?",
        "eps is -1; it must be greater than 0",
        "batch_size is 'two'",
        "did you mean hybrid?",
        "did you mean 'boolq'?",
        "unknown key adapter.rank",
        "r; did you mean adapter.r?",
        "base_lr is 'high'",
        "did you mean linear?",
        "'nonsense' is not of the form key=value",
    ):
        assert part in message


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["steps=3", "epochs=1"], "keep one"),
        (["method=zo-ft", "adapter=lora"], "moves no adapter"),
        (["adapter=none"], r"adapter\.type is none"),
        (["base_lr=-1e-5"], "at least 0"),
        (["base_lr={'*q*': .inf}"], "must be finite"),
        (["task=classification"], "needs train"),
        (["model=3"], "model is 3"),
    ],
)
def test_combinations_that_do_not_fit(overrides, words):
    with pytest.raises(UserError, match=words):
        load_config(overrides=overrides)


@pytest.mark.parametrize(
    ("text", "words"), [("a: [", "not valid YAML"), ("- 1", "keys and values"), (None, "not exist")]
)
def test_files_that_are_wrong(tmp_path, text, words):
    path = tmp_path / "a.yaml"
    if text is not None:
        path.write_text(text)
    with pytest.raises(UserError, match=words):
        load_config(path)


def test_rates_and_eps_may_be_auto():
    config = load_config(overrides=["base_lr=auto", "adapter_lr=auto", "eps=auto"])
    assert config.auto_keys == ("base_lr", "adapter_lr", "eps")
    assert load_config(values=yaml.safe_load(config.to_yaml())) == config
    only = load_config(overrides=["method=fo-peft", "adapter_lr=auto", "eps=auto"])
    assert only.auto_keys == ("adapter_lr",)
    assert load_config().auto_keys == ()


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("steps=auto", "steps is auto; only base_lr, adapter_lr, eps can be"),
        ("max_grad_norm=auto", "max_grad_norm is auto; only"),
        ("base_lr={'*q*': auto}", r"base_lr\.\*q\* is 'auto'; it must be a number"),
        ("eps=automatic", "eps is 'automatic'; it must be a valid number, or auto"),
        ("adapter_lr=-1", "adapter_lr is -1; it must be greater than or equal to 0"),
        ("base_lr={}", "base_lr is an empty map; name the weights that move"),
    ],
)
def test_what_cannot_be_a_rate_is_said_once(override, words):
    with pytest.raises(UserError, match=words) as caught:
        load_config(overrides=[override])
    assert "problems" not in str(caught.value)


@pytest.mark.parametrize("method", ["hybrid", "zo-ft"])
def test_auto_measures_the_training_loss_alone(method):
    asked = [f"method={method}", "base_lr=auto", "zo_objective=accuracy"]
    with pytest.raises(UserError, match="base_lr is auto, which measures the training loss"):
        load_config(overrides=asked)
    load_config(overrides=["base_lr=1e-5", "adapter_lr=auto", "zo_objective=accuracy"])


def test_options_without_effect_are_named():
    config = load_config(overrides=["method=fo-peft", "eps=1e-4", "steps=3"])
    assert idle_options(config) == ["eps has no effect with method fo-peft"]
    assert idle_options(load_config()) == []


def test_every_key_is_described():
    assert all(
        field.description
        for name, field in RunConfig.model_fields.items()
        if name not in ("model", "adapter", "task", "reward", "preference")
    )


def test_the_options_of_a_step_are_one_everywhere():
    in_trainer = {field.name: field for field in dataclasses.fields(HybridOptions)}
    for field in dataclasses.fields(StepOptions):
        key = RunConfig.model_fields[field.name]
        assert key.default == field.default == in_trainer[field.name].default
        assert key.description.startswith(field.metadata["help"])
        assert in_trainer[field.name].metadata["help"] == field.metadata["help"]


def test_a_written_configuration_begins_with_the_method():
    assert load_config().to_yaml().startswith("method: hybrid\n")


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("wandb", "report_to names wandb, whose package is not installed; install it"),
        ("wandbb", "report_to names 'wandbb'; did you mean wandb"),
    ],
)
def test_where_a_run_reports_to_must_be_there(name, words, monkeypatch):
    from transformers.integrations import integration_utils

    ready = "get_available_reporting_integrations"
    monkeypatch.setattr(integration_utils, ready, lambda: ["tensorboard"])
    with pytest.raises(UserError, match=words):
        load_config(overrides=[f"report_to=[{name}]"])
    assert load_config(overrides=["report_to=[tensorboard]"]).report_to == ["tensorboard"]
