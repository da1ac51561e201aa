import json

import numpy as np
import pytest

from tests.support.hub_folders import make_tokenizer
from zofo.errors import UserError
from zofo.tasks.answers import Answers
from zofo.tasks.encode import Encoder, encoder_for
from zofo.tasks.families.passages import answers_in
from zofo.tasks.load import load_splits
from zofo.tasks.spec import TaskSpec


def squad_row(i):
    return {
        "id": str(i),
        "title": "Films",
        "context": f"Film {i} was shot in Rome.",
        "question": f"Where was film {i} shot?",
        "answers": {"text": ["Rome", "in Rome", "Rome"], "answer_start": [20, 17, 20]},
    }


def drop_row(i, spans=("12",), types=("number",)):
    return {
        "passage": f"Team {i} kicked 12 goals.",
        "question": f"How many goals did team {i} kick?",
        "answers_spans": {"spans": list(spans), "types": list(types)},
    }


def write(folder, row, suffix=".jsonl"):
    folder.mkdir(exist_ok=True)
    for part, numbers in (("train", range(30)), ("validation", range(30, 40))):
        rows = [row(i) for i in numbers]
        path = folder / f"{part}{suffix}"
        if suffix == ".parquet":
            import pandas as pd

            pd.DataFrame(rows).to_parquet(path)
        else:
            lines = [json.dumps(r) for r in rows]
            path.write_text("\n".join(lines) if suffix == ".jsonl" else json.dumps(rows))
    return str(folder)


def spec_of(name, folder, **changes):
    sizes = {"num_train": 10, "num_dev": 5, "num_test": 5}
    return TaskSpec(name=name, data_dir=folder, **{**sizes, **changes})


@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".parquet"])
def test_squad_in_the_hubs_columns(tmp_path, suffix):
    splits = load_splits(spec_of("squad", write(tmp_path, squad_row, suffix)))
    assert splits.kind == "generation"
    assert [len(p) for p in (splits.train, splits.dev, splits.test)] == [10, 5, 5]
    assert {row.row for row in splits.test} <= set(range(1, 11))
    # The test rows are the validation rows 30 to 39.
    assert all("ilm 3" in row.text for row in splits.test)
    row = splits.train[0]
    i = row.row - 1
    assert row.segments == (
        (
            f"Title: Films\nContext: Film {i} was shot in Rome.\n"
            f"Question: Where was film {i} shot?\nAnswer:",
            False,
        ),
        (" Rome", True),
    )
    assert row.answers == Answers((("Rome",), ("in Rome",)))


def test_drop_in_the_hubs_columns(tmp_path):
    splits = load_splits(spec_of("drop", write(tmp_path, drop_row, ".parquet")))
    row = splits.train[0]
    assert row.segments[0][0].startswith("Passage: Team ")
    assert row.segments[0][0].endswith(" kick?\nAnswer:")
    assert row.segments[1] == (" 12", True)
    assert row.answers == Answers((("12",),), "drop")


@pytest.mark.parametrize(
    ("spans", "types", "gold"),
    [
        (["Lee", "Smith"], ["span", "span"], (("Lee", "Smith"),)),
        # Two annotators give the same spans, and a third gives a number.
        (["Lee", "Smith", "Lee", "Smith", "2"], ["span"] * 4 + ["number"], None),
        (["3", "4", "3"], ["number"] * 3, (("3",), ("4",))),
        (["1 May", "Lee", "Lee"], ["date", "span", "span"], (("1 May",), ("Lee",))),
    ],
)
def test_answers_of_drop_that_run_together(spans, types, gold):
    row = {"answers_spans": {"spans": np.array(spans, dtype=object), "types": types}}
    assert answers_in(row, "drop").gold == (gold or (("Lee", "Smith"), ("2",)))


@pytest.mark.parametrize(
    ("answers", "words"),
    [
        ("Rome", "must be an object with text"),
        ({"text": []}, "holds no answer"),
        ({"text": "Rome"}, "must be a list"),
        ({"text": 5}, "must be a list"),
        ({"text": [["Rome"]]}, "a text on one line"),
        ({"text": [" "]}, "a text on one line"),
        ({"text": ["Rome\nItaly"]}, "a text on one line"),
    ],
)
def test_wrong_answers(tmp_path, answers, words):
    folder = write(tmp_path, lambda i: {**squad_row(i), **({"answers": answers} if i == 7 else {})})
    with pytest.raises(UserError, match=f"row 8: .*{words}"):
        load_splits(spec_of("squad", folder))


def test_missing_files_and_columns(tmp_path):
    with pytest.raises(UserError, match=r"holds no train\.jsonl"):
        load_splits(spec_of("drop", str(tmp_path)))
    folder = write(tmp_path, lambda i: {k: v for k, v in squad_row(i).items() if k != "title"})
    with pytest.raises(UserError, match=r"no column 'title'.*task\.template"):
        load_splits(spec_of("squad", folder))
    splits = load_splits(spec_of("squad", folder, template="{context} {question}"))
    assert splits.train[0].segments[0][0].endswith("shot?")


def test_passages_have_room_by_default():
    assert TaskSpec(name="drop").max_length == TaskSpec(name="squad").max_length == 1024
    assert TaskSpec(name="squad", max_length=100).max_length == 100
    assert TaskSpec(**TaskSpec(name="squad").model_dump()) == TaskSpec(name="squad")
    assert TaskSpec(name="completion").max_length == 256


def test_a_prompt_is_cut_as_if_the_answer_were_not_known(tmp_path):
    tokenizer = make_tokenizer()
    spec = spec_of("squad", write(tmp_path, squad_row), max_length=60, max_new_tokens=10)
    row = load_splits(spec).train[0]
    encoded = encoder_for(tokenizer, "causal-lm", spec)(row)
    whole = Encoder(tokenizer, max_length=1000)(row)
    assert len(whole.prompt) > 50
    assert encoded.prompt == whole.prompt[-50:]
    assert tokenizer.decode(encoded.prompt).endswith("Answer:")
    learnt = tokenizer.decode([token for _, _, token in encoded.targets[0]])
    assert learnt == " Rome<eos>"


def completions(tmp_path, rows, **changes):
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    options = {"num_dev": 1, "num_test": 1, **changes}
    return load_splits(TaskSpec(name="completion", train=str(path), **options))


def test_own_completions_are_answers_where_a_metric_is_asked_for(tmp_path):
    rows = [{"prompt": f"{i} + 1 =", "completion": f" {i + 1}"} for i in range(6)]
    splits = completions(tmp_path, rows)
    assert splits.kind == "completion"
    assert splits.train[0].answers is None
    splits = completions(tmp_path, rows, metric="f1")
    assert splits.kind == "generation"
    row = splits.train[0]
    assert row.answers == Answers(((row.segments[1][0],),))
    rows[3]["completion"] = "\n4"
    with pytest.raises(UserError, match=r"row 4: .*breaks the line"):
        completions(tmp_path, rows, metric="f1")


def test_the_questions_on_a_passage_stay_in_one_part(tmp_path):
    def row(i):
        return {**squad_row(i), "context": f"Passage {i // 3}."}

    folder = write(tmp_path, row)
    splits = load_splits(TaskSpec(name="squad", data_dir=folder, num_dev=6, num_test=5))
    passages = [{row.text.split("\n")[1] for row in part} for part in (splits.train, splits.dev)]
    assert passages[0]
    assert passages[1]
    assert not passages[0] & passages[1]
