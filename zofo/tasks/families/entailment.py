"""Whether a hypothesis follows from a premise: RTE and CB.

RTE (Dagan et al., 2005) and CB (De Marneffe et al., 2019) as in SuperGLUE (Wang et al., 2019).
Prompts are MeZO's (Malladi et al., 2023).
"""

from __future__ import annotations

from typing import Any, Final

from zofo.tasks.families.family import BuiltinTask, Hub

_PAIR: Final[dict[str, Any]] = {
    "columns": ("premise", "hypothesis"),
    "texts": ("{premise}", "{hypothesis}"),
}
TASKS: Final = {
    "rte": BuiltinTask(
        description="does the premise entail the hypothesis",
        hub=Hub("aps/super_glue", "rte"),
        classes=("entailment", "not_entailment"),
        template='{premise}\nDoes this mean that "{hypothesis}" is true? Yes or No?\n',
        words=("Yes", "No"),
        sizes=(1000, 500, 1000),
        **_PAIR,
    ),
    "cb": BuiltinTask(
        description="does the premise entail or contradict the hypothesis, or neither",
        hub=Hub("aps/super_glue", "cb"),
        classes=("entailment", "contradiction", "neutral"),
        template='Suppose {premise} Can we infer that "{hypothesis}"? Yes, No, or Maybe?\n',
        words=("Yes", "No", "Maybe"),
        # 250 rows: the protocol's 500 for dev do not exist, 100 leave 150.
        sizes=(1000, 100, 1000),
        **_PAIR,
    ),
}
