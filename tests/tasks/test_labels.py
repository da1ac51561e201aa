"""One rule for labels, applied to all files of a task together."""

import json
import math
import os
import random
import subprocess
import sys
from decimal import Decimal

import datasets
import numpy as np
import pandas as pd
import pytest

from zofo.errors import UserError
from zofo.tasks.classify import candidates_of
from zofo.tasks.labels import Classes, class_names, label_in, label_of
from zofo.tasks.load import load_splits
from zofo.tasks.rows import Table, read_table
from zofo.tasks.spec import TaskSpec


@pytest.mark.parametrize(
    ("values", "label"),
    [
        ((1, 1.0, "1", "1.0", " 1 ", "+1", "1.", np.int64(1), np.float32(1), Decimal("1.0")), "1"),
        ((0, 0.0, -0.0, "0", "-0", "0.00"), "0"),
        ((True, "true", "True", " TRUE ", np.bool_(True)), "true"),
        (("01",), "01"),
        (("good", " good\n", np.str_("good")), "good"),
        (("NA", " NA"), "NA"),
    ],
)
def test_equal_labels(values, label):
    assert {label_of(value) for value in values} == {label}


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ((None, math.nan, "", " ", "nan", "NaN", pd.NA, pd.NaT, np.float64("nan")), "is empty"),
        ((0.5, "0.5", "-1e-3", ".5", np.float32(0.5), Decimal("4.5"), math.inf), "is no integer"),
        (([], ["a"], {"a": 1}, ("a",), np.array(["a"]), b"a", pd.Timestamp(0)), "one text"),
    ],
)
def test_values_that_are_no_labels_are_refused_with_file_and_row(values, words):
    for value in values:
        table = Table([(7, {"label": "a"}), (8, {"label": value})], "a.x", {})
        with pytest.raises(UserError, match=rf"(?s)a\.x:\n  row 8: 'label' .*{words}"):
            class_names([table], "label")


def table_of(*labels, source="a.csv", **names):
    return Table([(i, {"label": x}) for i, x in enumerate(labels, 1)], source, names)


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        (([0, 1] * 3, ["0.0", "1.0"]), "0 1"),
        (([0, 1] * 3, [True, False]), "0 1"),
        (([True, False] * 3, ["True", "FALSE"]), "false true"),
        ((["true", "false"], ["1", "0"]), "0 1"),
        ((["true", 1, "maybe"] * 3,), "1 maybe true"),
        (([10, "9", 1.0, "-1"] * 3,), "-1 1 9 10"),
        ((["b", "a "] * 3, [" b", "a"]), "a b"),
        ((["é", "z", "Z", "10", "9"][1:] * 3,), None),
        ((["é", "z", "10", "9"] * 3,), "10 9 z é"),
    ],
)
def test_all_files_agree_and_the_order_is_fixed(files, expected):
    tables = [table_of(*labels, source=f"{i}.csv") for i, labels in enumerate(files)]
    if expected is None:
        with pytest.raises(UserError, match=r"'z' \(0.csv, row 1\) and 'Z' \(0.csv, row 2\)"):
            class_names(tables, "label")
        return
    for _ in range(5):
        for table in tables:
            random.shuffle(table.rows)
        assert class_names(tables, "label") == tuple(expected.split())


@pytest.mark.parametrize(
    ("labels", "words"),
    [
        (["Pos", "pos"] * 5, "'Pos' .*row 1.* and 'pos' .*row 2.* differ only in case"),
        (["so so", "so  so"] * 5, "differ only in case, blanks"),
        (["01", 1] * 5, "leading zeros"),
        (["caf\u00e9", "cafe\u0301"] * 5, "Unicode form"),
        ([1, "1.0"] * 5, "one label only, '1'"),
        ([True, 1] * 5, "one label only, '1'"),
        (range(60), "60 different labels in 60 rows; a class needs two rows"),
        ([f"text {i}" for i in range(12)] + ["text 1"], "is it the right column"),
        ([*range(300)] * 3, "at most 200 classes"),
    ],
)
def test_labels_that_cannot_be_classes(labels, words):
    with pytest.raises(UserError, match=words):
        class_names([table_of(*labels)], "label")


def test_labels_of_all_formats_are_matched(tmp_path):
    def write(name, labels, first):
        rows = [{"text": f"{name} {i}", "label": labels[i % 2]} for i in range(first, first + 20)]
        path, frame = tmp_path / name, pd.DataFrame(rows)
        if path.suffix == ".parquet":
            frame.to_parquet(path)
        elif path.suffix == ".jsonl":
            path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        else:
            frame.to_csv(path, index=False)
        return str(path)

    train = write("a.csv", [0, 1], 0)
    dev = write("b.parquet", [0.0, 1.0], 20)
    test = write("c.jsonl", [False, True], 40)
    splits = load_splits(TaskSpec(name="classification", train=train, dev=dev, test=test))
    assert splits.labels == ("0", "1")
    for row in (*splits.train, *splits.dev, *splits.test):
        assert row.gold == int(row.text.split()[-1]) % 2
        assert row.candidates == (" 0", " 1")


def test_hub_datasets_are_matched_by_the_names_of_their_classes(monkeypatch):
    def load(source, subset, split):
        names = ["b", "a"] if split == "train" else ["a", "b"]
        feature = datasets.Features(
            {"text": datasets.Value("string"), "label": datasets.ClassLabel(names=names)}
        )
        rows = {"text": [f"{split} {i}" for i in range(20)], "label": [0, 1] * 10}
        return datasets.Dataset.from_dict(rows, features=feature)

    monkeypatch.setattr(datasets, "load_dataset", load)
    spec = TaskSpec(name="classification", train="some/one", test="test")
    splits = load_splits(spec)
    assert splits.labels == ("b", "a")
    for row in splits.train:
        assert row.gold == int(row.text.split()[-1]) % 2
    for row in splits.test:
        assert row.gold == 1 - int(row.text.split()[-1]) % 2
    numbers = table_of(0, 1, source="hub", label=["1", "0"])
    assert [label_in(row, "label", numbers.label_names["label"]) for _, row in numbers.rows] == [
        "1",
        "0",
    ]
    with pytest.raises(UserError, match=r"the dataset does not know these labels: 'c' \(x.csv"):
        class_names([read_table("some/one"), table_of("a", "c", source="x.csv")], "label")


@pytest.mark.parametrize(
    ("names", "label", "index"),
    [
        (("pos", "neg"), "neg", 1),
        (("false", "true"), "1", 1),
        (("1", "0"), "true", 0),
        (("True", "False"), "true", 0),  # names of older versions
        (("0.0", "1.0"), "1", 1),
        (("0", "1", "2"), "true", None),
        (("a", "b"), "c", None),
    ],
)
def test_classes_of_a_trained_model(names, label, index):
    classes = Classes(names)
    assert (label in classes) == (index is not None)
    if index is not None:
        assert classes.index(label) == index
        return
    with pytest.raises(UserError, match=rf"{label!r} \(a.csv, row 1\); its classes are {names[0]}"):
        class_names([table_of(label)], "label", names)


def test_verbalizers_follow_the_rule():
    assert candidates_of(("0", "1"), {"true": " Yes", "0.0": " No"}) == (" No", " Yes")
    with pytest.raises(UserError, match="names the label '1' twice"):
        candidates_of(("0", "1"), {"true": " Yes", "0": " No", "1": " Yea"})


def test_the_classes_do_not_depend_on_the_hash_seed():
    script = """
import math, sys
from decimal import Decimal
from zofo.errors import UserError
from zofo.tasks.labels import class_names
from zofo.tasks.rows import Table

half = [1.0, "0", 1, "1", 0.0, Decimal(1), "1.0", -0.0, "+1"], [True, False, 1, 0, "true"]
words = [f"label {n}" for n in range(9)] * 2 + [1, 1.0, "one", 10**20, float(2**53)] * 2
lost = [1, 1.0, math.nan, float("nan"), "a"] * 2, ["A", "a", "b", "B"] * 2, [1, "01", "1."] * 2
for labels in (*half, words, *lost):
    table = Table([(n, {"label": label}) for n, label in enumerate(labels)], "rows", {})
    try:
        print(class_names([table], "label"))
    except UserError as error:
        print(error)
assert "torch" not in sys.modules
"""
    said = set()
    for seed in "012":
        environment = {**os.environ, "PYTHONHASHSEED": seed}
        command = [sys.executable, "-c", script]
        said.add(subprocess.check_output(command, env=environment, text=True))
    lines = said.pop().splitlines()
    assert not said
    assert lines[:2] == ["('0', '1')"] * 2
    assert eval(lines[2])[:3] == ("1", str(10**20), str(2**53))
    assert sum("differ only in" in line for line in lines) == 2
    assert any("is empty" in line for line in lines)
