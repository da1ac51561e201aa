"""A few rows of every built-in task in the columns of the hub, and folders of such rows."""

from __future__ import annotations

import json
from pathlib import Path

TEST_SPLIT = {"rotten-tomatoes": "test", "trec": "test", "agnews": "test"}
"""Tasks whose hub data have a labelled test split. The others use the validation split."""


def make_row(task: str, i: int) -> dict:
    """Return a row of the task. Every number gives another row."""
    label = i % 2
    wsc = f"Ann {i} told Bob that she won."
    return {
        "rotten-tomatoes": {"text": f"film {i}", "label": label},
        "sst2": {"sentence": f"film {i}", "label": label},
        "trec": {"text": f"What is film {i}?", "coarse_label": i % 6, "fine_label": 0},
        "agnews": {"text": f"News {i}", "label": i % 4},
        "rte": {"premise": f"Film {i} is great.", "hypothesis": f"{i} is.", "label": label},
        "cb": {"premise": f"Film {i} is great.", "hypothesis": f"{i} is", "label": i % 3},
        "boolq": {"question": f"is film {i} great", "passage": f"About {i}.", "answer": label == 1},
        "multirc": {
            "paragraph": f"Paragraph {i // 4}.",
            "question": f"What is {i}?",
            "answer": f"A film {i}",
            "idx": {"paragraph": i // 4, "question": i, "answer": 0},
            "label": label,
        },
        "wic": {"word": "film", "sentence1": f"A film {i}.", "sentence2": "Films.", "label": label},
        "wsc": {
            "text": wsc,
            "span1_index": 0,
            "span2_index": 5,
            "span1_text": "Ann",
            "span2_text": "she",
            "label": label,
        },
        "copa": {
            "premise": f"Film {i} was great.",
            "choice1": "Ann saw it.",
            "choice2": "It was long.",
            "question": ("cause", "effect")[label],
            "label": label,
        },
        "piqa": {"goal": f"see film {i}", "sol1": "go", "sol2": "stay", "label": label},
        "winogrande": {
            "sentence": f"Ann told Bob {i} times that _ is great.",
            "option1": f"Ann{i // 2}",
            "option2": "Bob",
            "answer": str(1 + label),
        },
    }[task]


def write_rows(path: Path, rows: list[dict]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def write_folder(
    folder: Path, task: str, *, num_train: int = 40, test: list[dict] | None = None
) -> str:
    """Write the files of a task: generated training rows, and given or generated test rows."""
    folder.mkdir(parents=True, exist_ok=True)
    write_rows(folder / "train.jsonl", [make_row(task, i) for i in range(num_train)])
    made = [make_row(task, i) for i in range(1000, 1012)]
    write_rows(folder / f"{TEST_SPLIT.get(task, 'validation')}.jsonl", test or made)
    return str(folder)
