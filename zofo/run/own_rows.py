"""The rows that a run has beside its examples: prompts with rewards, or preference pairs."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from zofo.config.schema import RunConfig
from zofo.run.pairs import PairRows
from zofo.run.rewards import RewardRows
from zofo.tasks.spec import Splits


class NoRows:
    """The run has only examples."""

    notes: tuple[str, ...] = ()

    @property
    def arguments(self) -> dict[str, Any]:
        """Arguments of the trainer."""
        return {}

    def check(self, model: Any) -> None:
        """Accept any model, where the others refuse one that cannot read held-out rows."""

    def measure(self, model: Any, when: str) -> None:
        """Measure nothing, where the others measure held-out rows before and after training."""

    def at_evaluation(self, model: Any) -> dict[str, float]:
        """What an evaluation adds to the log."""
        return {}

    def figures(self) -> Mapping[str, Mapping[str, Mapping[str, float | None]]]:
        """The figures of held-out rows before and after training, by the name of the rows."""
        return {}

    def write(self, folder: Path) -> None:
        """Write nothing, where the others may write files of the run folder."""


OwnRows = NoRows | RewardRows | PairRows


def own_rows(config: RunConfig, splits: Splits, tokenizer: Any, head: str) -> OwnRows:
    """The rows of a run.

    Raises:
        UserError: if they cannot be read or used.
    """
    if config.zo_objective == "preference":
        return PairRows(config, splits, tokenizer, head)
    if config.reward.functions is not None:
        return RewardRows(config, splits, tokenizer, head)
    return NoRows()
