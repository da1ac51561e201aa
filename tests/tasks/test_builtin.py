import json

import pytest

from zofo.errors import UserError
from zofo.tasks import TaskSpec, load_splits


@pytest.mark.parametrize(
    ("name", "candidates"),
    [("rotten-tomatoes", (" terrible", " great")), ("boolq", (" No", " Yes"))],
)
def test_classification_tasks(name, candidates):
    splits = load_splits(TaskSpec(name=name, num_train=50, num_dev=20, num_test=30))
    assert [len(part) for part in (splits.train, splits.dev, splits.test)] == [50, 20, 30]
    assert splits.kind == "classification"
    assert {row.candidates for row in splits.train} == {candidates}
    golds = [row.gold for row in splits.train]
    assert 5 < sum(golds) < 45


def test_boolq_trains_on_none_of_its_test_questions():
    splits = load_splits(TaskSpec(name="boolq", num_train=5000, num_test=3000))
    tested = {row.text.split("\n")[1] for row in splits.test}
    assert not tested & {row.text.split("\n")[1] for row in (*splits.train, *splits.dev)}


def test_piqa_has_candidates_of_its_own_for_every_row():
    splits = load_splits(TaskSpec(name="piqa"))
    assert splits.kind == "choice"
    assert splits.labels == ()
    row = next(r for r in (*splits.train, *splits.dev, *splits.test) if "dresser" in r.prompt)
    assert row.prompt == "Goal: dresser\nSolution:"
    assert row.candidates[row.gold] == " finish, woodgrain with  bobby pin"


def test_sst2_from_a_folder(tmp_path):
    for part, start in (("train", 0), ("validation", 100)):
        rows = [{"sentence": f"film {i}", "label": i % 2} for i in range(start, start + 40)]
        text = "".join(json.dumps(row) + "\n" for row in rows)
        (tmp_path / f"{part}.jsonl").write_text(text)
    splits = load_splits(TaskSpec(name="sst2", data_dir=str(tmp_path), num_train=20, num_dev=10))
    assert {row.text for row in splits.test} == {f"film {i}" for i in range(100, 140)}
    assert splits.train[0].prompt.startswith("film")
    assert splits.train[0].prompt.endswith(" It was")


def test_sst2_from_a_folder_that_lacks_a_file(tmp_path):
    with pytest.raises(UserError, match=r"train\.jsonl does not exist"):
        load_splits(TaskSpec(name="sst2", data_dir=str(tmp_path)))
