import json

import datasets
import pandas as pd
import pytest

from zofo.errors import UserError
from zofo.tasks.labels import label_in
from zofo.tasks.load import load_splits
from zofo.tasks.rows import MAX_TEXT, convert_rows, read_table, text_in
from zofo.tasks.spec import TaskSpec

ROWS = [{"text": f'words, "quoted" {i}', "label": i % 2} for i in range(6)]


def write(path, rows):
    frame = pd.DataFrame(rows)
    if path.suffix in (".jsonl", ".ndjson"):
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    elif path.suffix == ".json":
        path.write_text(json.dumps(rows))
    elif path.suffix == ".parquet":
        frame.to_parquet(path)
    else:
        frame.to_csv(path, index=False, sep="\t" if path.suffix == ".tsv" else ",")
    return str(path)


@pytest.mark.parametrize("suffix", [".jsonl", ".ndjson", ".json", ".csv", ".tsv", ".parquet"])
def test_every_format_gives_the_same_rows(tmp_path, suffix):
    table = read_table(write(tmp_path / f"rows{suffix}", ROWS))
    assert [text_in(row, "text") for _, row in table.rows] == [row["text"] for row in ROWS]
    assert [label_in(row, "label") for _, row in table.rows] == list("010101")
    assert [number for number, _ in table.rows] == [1, 2, 3, 4, 5, 6]


@pytest.mark.parametrize(
    ("name", "text", "words"),
    [
        ("a.jsonl", '{"text": "x"}\n{"text": \n', "row 2: not valid JSON"),
        ("a.jsonl", "[1]\n", "row 1: must be an object"),
        ("a.json", '{"text": 1}', "list of objects"),
        ("a.csv", "text,label\n", "no rows"),
        ("a.jsonl", "\n", "no rows"),
        ("a.parquet", "not parquet", "cannot be read"),
    ],
)
def test_files_that_are_wrong(tmp_path, name, text, words):
    path = tmp_path / name
    path.write_text(text)
    with pytest.raises(UserError, match=words):
        read_table(str(path))


def nested(depth):
    return {"text": "x", "inner": json.loads("[" * depth + "]" * depth)}


@pytest.mark.parametrize("suffix", [".jsonl", ".json"])
def test_deep_rows_and_long_texts_are_named(tmp_path, suffix):
    long = {"text": "x", "inner": [["a" * (MAX_TEXT + 1)]]}
    for row, words in ((nested(70), "nested more than 64 deep"), (long, f"{MAX_TEXT} are the lim")):
        table = write(tmp_path / f"a{suffix}", [{"text": "x", "inner": [["b"]]}, row])
        with pytest.raises(UserError, match=rf"(?s)row 2: 'inner' .*{words}"):
            read_table(table)


@pytest.mark.parametrize("text", ["[" * 100_000, "9" * 5000], ids=["deep", "number"])
@pytest.mark.parametrize("form", ['{"a": %s', '[{"a": %s'], ids=["jsonl", "json"])
def test_json_that_cannot_be_parsed(tmp_path, form, text):
    path = tmp_path / ("a.json" if form.startswith("[") else "a.jsonl")
    path.write_text(form % text)
    with pytest.raises(UserError, match="not valid JSON"):
        read_table(str(path))


def test_a_missing_file(tmp_path):
    with pytest.raises(UserError, match="does not exist"):
        read_table(str(tmp_path / "none.csv"))


def test_all_bad_rows_are_named_up_to_a_few(tmp_path):
    table = read_table(write(tmp_path / "a.jsonl", [{"text": ""} for _ in range(9)]))
    with pytest.raises(UserError, match=r"(?s)row 1: 'text' is empty.*row 5.*and 4 more rows"):
        convert_rows(table, lambda _, row: text_in(row, "text"))


@pytest.mark.parametrize(
    ("value", "label"), [(True, "true"), (3, "3"), (2.0, "2"), ("good", "good")]
)
def test_labels_are_text(value, label):
    assert label_in({"label": value}, "label") == label


def spec(path, **options):
    return TaskSpec(name="classification", train=str(path), num_test=2, num_dev=2, **options)


def many(labels, number=20):
    return [{"text": f"text {i}", "label": labels[i % len(labels)]} for i in range(number)]


def test_a_missing_column_lists_those_there_are(tmp_path):
    write(tmp_path / "a.csv", [{"review": "x", "label": 1}, {"review": "y", "label": 0}])
    with pytest.raises(UserError, match=r"no column 'text'; its columns are 'review', 'label'"):
        load_splits(spec(tmp_path / "a.csv"))


@pytest.mark.parametrize(
    ("rows", "words"),
    [
        (many(["a"]), "one label only"),
        ([{"text": f"t{i}", "label": i} for i in range(300)], "is it the right column"),
        ([*many(["a", "b"]), {"text": "x", "label": ""}], "row 21: 'label' is empty"),
        ([*many(["a", "b"]), {"text": " ", "label": "a"}], "row 21: 'text' is empty"),
    ],
)
def test_classification_rows_that_are_wrong(tmp_path, rows, words):
    write(tmp_path / "a.jsonl", rows)
    with pytest.raises(UserError, match=words):
        load_splits(spec(tmp_path / "a.jsonl"))


def test_labels_become_candidates_in_numeric_order(tmp_path):
    write(tmp_path / "a.jsonl", many([10, 2, 1]))
    splits = load_splits(spec(tmp_path / "a.jsonl"))
    assert splits.labels == ("1", "2", "10")
    row = splits.train[0]
    assert row.candidates == (" 1", " 2", " 10")
    assert row.prompt == f"{row.text}\nLabel:"


def test_templates_and_verbalizers(tmp_path):
    rows = [{"a": f"one {i}", "b": "{two}", "label": i % 2 == 0} for i in range(20)]
    write(tmp_path / "a.jsonl", rows)
    splits = load_splits(
        spec(
            tmp_path / "a.jsonl",
            template="{a} and {b}?",
            verbalizers={True: " Yes", False: " No"},
        )
    )
    assert splits.labels == ("false", "true")
    assert {row.prompt for row in (*splits.train, *splits.dev, *splits.test)} == {
        f"one {i} and {{two}}?" for i in range(20)
    }
    row = splits.train[0]
    assert row.candidates == (" No", " Yes")


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"template": "no column"}, "must name columns"),
        ({"template": "{text"}, "malformed"),
        ({"template": "{title}: {text}"}, "no column 'title'"),
        ({"verbalizers": {"a": " x"}}, "missing: b"),
        ({"verbalizers": {"a": " x", "b": " y", "c": " z"}}, "unknown: c"),
        ({"verbalizers": {"a": " x", "b": " x"}}, "must differ"),
    ],
)
def test_prompts_that_are_wrong(tmp_path, options, words):
    write(tmp_path / "a.jsonl", many(["a", "b"]))
    with pytest.raises(UserError, match=words):
        load_splits(spec(tmp_path / "a.jsonl", **options))


def test_of_a_dataset_that_is_a_script_the_hubs_copy_is_read(monkeypatch):
    data = datasets.Dataset.from_dict({"text": ["a", "b"], "label": [1, 0]})
    asked = []

    def load(source, *arguments, **options):
        asked.append((source, *arguments, options))
        if source != "parquet":
            raise RuntimeError("Dataset scripts are no longer supported, but found trec.py")
        return data

    monkeypatch.setattr(datasets, "load_dataset", load)
    table = read_table("some/one", subset="small", split="test")
    assert [row["text"] for _, row in table.rows] == ["a", "b"]
    files = "hf://datasets/some/one@refs/convert/parquet/small/test/*.parquet"
    assert asked[1] == ("parquet", {"data_files": files, "split": "train"})


def test_options_that_a_task_does_not_use_are_errors():
    with pytest.raises(UserError, match=r"does not use messages, train"):
        load_splits(TaskSpec(name="boolq", train="x.csv", messages="turns"))


def test_an_unknown_task_names_the_nearest():
    with pytest.raises(UserError, match="did you mean 'rotten-tomatoes'"):
        load_splits(TaskSpec(name="rotten-tomato"))
