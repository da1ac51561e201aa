from dataclasses import replace

import pandas as pd
import pytest

from tests.support.hub_rows import TEST_SPLIT, make_row, write_folder, write_rows
from zofo.errors import UserError
from zofo.tasks.families.family import examples
from zofo.tasks.families.table import BUILTIN
from zofo.tasks.load import load_splits, used_options
from zofo.tasks.rows import Table, read_table
from zofo.tasks.spec import TaskSpec
from zofo.tasks.splits import separate

CHOOSING = [name for name, task in BUILTIN.items() if task.kind != "generation"]


@pytest.mark.parametrize(
    ("name", "candidates"),
    [("rotten-tomatoes", (" terrible", " great")), ("boolq", (" No", " Yes"))],
)
def test_classification_tasks_of_packages(name, candidates):
    splits = load_splits(TaskSpec(name=name, num_train=50, num_dev=20, num_test=30))
    assert [len(part) for part in (splits.train, splits.dev, splits.test)] == [50, 20, 30]
    assert splits.kind == "classification"
    assert {row.candidates for row in splits.train} == {candidates}
    golds = [row.gold for row in splits.train]
    assert 5 < sum(golds) < 45


def test_boolq_trains_on_none_of_its_test_questions():
    splits = load_splits(TaskSpec(name="boolq", num_train=5000, num_test=3000))
    tested = {row.text[1] for row in splits.test}
    assert not tested & {row.text[1] for row in (*splits.train, *splits.dev)}


def test_piqa_has_candidates_of_its_own_for_every_row():
    splits = load_splits(TaskSpec(name="piqa"))
    assert splits.kind == "choice"
    assert splits.labels == ()
    row = next(r for r in (*splits.train, *splits.dev, *splits.test) if "dresser" in r.prompt)
    assert row.prompt == "Goal: dresser\nSolution:"
    assert row.candidates[row.gold] == " finish, woodgrain with  bobby pin"


KNOWN = {
    "rotten-tomatoes": (
        {"text": "a fine film .", "label": 1},
        "a fine film . It was",
        (" terrible", " great"),
        1,
    ),
    "sst2": ({"sentence": "a mess", "label": 0}, "a mess It was", (" terrible", " great"), 0),
    "trec": (
        {"text": "Who wrote Hamlet ?", "coarse_label": 3},
        "Who wrote Hamlet ?\nAnswer type:",
        (" Expression", " Entity", " Description", " Human", " Location", " Number"),
        3,
    ),
    "agnews": (
        {"text": "Stocks fell.", "label": 2},
        "Stocks fell.\nTopic:",
        (" World", " Sports", " Business", " Technology"),
        2,
    ),
    "rte": (
        {"premise": "No weapons found.", "hypothesis": "Weapons found.", "label": 1},
        'No weapons found.\nDoes this mean that "Weapons found." is true? Yes or No?\n',
        ("Yes", "No"),
        1,
    ),
    "cb": (
        {"premise": "He may go.", "hypothesis": "he goes", "label": 2},
        'Suppose He may go. Can we infer that "he goes"? Yes, No, or Maybe?\n',
        ("Yes", "No", "Maybe"),
        2,
    ),
    "boolq": (
        {"question": "is it red?", "passage": "Tom -- A cat.", "answer": True},
        "Tom -- A cat. Is it red?",
        (" No", " Yes"),
        1,
    ),
    "multirc": (
        {"paragraph": "It rained.", "question": "What fell?", "answer": "Rain", "label": 1},
        'It rained.\nQuestion: What fell?\nI found this answer "Rain". Is that correct? '
        "Yes or No?\n",
        ("No", "Yes"),
        1,
    ),
    "wic": (
        {"word": "bat", "sentence1": "A bat flew.", "sentence2": "He swung a bat.", "label": 0},
        'Does the word "bat" have the same meaning in these two sentences? Yes, No?\n'
        "A bat flew.\nHe swung a bat.\n",
        ("No", "Yes"),
        0,
    ),
    "wsc": (
        {
            "text": "Mr. Singer told Pete lies. He laughed, and He left.",
            "span1_index": 0,
            "span2_index": 5,
            "span1_text": "Mr. Singer",
            "span2_text": "He",
            "label": 1,
        },
        "Mr. Singer told Pete lies. He laughed, and He left.\nIn the previous sentence, does the "
        'pronoun "he" refer to Mr. Singer? Yes or No?\n',
        ("No", "Yes"),
        1,
    ),
    "copa": (
        {
            "premise": "My body cast a shadow.",
            "choice1": "The sun was up.",
            "choice2": "I slept.",
            "question": "cause",
            "label": 0,
        },
        "My body cast a shadow because",
        (" the sun was up.", " I slept."),
        0,
    ),
    "piqa": (
        {"goal": "see", "sol1": "look", "sol2": "sleep", "label": 0},
        "Goal: see\nSolution:",
        (" look", " sleep"),
        0,
    ),
    "winogrande": (
        {
            "sentence": "Ann thanked Bob as _ had helped.",
            "option1": "Ann",
            "option2": "Bob",
            "answer": "2",
        },
        "Ann thanked Bob as ",
        ("Ann", "Bob"),
        1,
    ),
}


@pytest.mark.parametrize("name", CHOOSING)
def test_a_row_becomes_the_documented_prompt(tmp_path, name):
    row, prompt, candidates, gold = KNOWN[name]
    data = write_folder(tmp_path / "data", name, test=[row])
    splits = load_splits(TaskSpec(name=name, data_dir=data))
    (found,) = splits.test
    assert (found.prompt, found.candidates, found.gold) == (prompt, candidates, gold)
    assert found.ending == (" had helped." if name == "winogrande" else "")
    assert splits.kind == BUILTIN[name].kind
    assert splits.labels == (BUILTIN[name].classes if splits.kind == "classification" else ())


PAIRS = {
    "rte": ("No weapons found.", "Weapons found."),
    "cb": ("He may go.", "he goes"),
    "boolq": ("Tom -- A cat.", "Is it red?"),
    "multirc": ("It rained.", "What fell? Rain"),
    "wic": ("bat: A bat flew.", "bat: He swung a bat."),
    "wsc": (
        "*Mr. Singer* told Pete lies. _He_ laughed, and He left.",
        "He refers to Mr. Singer",
    ),
    "trec": "Who wrote Hamlet ?",
    "sst2": "a mess",
}


@pytest.mark.parametrize("name", PAIRS)
def test_what_an_encoder_reads(tmp_path, name):
    data = write_folder(tmp_path / "data", name, test=[KNOWN[name][0]])
    assert load_splits(TaskSpec(name=name, data_dir=data)).test[0].text == PAIRS[name]


def test_marks_leave_punctuation_outside(tmp_path):
    row = {**KNOWN["wsc"][0], "text": "We saw Ann, but not her.", "span1_index": 2}
    row |= {"span2_index": 5, "span1_text": "Ann", "span2_text": "her"}
    data = write_folder(tmp_path / "data", "wsc", test=[row])
    found = load_splits(TaskSpec(name="wsc", data_dir=data)).test[0]
    assert found.text[0] == "We saw *Ann*, but not _her_."
    spec = TaskSpec(name="wsc", data_dir=data, template="{marked} {span2_text}?")
    assert load_splits(spec).test[0].prompt == "We saw *Ann*, but not _her_. her?"


@pytest.mark.parametrize("suffix", [".csv", ".parquet", ".json"])
@pytest.mark.parametrize("name", ["boolq", "wsc", "winogrande"])
def test_other_formats_give_the_same_rows(tmp_path, name, suffix):
    expected = load_splits(TaskSpec(name=name, data_dir=write_folder(tmp_path / "a", name)))
    (tmp_path / "b").mkdir()
    for path in (tmp_path / "a").iterdir():
        frame = pd.DataFrame([row for _, row in read_table(str(path)).rows])
        target = tmp_path / "b" / f"{path.stem}{suffix}"
        if suffix == ".csv":
            frame.to_csv(target, index=False)
        elif suffix == ".json":
            frame.to_json(target, orient="records")
        else:
            frame.to_parquet(target)
    found = load_splits(TaskSpec(name=name, data_dir=str(tmp_path / "b")))
    assert [(r.prompt, r.gold) for r in found.train] == [(r.prompt, r.gold) for r in expected.train]


@pytest.mark.parametrize("label", [0, "0", False, "False", "entailment"])
def test_labels_by_number_name_and_truth(tmp_path, label):
    row = {"premise": "a", "hypothesis": "b", "label": label}
    data = write_folder(tmp_path / "data", "rte", test=[row])
    assert load_splits(TaskSpec(name="rte", data_dir=data)).test[0].gold == 0


@pytest.mark.parametrize("name", [n for n in CHOOSING if n != "winogrande"])
def test_unlabelled_rows_are_one_error(tmp_path, name):
    label = next(c for c in BUILTIN[name].labels if c in make_row(name, 0))
    rows = [{**make_row(name, i), label: -1} for i in range(9)]
    data = write_folder(tmp_path / "data", name, test=rows)
    with pytest.raises(UserError, match=r"(?s)row 1: .* is -1.*no label.*and 4 more rows"):
        load_splits(TaskSpec(name=name, data_dir=data))


@pytest.mark.parametrize("name", CHOOSING)
def test_a_missing_column_is_one_error(tmp_path, name):
    task = BUILTIN[name]
    label = next(c for c in task.labels if c in make_row(name, 0))
    for column in (*task.columns, label):
        rows = [{k: v for k, v in make_row(name, i).items() if k != column} for i in range(3)]
        data = write_folder(tmp_path / "data", name, test=rows)
        expected = task.labels[0] if column == label else column
        with pytest.raises(UserError, match=f"no column '{expected}'.*{task.hub.dataset}"):
            load_splits(TaskSpec(name=name, data_dir=data))


@pytest.mark.parametrize(
    ("name", "change", "words"),
    [
        ("rte", {"label": 2}, r"'2', not one of 0 \(entailment\), 1 \(not_entailment\)"),
        ("winogrande", {"answer": ""}, "'answer' is empty"),
        ("winogrande", {"sentence": "no blank"}, "one blank"),
        ("winogrande", {"sentence": "_ and _ go"}, "one blank"),
        ("copa", {"question": "reason"}, "'reason', not one of cause, effect"),
        ("wsc", {"span1_index": 99}, "words 0 to 6"),
        ("wsc", {"span1_index": "first"}, "not the number of a word"),
        ("wic", {"sentence1": " "}, "'sentence1' is empty"),
    ],
)
def test_rows_that_are_wrong(tmp_path, name, change, words):
    data = write_folder(tmp_path / "data", name, test=[{**make_row(name, 1000), **change}])
    with pytest.raises(UserError, match=f"row 1: .*{words}"):
        load_splits(TaskSpec(name=name, data_dir=data))


def test_a_folder_that_lacks_a_file_or_has_two(tmp_path):
    with pytest.raises(UserError, match="is no folder"):
        load_splits(TaskSpec(name="sst2", data_dir=str(tmp_path / "none")))
    with pytest.raises(UserError, match=r"holds no train\.jsonl"):
        load_splits(TaskSpec(name="sst2", data_dir=str(tmp_path)))
    write_folder(tmp_path, "sst2")
    write_rows(tmp_path / "train.json", [])
    with pytest.raises(UserError, match=r"train\.jsonl, train\.json; keep one"):
        load_splits(TaskSpec(name="sst2", data_dir=str(tmp_path)))


def test_the_hub_is_asked_for_the_subset_and_the_labelled_split(monkeypatch):
    asked = []

    def read(source, *, subset=None, split="train"):
        asked.append((source, subset, split))
        raise UserError("enough")

    monkeypatch.setattr("zofo.tasks.families.table.read_table", read)
    for name in ("wsc", "trec"):
        with pytest.raises(UserError, match="enough"):
            load_splits(TaskSpec(name=name))
    assert asked == [("aps/super_glue", "wsc.fixed", "train"), ("CogComp/trec", None, "train")]
    assert {n: t.hub.test for n, t in BUILTIN.items() if t.hub.test != "validation"} == TEST_SPLIT


@pytest.mark.parametrize("key", ["1", "true", "yes"])
def test_verbalizers_by_number_truth_and_name(tmp_path, key):
    other = {"1": "0", "true": "false", "yes": "no"}[key]
    data = write_folder(tmp_path / "data", "boolq")
    spec = TaskSpec(name="boolq", data_dir=data, verbalizers={key: " Aye", other: " Nay"})
    assert load_splits(spec).train[0].candidates == (" Nay", " Aye")


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"verbalizers": {"entailment": "Yes"}}, "missing: not_entailment"),
        ({"verbalizers": {"maybe": "Yes", "entailment": "No"}}, "'maybe', not one of"),
        ({"template": "{text}"}, "names text; a row has premise, hypothesis"),
    ],
)
def test_prompts_that_are_wrong(tmp_path, options, words):
    data = write_folder(tmp_path / "data", "rte")
    with pytest.raises(UserError, match=words):
        load_splits(TaskSpec(name="rte", data_dir=data, **options))


@pytest.mark.parametrize("name", CHOOSING)
def test_every_option_that_is_said_to_be_used_is(tmp_path, name):
    data = write_folder(tmp_path / "data", name)
    values = {
        "data_dir": data,
        "template": f"Look: {{{BUILTIN[name].columns[0]}}}",
        "verbalizers": {str(i): f" w{i}" for i in range(len(BUILTIN[name].classes))},
        "objective": "gold",
    }
    assert used_options(name) <= values.keys()
    spec = TaskSpec(name=name, **{key: values[key] for key in used_options(name)})
    row = load_splits(spec).train[0]
    assert row.prompt.startswith("Look: ")
    if "verbalizers" in used_options(name):
        assert row.candidates[0] == " w0"
    with pytest.raises(UserError, match="does not use train"):
        load_splits(TaskSpec(name=name, data_dir=data, train="x.csv"))


@pytest.mark.parametrize(
    ("name", "num_rows", "sizes"),
    [
        # Each row gives the size of the hub's training split. The protocol's sizes apply where they
        # leave most rows for training.
        ("wsc", 554, (454, 100)),
        ("cb", 250, (150, 100)),
        ("copa", 400, (300, 100)),
        ("rte", 2490, (1000, 500)),
        ("wic", 5428, (1000, 500)),
        ("wsc", 30, (18, 12)),
    ],
)
def test_default_sizes_leave_most_rows_for_training(name, num_rows, sizes):
    row = examples(BUILTIN[name], read_one(name))[0]
    pool = [replace_text(row, i) for i in range(num_rows)]
    train, dev, _, _ = separate(
        pool,
        None,
        [replace_text(row, -1)],
        sizes=(None, None, None),
        limits=BUILTIN[name].sizes,
        seed=0,
    )
    assert (len(train), len(dev)) == sizes


def read_one(name):
    return Table([(1, make_row(name, 0))], "a row", {})


def replace_text(row, i):
    return replace(row, text=f"text {i}", group="")


@pytest.mark.parametrize("name", ["multirc", "winogrande", "wsc"])
def test_rows_of_one_group_are_trained_on_or_selected_on(tmp_path, name):
    data = write_folder(tmp_path / "data", name)
    splits = load_splits(TaskSpec(name=name, data_dir=data, num_dev=10))
    assert len(splits.dev) == 10
    assert not {row.group for row in splits.dev} & {row.group for row in splits.train}


def test_small_parts_are_remarked_on(tmp_path):
    data = write_folder(tmp_path / "data", "rte", num_train=60)
    notes = "\n".join(load_splits(TaskSpec(name="rte", data_dir=data, num_dev=45)).notes)
    assert "15 rows to train on and 45 to select on: lower task.num_dev" in notes
    assert "12 test rows: one is worth 8.3 points" in notes
    assert "test 6 / 6; always entailment is right in 50.0% of test" in notes
    quiet = load_splits(TaskSpec(name="rotten-tomatoes")).notes
    assert not any("to select on" in note or "is worth" in note for note in quiet)
