"""F1 and exact match of short answers, as SQuAD and DROP define them.

    SQuAD   A text is a list of lower-case words without punctuation and articles.
            precision = common / written,  recall = common / gold,  F1 = their harmonic mean
    DROP    An answer is a bag of spans. A span is a set of words, also split at hyphens; 5 is 5.0.
            The F1 of two spans is 0 if the gold span holds numbers and the spans share none.
            The F1 of two bags is that of the best one-to-one matching, summed over its pairs and
            divided by the larger number of spans.

Exact match requires the same normalised text (DROP: the same spans). With several gold answers,
each measure takes its best one.

Deviations: DROP's F1 is not rounded to two digits. Two SQuAD texts without words match, as in SQuAD
2.0. A generated text is one answer; for DROP, semicolons separate its spans.

References:
    Rajpurkar et al., "SQuAD: 100,000+ Questions for Machine Comprehension of Text", 2016;
    "Know What You Don't Know: Unanswerable Questions for SQuAD", 2018.
    Dua et al., "DROP: A Reading Comprehension Benchmark Requiring Discrete Reasoning Over
    Paragraphs", 2019.
"""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final, Literal

Measure = Literal["squad", "drop"]
SPAN_SEPARATOR: Final = "; "
"""Separates the spans of a training answer; a comma or "and" may be part of a span."""

_ARTICLES: Final = re.compile(r"\b(a|an|the)\b")
_NO_PUNCTUATION: Final = str.maketrans("", "", string.punctuation)


@dataclass(frozen=True)
class Answers:
    """The gold answers to one question.

    Attributes:
        gold: one or more answers, each a tuple of spans. An answer of SQuAD has one span.
        measure: the data set whose definitions apply.
    """

    gold: tuple[tuple[str, ...], ...]
    measure: Measure = "squad"

    def f1(self, text: str) -> float:
        """F1 of a generated text, in [0, 1]."""
        if self.measure == "squad":
            return max(squad_f1(text, spans[0]) for spans in self.gold)
        return max(drop_f1(_spans(text), spans) for spans in self.gold)

    def exact_match(self, text: str) -> float:
        """1 if a generated text is a gold answer, else 0."""
        if self.measure == "squad":
            return float(any(squad_words(text) == squad_words(spans[0]) for spans in self.gold))
        written = sorted(map(drop_words, _spans(text)))
        return float(any(written == sorted(map(drop_words, spans)) for spans in self.gold))

    @property
    def text(self) -> str:
        """The first gold answer as training text."""
        return SPAN_SEPARATOR.join(self.gold[0])


def squad_words(text: str) -> list[str]:
    """The words of a text after SQuAD's normalisation."""
    return _ARTICLES.sub(" ", text.lower().translate(_NO_PUNCTUATION)).split()


def squad_f1(text: str, gold: str) -> float:
    """SQuAD's F1 of two texts."""
    written, right = squad_words(text), squad_words(gold)
    if not written or not right:
        return float(written == right)
    return _harmonic((Counter(written) & Counter(right)).total(), len(written), len(right))


def drop_words(text: str) -> list[str]:
    """The words of a span after DROP's normalisation."""
    words = []
    for part in re.split(" |-", text.lower()):
        # A number keeps its decimal point; other words may become numbers without punctuation.
        word = part if _number(part) is not None else part.translate(_NO_PUNCTUATION)
        number = _number(word)
        words += [str(number)] if number is not None else _ARTICLES.sub(" ", word).split()
    return words


def drop_f1(spans: Sequence[str], gold: Sequence[str]) -> float:
    """DROP's F1 of two bags of spans."""
    from scipy.optimize import linear_sum_assignment

    written, right = ([set(drop_words(span)) for span in bag] for bag in (spans, gold))
    # [gold spans, written spans]
    table = [[_span_f1(words, wanted) for words in written] for wanted in right]
    rows, columns = linear_sum_assignment(table, maximize=True)
    matched = sum(table[i][j] for i, j in zip(rows, columns, strict=True))
    return float(matched) / max(len(written), len(right))


def _span_f1(written: set[str], right: set[str]) -> float:
    numbers = {word for word in right if _number(word) is not None}
    if numbers and not numbers & written:
        return 0.0
    if not written or not right:
        return float(written == right)
    return _harmonic(len(written & right), len(written), len(right))


def _harmonic(common: int, num_written: int, num_right: int) -> float:
    """2PR / (P + R), where precision P and recall R share the numerator `common`."""
    return 2 * common / (num_written + num_right)


def _number(word: str) -> float | None:
    try:
        return float(word)
    except ValueError:
        return None


def _spans(text: str) -> list[str]:
    """The spans of a generated answer: at least one, which may be empty."""
    return [span for span in text.split(SPAN_SEPARATOR.strip()) if span.strip()] or [""]
