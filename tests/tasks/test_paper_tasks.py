"""The paper's tasks work from rows to scores: runs, commands and predictions on tiny models."""

import json

import pytest
from rich.console import Console
from typer.testing import CliRunner

from tests.support.hub_rows import make_row, write_folder
from zofo.cli.app import app
from zofo.config.load import load_config
from zofo.models.loading import load_model
from zofo.run.plan import make_plan
from zofo.run.train import train
from zofo.saved.artifact import Artifact, BaseSpec, load
from zofo.scoring.predict import predict
from zofo.scoring.score import evaluate_artifact
from zofo.tasks.families.table import BUILTIN
from zofo.tasks.rows import Table
from zofo.tasks.spec import TaskSpec

SHORT = ["steps=2", "batch_size=4", "task.num_train=12", "task.num_dev=8"]


def run(*arguments):
    return CliRunner().invoke(app, [str(a) for a in arguments])


def trained(folder, task, model, *more):
    data = write_folder(folder / "data", task)
    overrides = [f"model={model}", f"task={task}", f"task.data_dir={data}", *SHORT]
    config = load_config(overrides=[*overrides, f"output_dir={folder / 'run'}", *more])
    return config, train(config, console=Console(quiet=True))


@pytest.mark.parametrize("task", ["wsc", "cb", "copa", "winogrande"])
def test_decoders_train_on_it(tmp_path, task, decoder_folder):
    config, result = trained(tmp_path, task, decoder_folder)
    assert result.after.num_rows == 12
    assert evaluate_artifact(load(tmp_path / "run"), config.task) == result.after
    notes = json.loads((tmp_path / "run" / "result.json").read_text())["notes"]
    assert any("is right in" in note for note in notes)
    assert tuple(make_plan(config).notes) == tuple(notes)


@pytest.mark.parametrize("adapter", ["lora", "prefix", "prompt"])
def test_encoders_train_on_pairs(tmp_path, adapter, encoder_folder):
    config, result = trained(tmp_path, "rte", encoder_folder, f"adapter={adapter}")
    assert evaluate_artifact(load(tmp_path / "run"), config.task) == result.after


def test_pairs_train_on_a_part_of_the_batch(tmp_path, encoder_folder):
    _, result = trained(tmp_path, "wic", encoder_folder, "base_batch_fraction=0.5")
    assert result.after.num_rows == 12


def test_encoders_are_no_choosers(tmp_path, encoder_folder):
    data = write_folder(tmp_path / "data", "copa")
    done = run("train", f"model={encoder_folder}", "task=copa", f"task.data_dir={data}")
    assert done.exit_code == 2
    assert "choose a decoder" in done.stderr


@pytest.mark.parametrize("task", ["winogrande", "copa", "wsc", "boolq"])
def test_predictions_need_no_labels(task, decoder_folder):
    model, tokenizer = load_model(decoder_folder)
    artifact = Artifact(model.eval(), tokenizer, BaseSpec(decoder_folder), "none", None, ())
    rows = [
        {k: v for k, v in make_row(task, i).items() if k not in BUILTIN[task].labels}
        for i in range(3)
    ]
    table = Table(list(enumerate(rows, start=1)), "rows", {})
    found = list(predict(artifact, TaskSpec(name=task), table))
    assert [row["row"] for row in found] == [1, 2, 3]
    for row, prediction in zip(rows, found, strict=True):
        if task == "winogrande":
            assert prediction["prediction"] in (row["option1"], row["option2"])
            assert len(prediction["scores"]) == 2
        elif task == "copa":
            assert prediction["prediction"] in ("ann saw it.", "it was long.")
        else:
            assert prediction["probabilities"].keys() == {"no", "yes"}


def test_tasks_are_listed_and_shown(tmp_path):
    listed = run("tasks").stdout
    assert all(name in listed for name in BUILTIN)
    data = write_folder(tmp_path / "data", "winogrande")
    shown = run("tasks", "winogrande", f"task.data_dir={data}", "task.num_dev=6")
    assert shown.exit_code == 0, shown.output
    for part in ("sentence, option1, option2, answer", "6 dev, 12 test", "'{after}'", " is great."):
        assert part in shown.stdout
    assert "always candidate 1 is right in 50.0% of test" in shown.stdout
    data = write_folder(tmp_path / "more", "trec")
    shown = run("tasks", "trec", f"task.data_dir={data}").stdout
    assert "always ABBR is right in 16.7% of test" in shown
    assert "' Location' (LOC)" in shown
    done = run("tasks", "wic", f"task.data_dir={tmp_path / 'none'}")
    assert done.exit_code == 2
    assert "is no folder" in done.stderr
    assert run("tasks", "wic", "task.nun_dev=3").exit_code == 2


def test_eval_refuses_the_kin_of_what_was_trained_on(tmp_path, decoder_folder):
    options = [f"model={decoder_folder}", *SHORT, "task.num_test=10"]
    done = run("train", "task=rotten-tomatoes", *options, f"output_dir={tmp_path / 'rotten'}")
    assert done.exit_code == 0, done.output
    data = write_folder(tmp_path / "data", "sst2")
    done = run(
        "train", "task=sst2", f"task.data_dir={data}", *options, f"output_dir={tmp_path / 'sst2'}"
    )
    assert done.exit_code == 0, done.output
    for arguments, words in (
        (["rotten", "task=sst2", f"task.data_dir={data}"], "trained on rotten-tomatoes"),
        (["sst2", "task=rotten-tomatoes"], "trained on sst2"),
        (["rotten", "task.num_test=2000"], "rows that the model was trained or selected on"),
    ):
        done = run("eval", tmp_path / arguments[0], *arguments[1:])
        assert done.exit_code == 2, done.output
        assert words in done.stderr.partition("error: ")[2]
    assert run("eval", tmp_path / "rotten").exit_code == 0
    # Another task uses its own sizes and files.
    data = write_folder(tmp_path / "rte", "rte")
    done = run("eval", tmp_path / "sst2", "task=rte", f"task.data_dir={data}")
    assert "on rte, test, 12 rows" in done.stdout, done.output
