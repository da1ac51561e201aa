"""The tables of sample answers: held-out prompts before and after training, and while training.

A page shows some rows, each with the whole text behind a short one, and says where all are.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from zofo.pages.tables import Cell, Column, Columns, Table, make_table
from zofo.results.answers import (
    ANSWERS_FILE,
    HELD_OUT_FILE,
    Answer,
    HeldOutSample,
    Sample,
    read_held_out,
    read_samples,
    reward_text,
)
from zofo.results.table import Runs

MAX_ROWS: Final = 12
_MAX_STEPS: Final = 6  # of training, from the first to the last
_MAX_SIDE: Final = 4  # runs side by side
_MAX_RUNS: Final = 12  # The page says how many further ones it leaves out.
_SHORT, _LONG = 160, 8_000  # characters


@dataclass(frozen=True)
class AnswerTable:
    """A table of sample answers.

    Attributes:
        runs: the runs whose answers it shows.
        table: the table.
        num_all: number of rows of the file that it shows some of.
        file: name of that file, in the folder of each run.
    """

    runs: tuple[str, ...]
    table: Table
    num_all: int
    file: str


def held_out_tables(runs: Runs, max_rows: int = MAX_ROWS) -> list[AnswerTable]:
    """Held-out prompts with the answers before and after training.

    Runs with equal prompts stand side by side.
    """
    alike: dict[tuple[str, ...], dict[str, Sequence[HeldOutSample]]] = {}
    for name, folder in runs_with_answers(runs)[:_MAX_RUNS]:
        found = read_held_out(folder)
        if found:
            alike.setdefault(tuple(sample.prompt for sample in found), {})[name] = found
    tables = []
    for prompts, of_runs in alike.items():
        names = list(of_runs)
        for first in range(0, len(names), _MAX_SIDE):
            part = {name: of_runs[name] for name in names[first : first + _MAX_SIDE]}
            table = make_table(_columns(part), range(min(len(prompts), max_rows)))
            tables.append(AnswerTable(tuple(part), table, len(prompts), HELD_OUT_FILE))
    return tables


def _columns(of_runs: Mapping[str, Sequence[HeldOutSample]]) -> Columns:
    first = next(iter(of_runs.values()))

    def cells(samples: Sequence[HeldOutSample], when: str) -> Any:
        return lambda i: _answer_cell(samples[i].answers.get(when))

    columns: dict[Column, Any] = {
        Column("prompt", "prompt", False): lambda i: _text_cell(first[i].prompt)
    }
    is_alone = len(of_runs) == 1
    olds = [[sample.answers.get("before") for sample in found] for found in of_runs.values()]
    is_shared = all(old == olds[0] for old in olds)  # as of one base with a new adapter
    if is_shared:
        columns[Column("before", "before", False)] = cells(first, "before")
    for i, (name, found) in enumerate(of_runs.items()):
        if not is_shared:
            columns[Column(f"before-{i}", f"{name}: before", False)] = cells(found, "before")
        title = "after" if is_alone else f"{name}: after"
        columns[Column(f"after-{i}", title, False)] = cells(found, "after")
    return columns


def sample_tables(runs: Runs) -> list[AnswerTable]:
    """Answers of some steps of training, from the first step to the last; a table for each run."""
    columns: Columns = {
        Column("step", "step"): lambda sample: Cell(f"{sample.step:,}", sample.step),
        Column("prompt", "prompt", False): lambda sample: _text_cell(sample.prompt),
        Column("answer", "answer", False): lambda sample: _text_cell(sample.answer.text),
        Column("reward", "reward"): lambda sample: Cell(
            reward_text(sample.answer.reward), sample.answer.reward
        ),
    }
    tables = []
    for name, folder in runs_with_answers(runs)[:_MAX_RUNS]:
        found = read_samples(folder)
        if found:
            table = make_table(columns, _spread(found))
            tables.append(AnswerTable((name,), table, len(found), ANSWERS_FILE))
    return tables


def _spread(samples: Sequence[Sample]) -> list[Sample]:
    """Samples of evenly spaced steps."""
    of_step: dict[int, list[Sample]] = {}
    for sample in samples:
        of_step.setdefault(sample.step, []).append(sample)
    steps = sorted(of_step)
    num = min(len(steps), _MAX_STEPS)
    places = {round(i * (len(steps) - 1) / max(num - 1, 1)) for i in range(num)}
    return [x for i in sorted(places) for x in of_step[steps[i]][: MAX_ROWS // _MAX_STEPS]]


def runs_with_answers(runs: Runs) -> list[tuple[str, Path]]:
    """Names and folders of the runs whose answers a report shows."""
    rows: list[Any] = list(runs.table.itertuples())
    return [
        (row.run, Path(row.folder))
        for row in rows
        if row.stage == "final"
        and row.status != "damaged"
        and any((Path(row.folder) / name).is_file() for name in (HELD_OUT_FILE, ANSWERS_FILE))
    ]


def num_left_out(runs: Runs) -> int:
    """Number of runs whose answers are not shown, because there are too many runs."""
    return max(0, len(runs_with_answers(runs)) - _MAX_RUNS)


def _answer_cell(answer: Answer | None) -> Cell:
    if answer is None:
        return Cell("", None)
    cell = _text_cell(answer.text)
    reward = f"reward {reward_text(answer.reward)}"
    return Cell(cell.text, answer.reward, reward, mark=cell.mark, more=cell.more)


def _text_cell(text: str) -> Cell:
    """A text on one line, cut to its beginning, with the text as it is behind it."""
    line = " ".join(text.split())
    short = line if len(line) <= _SHORT else line[: _SHORT - 1].rstrip() + "…"
    more = "" if short == text.strip() else text[:_LONG]
    if len(text) > _LONG:
        more += f"… ({len(text):,} characters in all)"
    return Cell(short or "(no text)", short, mark="answer", more=more)
