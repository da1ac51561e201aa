"""A trained model is scored on the rows that it was not trained on, by the names of its classes."""

import dataclasses
import json
import random

import pytest
from rich.console import Console
from typer.testing import CliRunner

from tests.support.hub_rows import write_folder
from zofo.cli.app import app
from zofo.config.load import load_config
from zofo.errors import UserError
from zofo.run.train import train
from zofo.saved.artifact import load
from zofo.scoring.predict import predict
from zofo.scoring.score import evaluate_artifact
from zofo.tasks.rows import Table
from zofo.tasks.spec import TaskSpec

NAMES = ["World", "Sports", "Business", "Sci/Tech"]


def trained(folder, model, *options):
    config = load_config(
        overrides=[
            f"model={model}",
            *options,
            "method=fo-peft",
            "adapter_lr=0.02",
            "steps=1",
            "eval_every=1",
            "device=cpu",
            f"output_dir={folder}",
        ]
    )
    result = train(config, console=Console(quiet=True))
    return load(folder), config.task, result


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.fixture(scope="module")
def news(tmp_path_factory, encoder_folder):
    """An encoder that was trained on a built-in task, and rows of the same classes."""
    folder = tmp_path_factory.mktemp("news")
    write_folder(folder, "agnews")
    own = [{"text": f"News {i}", "label": NAMES[i % 4]} for i in range(1000, 1012)]
    write(folder / "own.jsonl", own)
    write(folder / "rest.jsonl", [{"text": f"Rest {i}", "label": NAMES[i % 4]} for i in range(20)])
    options = ["task=agnews", f"task.data_dir={folder}", "task.num_dev=10"]
    return folder, *trained(folder / "run", encoder_folder, *options)


def own_task(folder, test="own.jsonl"):
    files = {"train": str(folder / "rest.jsonl"), "test": str(folder / test)}
    return TaskSpec(name="classification", **files)


def test_classes_are_matched_by_name(news):
    folder, artifact, task, result = news
    assert evaluate_artifact(artifact, task) == result.after
    own = evaluate_artifact(artifact, own_task(folder))
    assert own.as_dict() == pytest.approx(result.after.as_dict())


def test_predictions_have_the_names_of_the_models_classes(news, decoder_folder):
    folder, artifact, task, _ = news
    table = Table([(1, {"text": "News 1"})], "x", {})
    found = {}
    for name, spec in (("agnews", task), ("own", own_task(folder))):
        (found[name],) = predict(artifact, spec, table)
        assert list(found[name]["probabilities"]) == NAMES
    assert found["agnews"] == found["own"]


@pytest.mark.parametrize(
    ("labels", "words"),
    [
        (["World", "Weather"], r"'Weather' \(.*strange.jsonl, row 2\); its classes are World, Sp"),
        (["world"], "'world'"),
        ([0, 1], "'0' .*, '1' "),
    ],
)
def test_strange_classes_are_refused_and_named(news, labels, words):
    folder, artifact, _, _ = news
    rows = [{"text": f"new {i}", "label": labels[i % len(labels)]} for i in range(10)]
    write(folder / "strange.jsonl", rows)
    with pytest.raises(UserError, match=words):
        evaluate_artifact(artifact, own_task(folder, "strange.jsonl"))


@pytest.fixture(scope="module")
def reviews(tmp_path_factory, decoder_folder):
    """A decoder that was trained on rows of two classes, which are noise."""
    folder = tmp_path_factory.mktemp("reviews")
    draw = random.Random(0)
    rows = [{"text": f"film {i}", "label": draw.choice(["pos", "neg"])} for i in range(60)]
    path = folder / "rows.jsonl"
    write(path, rows)
    options = ["task=classification", f"task.train={path}", "task.max_length=64"]
    return path, rows, *trained(folder / "run", decoder_folder, *options)


@pytest.fixture
def score(reviews):
    """Writes rows into the run's file, and gives the scores and what is said about the rows."""
    path, rows, artifact, task, _ = reviews

    def score(changed, artifact=artifact, **options):
        write(path, changed)
        said = []
        metrics = evaluate_artifact(artifact, task, report=said.append, **options)
        return metrics, "".join(said)

    yield score
    write(path, rows)


def test_rows_of_the_run_are_scored_in_changed_data(reviews, score):
    _, rows, _, _, result = reviews
    assert score(rows) == (result.after, "")
    appended = [*rows, *({"text": f"new {i}", "label": "pos"} for i in range(9))]
    metrics, said = score(appended)
    assert metrics == result.after
    assert "9 other rows, which are new or were not used, are left out" in said
    metrics, said = score(sorted(rows, key=lambda row: row["text"]))
    assert metrics == result.after
    assert "the data has changed" in said


def test_lost_rows_are_said_and_without_test_rows_nothing_is_scored(reviews, score):
    _, rows, _, _, result = reviews
    flip = {"pos": "neg", "neg": "pos"}
    flipped = [{**row, "label": flip[row["label"]]} for row in rows]
    metrics, said = score([*flipped[:30], *rows[30:]])
    assert 0 < metrics.num_rows < result.after.num_rows
    gone = result.after.num_rows - metrics.num_rows
    assert f"{gone} of {result.after.num_rows} test rows with another label" in said
    for changed in (flipped, [{**row, "text": row["text"] + "!"} for row in rows]):
        with pytest.raises(UserError, match=r"no test row of the run is left.*put the rows back"):
            score(changed)
    with pytest.raises(UserError, match=r"does not know these labels: 'mixed'.*neg, pos"):
        score([*rows, {"text": "new", "label": "mixed"}])


def test_an_artefact_without_digests_is_scored_as_before(reviews, score):
    _, rows, artifact, _, result = reviews
    old = dataclasses.replace(artifact, rows=None)
    assert score(rows, old) == (result.after, "")
    assert score(rows[:50], old)[0].num_rows == 10


def test_training_rows_are_refused_even_if_their_file_is_gone(reviews, score, tmp_path):
    path, rows, artifact, task, _ = reviews
    with pytest.raises(UserError, match="trained or selected on"):
        score(rows, seed=1)
    more = [{"text": f"other {i}", "label": "pos" if i % 2 else "neg"} for i in range(20)]
    spec = task.model_copy(
        update={
            "train": write(tmp_path / "other.jsonl", more),
            "test": write(tmp_path / "all.jsonl", rows),
        }
    )
    path.unlink()
    with pytest.raises(UserError, match="48 of the 60 test rows are rows that the model was"):
        evaluate_artifact(artifact, spec)


def test_another_template_is_refused_where_rows_cannot_be_found(reviews, score):
    _, rows, artifact, task, result = reviews
    numbered = [{**row, "number": f"no. {i}"} for i, row in enumerate(rows)]
    for template, is_refused in (("{text}!", False), ("{number} {text}:", True)):
        other = task.model_copy(update={"template": template})
        score(numbered)
        assert evaluate_artifact(artifact, other).num_rows == result.after.num_rows
        write(reviews[0], numbered[5:])
        if is_refused:
            with pytest.raises(UserError, match=r"task.template shows other columns"):
                evaluate_artifact(artifact, other)
        else:
            with pytest.warns(UserWarning, match="the data has changed"):
                evaluate_artifact(artifact, other)


def test_the_command_says_it_on_stderr(reviews):
    path, rows, *_ = reviews
    write(path, rows[::-1])
    done = CliRunner().invoke(app, ["eval", str(path.parent / "run"), "--json"])
    write(path, rows)
    assert done.exit_code == 0
    assert "note: the data has changed since the run began" in done.stderr
    assert json.loads(done.stdout)["num_rows"] == 12
