"""The gate: whether full fine-tuning leaves room for the base beside an adapter.

Hybrid moves the base beside the adapter. If full fine-tuning by the gradient (fo-ft, AdamW) is not
above the adapter alone (fo-peft) at the same cost, no estimate of the base's gradient is likely to
gain anything. The gate is the difference of both, fo-ft − fo-peft, over the seeds that both have.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, Literal

from zofo.results.comparison import Group
from zofo.results.table import Runs
from zofo.statistics.estimates import Difference, paired_difference

State = Literal["open", "closed", "undecided"]
_STATES: Final[Mapping[str, State]] = {"win": "open", "loss": "closed"}
_WORDS: Final[Mapping[State, str]] = {
    "open": "full fine-tuning scores higher than fo-peft there, so there is room for the base",
    "closed": "full fine-tuning itself scores lower than fo-peft there, so there is no room for "
    "the base, and the difference speaks neither for nor against hybrid",
    "undecided": "the interval of fo-ft − fo-peft holds 0 there, or has too few seeds",
}


@dataclass(frozen=True)
class Gate:
    """Full fine-tuning against fo-peft on one model and task.

    Attributes:
        full, fo_peft: the groups.
        difference: difference of the test accuracies, fo-ft − fo-peft.
        cost_ratio: mean forward-equivalents of fo-ft over those of fo-peft; None if not measured.
        state: "open" if the interval is above 0, "closed" if it is below, otherwise "undecided".
    """

    full: Group
    fo_peft: Group
    difference: Difference
    cost_ratio: float | None
    state: State


def gates_of(groups: Sequence[Group], runs: Runs) -> tuple[Gate, ...]:
    """The gate of each fo-peft group whose model and task have a group of fo-ft with AdamW.

    Args:
        groups: groups of runs; those that represent their cells count.
        runs: the runs of these groups.
    """
    accuracy: dict[Any, float] = runs.table.set_index("run")["accuracy"].dropna().to_dict()
    chosen = [group for group in groups if group.is_chosen]
    full = {(g.model, g.task): g for g in chosen if (g.method, g.optimizer) == ("fo-ft", "adamw")}
    gates = []
    for group in chosen:
        other = full.get((group.model, group.task))
        if group.method != "fo-peft" or other is None:
            continue
        of_full, of_peft = (
            {
                seed: accuracy[run]
                for seed, run in zip(g.seeds, g.runs, strict=True)
                if run in accuracy
            }
            for g in (other, group)
        )
        difference = paired_difference(of_full, of_peft)
        if difference is not None:
            costs = [g.costs["forward_equivalents"] for g in (other, group)]
            ratio = costs[0] / costs[1] if costs[0] is not None and costs[1] else None
            state = _STATES.get(difference.outcome, "undecided")
            gates.append(Gate(other, group, difference, ratio, state))
    return tuple(gates)


def notes_on_gates(gates: Sequence[Gate]) -> list[str]:
    """A sentence for each state, with the gates that are in it."""
    found = {state: [_name(g) for g in gates if g.state == state] for state in _WORDS}
    return [
        f"The gate is {state} on {'; '.join(names)}: {_WORDS[state]}."
        for state, names in found.items()
        if names
    ]


def _name(gate: Gate) -> str:
    group, estimate = gate.fo_peft, gate.difference.estimate
    text = f"{group.task} ({group.model}, {group.adapter}, {group.optimizer}), fo-ft − fo-peft "
    text += f"{100 * estimate.value:+.2f} points"
    if estimate.low == estimate.low:  # NaN without an interval
        text += f" [{100 * estimate.low:+.2f}, {100 * estimate.high:+.2f}]"
    return text
