"""Tests of F1 and exact match against values worked out from the definitions."""

import pytest

from zofo.tasks.answers import Answers, drop_f1, drop_words, squad_f1, squad_words


def squad(*answers):
    return Answers(tuple((answer,) for answer in answers))


def drop(*answers):
    return Answers(answers, "drop")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("The Cat.", ["cat"]),
        ("  an  apple, a day ", ["apple", "day"]),
        ("U.S.-based", ["usbased"]),
        ("Theatre another", ["theatre", "another"]),
        ("5.0", ["50"]),
        ("The", []),
        ("", []),
    ],
)
def test_squad_words(text, words):
    assert squad_words(text) == words


@pytest.mark.parametrize(
    ("text", "gold", "f1"),
    [
        ("in Paris", "Paris", 2 / 3),  # The precision is 1/2 and the recall is 1.
        ("the city of Paris, France", "Paris", 2 * (1 / 4) / (1 / 4 + 1)),
        # Words are counted: one red and one blue are common.
        ("red red blue", "red blue blue", 2 / 3),
        ("the", "a", 1.0),
        ("", "Paris", 0.0),
        ("Rome", "Paris", 0.0),
    ],
)
def test_squad_f1(text, gold, f1):
    assert squad_f1(text, gold) == pytest.approx(f1)


def test_the_best_gold_answer_counts_for_each_measure():
    answers = squad("Denver Broncos", "The Broncos!")
    assert answers.f1("broncos") == 1.0
    assert answers.exact_match("broncos") == 1.0
    assert answers.f1("Denver") == pytest.approx(2 / 3)
    assert answers.exact_match("Denver") == 0.0
    assert answers.f1("Panthers") == answers.exact_match("Panthers") == 0.0
    assert answers.text == "Denver Broncos"


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("5", ["5.0"]),
        ("5.50 yards", ["5.5", "yards"]),
        ("1,000", ["1000.0"]),
        ("$12", ["12.0"]),
        ("49-yard", ["49.0", "yard"]),
        ("the U.S. a", ["us"]),
        ("-", []),
    ],
)
def test_drop_words(text, words):
    assert drop_words(text) == words


@pytest.mark.parametrize(
    ("spans", "gold", "f1"),
    [
        (["49 yards"], ["49-yard"], 0.5),  # The bags of words are {49, yards} and {49, yard}.
        (["48-yard"], ["49-yard"], 0.0),  # The numbers differ, so the common word does not count.
        (["a 5 and 6"], ["5"], 2 * 1 / (3 + 1)),  # The bag of words is {5.0, and, 6.0}.
        (["Smith"], ["John Smith", "Lee"], (2 / 3) / 2),  # The second span is missing.
        (["Lee", "Smith John"], ["John Smith", "Lee"], 1.0),  # The order does not matter.
        (["Lee", "Lee"], ["Lee"], 0.5),  # There is one span too many.
        # Either Smith could take the first span. The best matching pairs both.
        (["Smith", "John Smith"], ["John Smith", "Smith"], 1.0),
        ([""], ["Lee"], 0.0),
        ([""], ["the"], 1.0),
    ],
)
def test_drop_f1(spans, gold, f1):
    assert drop_f1(spans, gold) == pytest.approx(f1)


def test_an_answer_of_spans_is_written_and_read_alike():
    answers = drop(("John Smith", "Los Angeles, California"), ("3",))
    assert answers.text == "John Smith; Los Angeles, California"
    assert answers.f1(answers.text) == answers.exact_match(answers.text) == 1.0
    assert answers.exact_match("los angeles california;the John Smith") == 1.0
    assert answers.exact_match("John Smith") == 0.0
    assert answers.f1("3.0") == answers.exact_match("3.0") == 1.0
    assert answers.f1("") == answers.f1("; ;") == 0.0
