import pytest
from hypothesis import given
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
