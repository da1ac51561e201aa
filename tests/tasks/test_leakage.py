import pytest

from tests.support.hub_rows import write_folder, write_rows
from zofo.errors import UserError
from zofo.tasks.leakage import check_rows, check_tasks
from zofo.tasks.load import load_splits
from zofo.tasks.spec import TaskSpec


def check(trained, spec, seeds=(0, 0)):
    rows = load_splits(spec, seed=seeds[1]).test
    check_rows(trained.model_dump(), spec, rows, seeds=seeds)


@pytest.fixture
def reviews(tmp_path):
    path = tmp_path / "reviews.jsonl"
    write_rows(path, [{"text": f"it 's film {i} .", "label": i % 2} for i in range(60)])
    return TaskSpec(name="classification", train=str(path), num_dev=5, num_test=10)


@pytest.mark.parametrize("names", [("sst2", "rotten-tomatoes"), ("rotten-tomatoes", "sst2")])
def test_tasks_that_share_their_rows_are_refused_both_ways(names):
    with pytest.raises(UserError, match=f"trained on {names[0]}.*on {names[1]}: .*84%"):
        check_tasks(*names)
    check_tasks(names[0], names[0])
    check_tasks(names[0], "boolq")


def test_the_runs_own_test_rows_are_fine_however_they_are_shown(reviews):
    check(reviews, reviews)
    check(reviews, reviews.model_copy(update={"template": "{text}!", "max_length": 99}))
    check(reviews, reviews.model_copy(update={"num_test": 4}))


def test_another_seed_or_more_rows_bring_training_rows(reviews):
    with pytest.raises(UserError, match=r"of the 10 test rows are rows that the model was trained"):
        check(reviews, reviews, seeds=(0, 1))
    with pytest.raises(UserError, match=r"of the 30 test rows"):
        check(reviews, reviews.model_copy(update={"num_test": 30}))


def test_rows_of_another_file_are_compared_by_letters(tmp_path, reviews):
    trained_on = load_splits(reviews).train[0].text
    for name, text, is_seen in (
        ("same", trained_on.replace("it 's", "It's").replace(" .", "."), True),
        ("new", "it 's film 999 .", False),
    ):
        path = tmp_path / f"{name}.jsonl"
        write_rows(path, [{"text": "unheard of", "label": 0}, {"text": text, "label": 1}])
        spec = reviews.model_copy(update={"test": str(path), "num_test": None})
        if is_seen:
            with pytest.raises(UserError, match=r"1 of the 2 test rows .*\(rows 2\); remove them"):
                check(reviews, spec)
        else:
            check(reviews, spec)


def test_rows_of_another_task_are_compared(tmp_path, reviews):
    data = write_folder(tmp_path / "sst2", "sst2")
    trained = TaskSpec(name="sst2", data_dir=data)
    (tmp_path / "more.jsonl").write_text('{"text": "FILM 3", "label": 1}\n' * 2)
    more = reviews.model_copy(update={"test": str(tmp_path / "more.jsonl"), "num_test": None})
    with pytest.raises(UserError, match="2 of the 2 test rows"):
        check(trained, more)


def test_without_the_training_rows_only_known_pairs_are_refused(reviews):
    gone = reviews.model_copy(update={"train": "gone.jsonl"})
    check(gone, reviews)
