"""A second task is scored during training, and changes nothing else."""

from __future__ import annotations

import json

import pytest
from rich.console import Console

from tests.support.models import assert_same_bits
from tests.support.trainers import untimed_metrics
from zofo.config.load import load_config
from zofo.disk.files import read_json
from zofo.errors import UserError
from zofo.optim.blocks import split_parameters
from zofo.run.plan import make_plan
from zofo.run.resume import resumed_config
from zofo.run.train import train
from zofo.saved.artifact import load
from zofo.scoring.score import evaluate_artifact
from zofo.tasks.load import load_dev
from zofo.tasks.spec import TaskSpec

QUIET = Console(quiet=True)
WATCH = "watch_task={name: classification, dev: second.csv, num_dev: 12}"


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A working folder with the rows of two tasks, and of one with other classes."""
    monkeypatch.chdir(tmp_path)
    kinds = ("great warm story,good", "dull mess,bad")
    for name, things in (("first", "film"), ("second", "meal")):
        rows = [f"the {things} number {i} is a {kinds[i % 2]}" for i in range(40)]
        (tmp_path / f"{name}.csv").write_text("\n".join(["text,label", *rows]) + "\n")
    other = [f"what {i},{'abc'[i % 3]}" for i in range(12)]
    (tmp_path / "three.csv").write_text("\n".join(["text,label", *other]) + "\n")
    texts = [json.dumps({"prompt": f"{i} is", "completion": " a number"}) for i in range(12)]
    (tmp_path / "texts.jsonl").write_text("\n".join(texts) + "\n")
    return tmp_path


def config_of(model, *overrides):
    return load_config(
        overrides=[
            f"model={model}",
            "task=classification",
            "task.train=first.csv",
            "task.num_dev=6",
            "steps=4",
            "eval_every=1",
            "log_every=1",
            "batch_size=4",
            "base_lr=1e-3",
            "adapter_lr=1e-2",
            "measure_test=false",
            "output_dir=run",
            *overrides,
        ]
    )


def interrupt_at(step):
    from transformers import TrainerCallback

    class Stop(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            if state.global_step == step:
                raise KeyboardInterrupt

    return lambda _: [Stop()]


def test_it_is_scored_and_influences_nothing(folder, decoder_folder, capsys):
    train(config_of(decoder_folder, "output_dir=plain"), console=QUIET)
    watching = config_of(decoder_folder, WATCH)
    result = train(watching, console=Console(width=200))
    plain, watched = (untimed_metrics(folder / run / "metrics.jsonl") for run in ("plain", "run"))
    scores = [{k: v for k, v in row.items() if k.startswith("watch_")} for row in watched]
    assert [row["step"] for row, found in zip(watched, scores, strict=True) if found] == [*range(5)]
    rest = [{k: v for k, v in row.items() if not k.startswith("watch_")} for row in watched]
    assert rest[1:] == plain
    models = [load(run).model for run in ("plain", "run")]
    for block in ("base", "adapter"):
        assert_same_bits(*(dict(getattr(split_parameters(m), block)) for m in models))
    assert f"step 0: watch_task loss {scores[0]['watch_loss']:.4f}" in capsys.readouterr().out

    found = read_json(folder / "run" / "result.json")
    at_best = next(row for row in watched if row["step"] == found["dev"]["after"]["step"] > 0)
    assert found["watch"]["task"] == "classification"
    for when, row in (("before", watched[0]), ("after", at_best)):
        logged = {k.removeprefix("watch_"): v for k, v in row.items() if k.startswith("watch_")}
        assert found["watch"][when].items() >= logged.items()
        assert result.watch[when] == found["watch"][when]
    # A known answer: the score of the saved model on the same rows.
    rows = load_dev(watching.watch_task, seed=watching.seed).dev
    lines = [f"{row.text},{('bad', 'good')[row.gold]}" for row in rows]
    (folder / "same.csv").write_text("\n".join(["text,label", *lines]) + "\n")
    task = TaskSpec(name="classification", train="first.csv", test="same.csv")
    known = evaluate_artifact(load("run"), task).as_dict()
    assert {k: found["watch"]["after"][k] for k in known} == pytest.approx(known)


def test_a_resumed_run_logs_the_same_scores(folder, decoder_folder):
    train(config_of(decoder_folder, WATCH, "output_dir=whole"), console=QUIET)
    with pytest.raises(KeyboardInterrupt):
        train(config_of(decoder_folder, WATCH), console=QUIET, watchers=interrupt_at(3))
    rows = (folder / "second.csv").read_text()
    (folder / "second.csv").write_text(rows.replace("number 1", "number one"))
    with pytest.raises(UserError, match="watch_task: its rows have changed"):
        train(resumed_config(folder / "run"), resume=folder / "run", console=QUIET)
    (folder / "second.csv").write_text(rows)
    with pytest.raises(UserError, match=r"watch_task.num_dev: 12 -> 5"):
        resumed_config(folder / "run", None, ["watch_task.num_dev=5"])
    train(resumed_config(folder / "run"), resume=folder / "run", console=QUIET)
    metrics = [untimed_metrics(folder / run / "metrics.jsonl") for run in ("whole", "run")]
    assert metrics[0] == metrics[1]
    results = [read_json(folder / run / "result.json") for run in ("whole", "run")]
    assert results[0]["watch"] == results[1]["watch"]


def test_a_classification_head_needs_its_own_classes(folder, encoder_folder):
    plan = make_plan(config_of(encoder_folder, WATCH))
    assert plan.num_rows["watch_task"] == 12
    assert any(
        "classification is scored before training and at each evaluation" in note
        for note in plan.notes
    )
    for watch in ("{name: classification, dev: three.csv}", "{name: completion, dev: texts.jsonl}"):
        with pytest.raises(UserError, match=r"^watch_task: .*class"):
            train(config_of(encoder_folder, f"watch_task={watch}"), console=QUIET)
    assert not (folder / "run").exists()


def test_a_decoder_scores_any_task(folder, decoder_folder):
    whole = "watch_task={name: completion, dev: texts.jsonl}"
    assert make_plan(config_of(decoder_folder, whole)).num_rows["watch_task"] == 12
    carved = "watch_task={name: classification, train: three.csv, num_dev: 3}"
    assert make_plan(config_of(decoder_folder, carved)).num_rows["watch_task"] == 3


@pytest.mark.parametrize(
    ("watch", "words"),
    [
        ("ssst2", "watch_task: task 'ssst2' does not exist; did you mean 'sst2'"),
        ("classification", "watch_task: task classification needs dev or train"),
        ("{name: classification, dev: absent.csv}", "watch_task: the data file absent.csv"),
        ("{name: classification, dev: second.csv, num_dev: 99}", "num_dev is 99"),
        ("{name: classification, dev: second.csv, text: body}", "Name yours with watch_task.text"),
        ("{name: sst2, train: x.csv}", "watch_task: task sst2 does not use train"),
        ("{nam: sst2}", "unknown key watch_task.nam; did you mean name"),
        ("{name: sst2, num_dev: 0}", "watch_task.num_dev"),
        ("3", "watch_task is 3"),
    ],
)
def test_bad_input_is_one_error_before_any_work(folder, decoder_folder, watch, words):
    with pytest.raises(UserError) as error:
        train(config_of(decoder_folder, f"watch_task={watch}"), console=QUIET)
    assert words in str(error.value)
    assert not (folder / "run").exists()


def test_a_name_stands_for_the_section():
    assert load_config(overrides=["watch_task=sst2"]).watch_task == TaskSpec(name="sst2")
    assert load_config(overrides=["watch_task=sst2", "watch_task=null"]).watch_task is None
