"""The preference pairs of a run, and how held-out pairs fare before, during and after it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import numpy as np

from zofo.config.schema import RunConfig
from zofo.run.rewards import table_of
from zofo.tasks.preference import PreferenceOptions
from zofo.tasks.rows import Table, read_table
from zofo.tasks.spec import Splits
from zofo.trainer.pairs import PairSource


class PairRows:
    """The pairs that a run learns from, and held-out ones.

    Args:
        config: of the run.
        splits: the rows of the task.
        tokenizer: the model's tokenizer.
        head: of the model.

    Raises:
        UserError: if a file is missing or lacks a column, or if no pair can be used.
    """

    def __init__(self, config: RunConfig, splits: Splits, tokenizer: Any, head: str) -> None:
        chosen = config.preference
        names = [field.name for field in fields(PreferenceOptions)]
        options = PreferenceOptions(**{name: getattr(chosen, name) for name in names})

        def source(table: Table) -> PairSource:
            columns = chosen.prompt, chosen.chosen, chosen.rejected
            return PairSource(
                table, tokenizer, options, seed=config.seed, head=head, columns=columns
            )

        train, held = _tables(config, splits)
        self.source = source(train)
        self.held = source(held) if held.rows else None
        self.notes = self.source.notes
        self.found: dict[str, dict[str, float]] = {}

    @property
    def arguments(self) -> dict[str, Any]:
        """Arguments of the trainer."""
        return {"preference_dataset": self.source}

    def check(self, model: Any) -> None:
        """Raise UserError if the model cannot read the held-out pairs."""
        if self.held is not None:
            self.held.check(model)

    def measure(self, model: Any, when: str) -> None:
        """Compare the held-out pairs "before" training, which is the reference, or "after" it."""
        if self.held is not None:
            if when == "before":
                self.held.measure_reference(model)
            self.found[when] = self.held.compare(model).figures()

    def at_evaluation(self, model: Any) -> dict[str, float]:
        """The figures of the held-out pairs during training."""
        is_measured = self.held is not None and "before" in self.found
        return self.held.compare(model).figures() if self.held and is_measured else {}

    def figures(self) -> dict[str, dict[str, dict[str, float]]]:
        """The figures before and after training, by the name of the rows."""
        return {"preference": self.found} if self.found else {}

    def write(self, folder: Path) -> None:
        """Write nothing: `result.json` has the figures."""


def _tables(config: RunConfig, splits: Splits) -> tuple[Table, Table]:
    """The rows to learn from, and those that are held out."""
    chosen, num = config.preference, config.preference.num_held_out
    if chosen.data is None:
        train = _part(table_of(config.task), [row.row for row in splits.train])
        held = _part(table_of(config.task, config.task.dev), [row.row for row in splits.dev[:num]])
        return train, held
    table = read_table(chosen.data)
    order = np.random.default_rng(config.seed).permutation([number for number, _ in table.rows])
    num = min(num, len(order) // 5)
    return _part(table, order[num:].tolist()), _part(table, order[:num].tolist())


def _part(table: Table, numbers: Sequence[int]) -> Table:
    rows = dict(table.rows)
    return replace(table, rows=[(number, rows[number]) for number in numbers])
