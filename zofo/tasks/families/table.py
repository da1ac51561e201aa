"""The built-in tasks by name, and the sources of their rows.

    task.data_dir   if given: train.jsonl and validation.jsonl (test.jsonl if the hub's test split
                    has labels), or files of another supported format
    a package       if the task has one
    the hub         otherwise

Test rows are those of the hub's or the package's own split, and dev rows are carved from the
training rows. The packages of rotten-tomatoes and piqa have no test split, so their test rows are
carved, too.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Final

from zofo.errors import UserError
from zofo.tasks.families import choices, entailment, passages, questions, sentiment, topics, words
from zofo.tasks.families.family import BuiltinTask
from zofo.tasks.files import SUFFIXES
from zofo.tasks.rows import Table, read_table
from zofo.tasks.spec import TaskSpec

BUILTIN: Final[Mapping[str, BuiltinTask]] = {
    **sentiment.TASKS,
    **topics.TASKS,
    **entailment.TASKS,
    **questions.TASKS,
    **words.TASKS,
    **choices.TASKS,
    **passages.TASKS,
}


def builtin_tables(spec: TaskSpec) -> tuple[Table, Table | None]:
    """The rows to train on, and the test rows, or None if they must be carved from the former.

    Raises:
        UserError: if the package or files are missing.
    """
    task = BUILTIN[spec.name]
    if spec.data_dir is not None:
        folder = Path(spec.data_dir).expanduser()
        train, test = (read_table(str(part_file(folder, p))) for p in ("train", task.hub.test))
        return train, test
    if task.embedded is not None:
        return task.embedded.read()
    hub = task.hub
    train = read_table(hub.dataset, subset=hub.subset, split="train")
    return train, read_table(hub.dataset, subset=hub.subset, split=hub.test)


def part_file(folder: Path, part: str) -> Path:
    """The only file of a part of the data in a folder; raises UserError if it is not unique."""
    if not folder.is_dir():
        raise UserError(f"task.data_dir {folder} is no folder; give one that holds {part}.jsonl")
    found = [path for suffix in SUFFIXES if (path := folder / f"{part}{suffix}").is_file()]
    if not found:
        others = ", ".join(SUFFIXES[1:])
        raise UserError(f"task.data_dir {folder} holds no {part}.jsonl (or {others}); add it")
    if len(found) > 1:
        names = ", ".join(path.name for path in found)
        raise UserError(f"task.data_dir {folder} holds {names}; keep one of them")
    return found[0]
