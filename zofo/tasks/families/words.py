"""Words in context: WiC and WSC.

Whether a word means the same in two sentences (Pilehvar and Camacho-Collados, 2019), and whether a
pronoun refers to a noun (Levesque et al., 2012), as in SuperGLUE (Wang et al., 2019). Prompts are
MeZO's (Malladi et al., 2023); they name the word, the noun and the pronoun. A pronoun may occur
several times, so encoders read WSC's text with both spans marked in place, as in T5 (Raffel et al.,
2020). Your own template may name this text as {marked}.
"""

from __future__ import annotations

from typing import Final

from zofo.tasks.families.family import BuiltinTask, Hub, Row
from zofo.tasks.rows import text_in


def _marked(row: Row) -> dict[str, str]:
    """The text with *noun* and _pronoun_; the row gives their positions as word indices from 0."""
    words = text_in(row, "text").split()
    for span, mark in (("span1", "*"), ("span2", "_")):
        start = _number_in(row, f"{span}_index", len(words))
        last = start + len(text_in(row, f"{span}_text").split()) - 1
        last = min(last, len(words) - 1)
        # Punctuation attached to the last word of a span stays outside the mark.
        end = words[last].rstrip(".,;:!?\"'")
        words[last] = f"{end}{mark}{words[last][len(end) :]}"
        words[start] = mark + words[start]
    return {"marked": " ".join(words), "pronoun": text_in(row, "span2_text").lower()}


def _number_in(row: Row, column: str, end: int) -> int:
    try:
        number = int(row[column])
    except (TypeError, ValueError):
        raise ValueError(f"{column!r} is {row[column]!r}, not the number of a word") from None
    if not 0 <= number < end:
        raise ValueError(f"{column!r} is {number}; the text has the words 0 to {end - 1}")
    return number


TASKS: Final = {
    "wic": BuiltinTask(
        description="does a word mean the same in two sentences",
        hub=Hub("aps/super_glue", "wic"),
        columns=("word", "sentence1", "sentence2"),
        classes=("no", "yes"),
        template='Does the word "{word}" have the same meaning in these two sentences? Yes, No?\n'
        "{sentence1}\n{sentence2}\n",
        words=("No", "Yes"),
        texts=("{word}: {sentence1}", "{word}: {sentence2}"),
    ),
    "wsc": BuiltinTask(
        description="does a pronoun refer to a noun",
        hub=Hub("aps/super_glue", "wsc.fixed"),
        columns=("text", "span1_text", "span2_text", "span1_index", "span2_index"),
        classes=("no", "yes"),
        template='{text}\nIn the previous sentence, does the pronoun "{pronoun}" refer to '
        "{span1_text}? Yes or No?\n",
        words=("No", "Yes"),
        texts=("{marked}", "{span2_text} refers to {span1_text}"),
        # Of 554 rows, the usual 500 dev rows would leave only 54 to train on.
        sizes=(1000, 100, 1000),
        derive=_marked,
        group="{text}",
    ),
}
