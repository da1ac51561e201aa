"""Topics of news (AG News) and types of questions (TREC).

AG News (Zhang et al., 2015) and TREC (Li and Roth, 2002) have labelled test splits. The templates
are ours, because a decoder writes its answer at the end of the prompt. TREC's words are those of
LM-BFF (Gao et al., 2021), which MeZO uses for masked models.
"""

from __future__ import annotations

from typing import Final

from zofo.tasks.families.family import BuiltinTask, Hub

TASKS: Final = {
    "trec": BuiltinTask(
        description="what a question asks for",
        hub=Hub("CogComp/trec", test="test"),
        columns=("text",),
        labels=("coarse_label",),
        classes=("ABBR", "ENTY", "DESC", "HUM", "LOC", "NUM"),
        template="{text}\nAnswer type:",
        words=(" Expression", " Entity", " Description", " Human", " Location", " Number"),
        texts=("{text}",),
    ),
    "agnews": BuiltinTask(
        description="topic of a news item",
        hub=Hub("fancyzhx/ag_news", test="test"),
        columns=("text",),
        classes=("World", "Sports", "Business", "Sci/Tech"),
        template="{text}\nTopic:",
        words=(" World", " Sports", " Business", " Technology"),
        texts=("{text}",),
    ),
}
