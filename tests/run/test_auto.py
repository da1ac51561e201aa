"""A run resolves `auto` before it begins, stores the numbers, and changes nothing else."""

import json
import re
from pathlib import Path

import pytest
import torch
from rich.console import Console
from typer.testing import CliRunner

from tests.run.test_train import config_for
from tests.support.models import assert_same_bits, bits
from zofo.cli.app import app
from zofo.config.checks import idle_options
from zofo.config.load import load_config
from zofo.errors import UserError
from zofo.run.auto import resolve, setting_of
from zofo.run.plan import make_plan
from zofo.run.prepare import prepare
from zofo.run.resume import resumed_config
from zofo.run.train import train
from zofo.saved.artifact import load
from zofo.study.spec import load_spec

QUIET = Console(quiet=True)
ALL = ("base_lr=auto", "adapter_lr=auto", "eps=auto")


@pytest.fixture(scope="module")
def reviews(tmp_path_factory):
    path = tmp_path_factory.mktemp("data") / "reviews.csv"
    lines = ["text,label"]
    for i in range(120):
        word, label = (("great warm", "good"), ("dull mess", "bad"))[i % 2]
        lines.append(f"the film number {i} is a {word} story,{label}")
    path.write_text("\n".join(lines) + "\n")
    return str(path)


def test_a_run_with_auto_is_the_run_with_its_numbers(tmp_path, reviews, decoder_folder):
    config = config_for(tmp_path / "auto", reviews, decoder_folder, *ALL)
    result = train(config, console=QUIET)
    saved = load_config(tmp_path / "auto" / "run.yaml")
    assert saved.auto_keys == ()
    advice = json.loads((tmp_path / "auto" / "advise.json").read_text())
    assert advice["advised"] == {k: getattr(saved, k) for k in ("eps", "base_lr", "adapter_lr")}
    assert all(value > 0 for value in advice["advised"].values() if not isinstance(value, dict))

    again = saved.model_copy(update={"output_dir": str(tmp_path / "numbers")})
    assert train(again, console=QUIET).after == result.after
    assert not (tmp_path / "numbers" / "advise.json").exists()
    models = [dict(load(tmp_path / n).model.named_parameters()) for n in ("auto", "numbers")]
    assert_same_bits(*models)

    # Resuming uses the numbers, even if the configuration still says auto.
    assert resumed_config(tmp_path / "auto", None, ["base_lr=auto", "log_every=2"]).base_lr == (
        saved.base_lr
    )
    (tmp_path / "auto" / "advise.json").unlink()
    with pytest.raises(UserError, match='-> "auto"'):
        resumed_config(tmp_path / "auto", None, ["base_lr=auto"])


@pytest.mark.parametrize(
    ("method", "asked"),
    [
        ("hybrid", {"base_lr", "adapter_lr", "eps"}),
        ("fo-peft", {"adapter_lr"}),
        ("zo-peft", {"adapter_lr", "eps"}),
        ("fo-ft", {"base_lr"}),
        ("zo-ft", {"base_lr", "eps"}),
    ],
)
def test_every_method_finds_what_it_moves_by(tmp_path, reviews, decoder_folder, method, asked):
    config = config_for(tmp_path / "run", reviews, decoder_folder, f"method={method}", *ALL)
    assert set(config.auto_keys) == asked
    prepared = prepare(config)
    before = bits(prepared.model)
    found, advice = resolve(config, prepared)
    assert_same_bits(before, bits(prepared.model))
    assert advice is not None
    assert found.auto_keys == ()
    # An option without effect has the value that it would have if it were left out.
    plain = load_config(
        values={k: v for k, v in config.model_dump().items() if v != "auto" and k != "adapter"}
    )
    for key in {"base_lr", "adapter_lr", "eps"} - asked:
        assert getattr(found, key) in (getattr(plain, key), None)
        assert key in " ".join(idle_options(config))


def test_numbers_and_fractions_of_the_batch_reach_the_advisor(tmp_path, reviews, decoder_folder):
    config = config_for(
        tmp_path, reviews, decoder_folder, "base_batch_fraction=0.5", "accumulation=2", "eps=auto"
    )
    setting = setting_of(config, 60)
    assert (setting.base_rows, setting.accumulation, setting.eps) == (2, 2, "auto")
    assert setting.base_lr == 1e-5
    # Each of 6 steps has 2 micro-batches of 2 forwards for the gradient and half a forward for the
    # difference.
    assert setting.forwards_of_run == 30


def test_a_plan_says_that_auto_is_measured(tmp_path, reviews, decoder_folder):
    plan = make_plan(config_for(tmp_path / "run", reviews, decoder_folder, *ALL))
    (note,) = [note for note in plan.notes if "measured before the run" in note]
    assert re.search(r"base_lr, adapter_lr.*for at most \d+ forward-equivalents", note)
    assert plan.num_parameters["base"][1] > 0


def test_training_sets_that_are_too_small_are_refused(tmp_path, reviews, decoder_folder):
    config = config_for(tmp_path / "run", reviews, decoder_folder, "task.num_train=8", *ALL)
    with pytest.raises(UserError, match="has 8 rows"):
        train(config, console=QUIET)
    assert not (tmp_path / "run").exists()


def test_a_study_refuses_auto(tmp_path):
    path = tmp_path / "study.yaml"
    path.write_text(
        "models: [minilm]\ntasks: [rotten-tomatoes]\nsteps: 3\nbase: {eps: auto}\n"
        "rates: {base_lr: [auto, 1e-5], adapter_lr: [1e-3]}\n"
    )
    with pytest.raises(UserError, match="cannot be auto"):
        load_spec(path)
    path.write_text(path.read_text().replace("[auto, 1e-5]", "[1e-5]"))
    with pytest.raises(UserError, match=r"base\.eps cannot be auto"):
        load_spec(path)


def advise_command(reviews, model, *more):
    return CliRunner().invoke(
        app,
        [
            "advise",
            f"model={model}",
            "task=classification",
            f"task.train={reviews}",
            "task.num_train=60",
            "task.num_dev=20",
            "task.num_test=30",
            "steps=6",
            "batch_size=4",
            *more,
        ],
    )


def test_the_command_prints_rates_reasons_and_cost(tmp_path, reviews, decoder_folder):
    done = advise_command(reviews, decoder_folder, "--json", str(tmp_path / "advice.json"))
    assert done.exit_code == 0, done.output
    saved = json.loads((tmp_path / "advice.json").read_text())
    assert set(saved["advised"]) == {"base_lr", "adapter_lr", "eps"}
    for text in ("base_lr", "adapter_lr", "eps", "tr H", "forward-equivalents"):
        assert text in done.output
    assert saved["cost"]["forward_equivalents"] > 0
    # The table begins with the scores of a training at rate 0.
    assert re.search(r"│ 0 +│ \d+\.\d{4} +│ \d+\.\d{4} +│", done.output)


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (["--caps", "perhaps"], "choose ignore or apply"),
        (["--target", "-1"], "positive"),
        (["zo_objective=accuracy"], "zo_objective=loss"),
        (["--json", str(Path(__file__) / "advice.json")], "is a file"),
        (["--json", str(Path(__file__).parent)], "is a folder"),
    ],
)
def test_wrong_options_are_one_message(reviews, decoder_folder, more, words, monkeypatch):
    """A wrong option gives one message before anything is measured."""
    monkeypatch.setattr("zofo.run.auto.advise_on", lambda *a, **k: pytest.fail("measured"))
    done = advise_command(reviews, decoder_folder, *more)
    assert done.exit_code == 2
    assert words in done.output


def test_half_precision(tmp_path, reviews, decoder_folder):
    config = config_for(
        tmp_path / "run", reviews, decoder_folder, "model.dtype=bfloat16", "method=zo-ft", *ALL
    )
    prepared = prepare(config)
    found, advice = resolve(config, prepared)
    assert found.eps > 1e-4
    assert found.base_lr >= 0
    assert next(prepared.model.parameters()).dtype == torch.bfloat16
    assert advice.plateau is not None


@pytest.mark.parametrize("command", [["train"], ["train", "--dry-run"]])
def test_a_run_folder_that_cannot_be_written_is_said_before_the_advice(
    reviews, decoder_folder, command, tmp_path, monkeypatch
):
    monkeypatch.setattr("zofo.run.auto.advise", lambda *a, **k: pytest.fail("measured"))
    (tmp_path / "file").touch()
    config = config_for(tmp_path, reviews, decoder_folder, *ALL)
    path = tmp_path / "config.yaml"
    path.write_text(config.to_yaml())
    folder = tmp_path / "file" / "run"
    done = CliRunner().invoke(app, [*command, str(path), f"output_dir={folder}"])
    assert done.exit_code == 2
    assert "is a file" in done.output
