import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from zofo.errors import UserError
from zofo.tasks.spec import Example
from zofo.tasks.splits import separate


def rows(texts):
    return [Example("", ("a", "b"), 0, text, i) for i, text in enumerate(texts, start=1)]


def texts(part):
    return {" ".join(row.text.casefold().split()) for row in part}


words = st.lists(st.sampled_from([f"Text {i}" for i in range(30)]), min_size=15, max_size=60)


@given(train=words, dev=st.none() | words, test=st.none() | words, seed=st.integers(0, 5))
def test_no_text_stands_in_two_parts(train, dev, test, seed):
    try:
        parts = separate(
            rows(train),
            None if dev is None else rows(dev),
            None if test is None else rows(test),
            sizes=(None, None, None),
            seed=seed,
        )[:3]
    except UserError as error:
        assert "left" in str(error)  # noqa: PT017
        return
    assert all(parts)
    assert not texts(parts[0]) & (texts(parts[1]) | texts(parts[2]))
    assert not texts(parts[1]) & texts(parts[2])


def test_the_test_rows_do_not_depend_on_the_other_sizes():
    pool = rows(f"t{i}" for i in range(100))
    small = separate(pool, None, None, sizes=(10, 5, 20), seed=1)
    large = separate(pool, None, None, sizes=(60, 20, 20), seed=1)
    assert small[2] == large[2]
    assert [len(part) for part in large[:3]] == [60, 20, 20]


def test_the_seed_decides():
    pool = rows(f"t{i}" for i in range(100))
    once, again, other = (separate(pool, None, None, sizes=(10, 5, 20), seed=s) for s in (1, 1, 2))
    assert once == again
    assert once[2] != other[2]


grouped = st.lists(st.tuples(st.integers(0, 9), st.integers(0, 400)), min_size=12, max_size=25)


@settings(max_examples=50)
@given(pairs=grouped, sizes=st.tuples(st.none(), st.integers(1, 4), st.integers(1, 4)))
def test_no_group_stands_in_two_parts(pairs, sizes):
    pool = [Example("", ("a",), 0, str(n), i, group=str(g)) for i, (g, n) in enumerate(pairs)]
    try:
        *parts, notes = separate(pool, None, None, sizes=sizes, seed=0)
    except UserError as error:
        assert "left" in str(error)  # noqa: PT017
        return
    train, dev, test = ({row.group for row in part} for part in parts)
    assert not train & (dev | test)
    assert not dev & test
    assert [len(part) for part in parts[1:]] == list(sizes[1:])
    num_dropped = sum(int(note.split()[0]) for note in notes)
    assert sum(map(len, parts)) + num_dropped == len(pool)


def test_limits_are_the_most_and_sizes_exact():
    pool = rows(f"t{i}" for i in range(50))
    limits = (1000, 500, 1000)
    parts = separate(pool, None, rows(["x", "y"]), sizes=(None, None, None), limits=limits, seed=0)
    assert [len(part) for part in parts[:3]] == [30, 20, 2]
    parts = separate(pool, None, rows(["x", "y"]), sizes=(5, 40, 1), limits=limits, seed=0)
    assert [len(part) for part in parts[:3]] == [5, 40, 1]


def test_a_carved_dev_has_the_asked_size_though_test_shares_rows():
    pool = rows(f"t{i}" for i in range(30))
    parts = separate(pool, None, rows(["T3", "t4"]), sizes=(None, 20, None), seed=0)
    assert [len(part) for part in parts[:3]] == [8, 20, 2]
    assert parts[3] == ("2 training rows dropped: also in dev or test",)


def test_what_is_dropped_is_said():
    parts = separate(
        rows(["a", "b", "c", "d", "E "]),
        rows(["e", "f", "x"]),
        rows(["f", "A"]),
        sizes=(None, None, None),
        seed=0,
    )
    assert texts(parts[0]) == {"b", "c", "d"}
    assert texts(parts[1]) == {"e", "x"}
    assert [note.split(" rows")[0].split(" ")[0] for note in parts[3]] == ["1", "2"]


@pytest.mark.parametrize(
    ("sizes", "words"),
    [((50, 5, 5), "num_train is 50"), ((5, 5, 40), "test"), ((5, 30, 5), "dev")],
)
def test_more_rows_than_there_are(sizes, words):
    with pytest.raises(UserError, match=words):
        separate(rows(f"t{i}" for i in range(30)), None, None, sizes=sizes, seed=0)
