"""Whether a hypothesis follows from a premise: RTE and CB.

RTE (Dagan et al., 2005) and CB (De Marneffe et al., 2019) as in SuperGLUE (Wang et al., 2019).
Prompts are MeZO's (Malladi et al., 2023).
"""

from __future__ import annotations

from typing import Final

from zofo.tasks.families.family import BuiltinTask, Hub

TASKS: Final = {
    "rte": BuiltinTask(
        description="does the premise entail the hypothesis",
        hub=Hub("aps/super_glue", "rte"),
        columns=("premise", "hypothesis"),
        classes=("entailment", "not_entailment"),
        template='{premise}\nDoes this mean that "{hypothesis}" is true? Yes or No?\n',
        words=("Yes", "No"),
        texts=("{premise}", "{hypothesis}"),
    ),
    "cb": BuiltinTask(
        description="does the premise entail or contradict the hypothesis, or neither",
        hub=Hub("aps/super_glue", "cb"),
        columns=("premise", "hypothesis"),
        classes=("entailment", "contradiction", "neutral"),
        template='Suppose {premise} Can we infer that "{hypothesis}"? Yes, No, or Maybe?\n',
        words=("Yes", "No", "Maybe"),
        texts=("{premise}", "{hypothesis}"),
        # CB has 250 rows, so 500 dev rows do not exist; 100 leave 150 to train on.
        sizes=(1000, 100, 1000),
    ),
}
