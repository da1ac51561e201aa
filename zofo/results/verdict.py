"""The verdict on hybrid against fo-peft: one sentence with its interval, and its limits."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from zofo.results.comparison import COSTS, Pair
from zofo.results.gate import Gate, notes_on_gates
from zofo.statistics.estimates import Estimate, mean_over_pairs, outcome_of

_COST_WORDS = {
    "forward_equivalents": "forward-equivalents",
    "train_s": "seconds of training",
    "peak_memory_bytes": "peak memory",
    "artifact_bytes": "bytes to store",
}


@dataclass(frozen=True)
class Verdict:
    """The result of all pairs together.

    Attributes:
        outcome: "higher" or "lower" test accuracy of hybrid; "undecided" if the interval contains 0
            or if there is no interval; "none" if there are no pairs.
        sentence: the outcome in words, with interval and number of seeds.
        notes: costs, outcomes of the pairs, room for the base, and the limits of the sentence.
        estimate: mean of the pairs' mean differences.
        counts: win, tie, loss or undecided -> number of pairs.
    """

    outcome: Literal["higher", "lower", "undecided", "none"]
    sentence: str
    notes: tuple[str, ...]
    estimate: Estimate | None
    counts: dict[str, int]


def judge(pairs: Sequence[Pair], gates: Sequence[Gate] = ()) -> Verdict:
    """The verdict on hybrid against fo-peft, which claims no more than the interval supports.

    Args:
        pairs: hybrid and fo-peft.
        gates: fo-ft and fo-peft, which say whether there is room for the base.
    """
    room = notes_on_gates(gates)
    if not pairs:
        sentence = (
            "Nothing to compare yet: no hybrid and fo-peft runs of one model, task, adapter, "
            "optimizer and seed have both finished."
        )
        return Verdict("none", sentence, tuple(room), None, {})
    # For the same seed all pairs of a task use the same rows, whatever their model and adapter.
    estimate = mean_over_pairs([pair.values for pair in pairs], [p.hybrid.task for p in pairs])
    counts = Counter(pair.difference.outcome for pair in pairs)
    found = f"{100 * estimate.value:+.2f} points of test accuracy"
    if not math.isnan(estimate.low):
        found += f", 95% interval [{100 * estimate.low:+.2f}, {100 * estimate.high:+.2f}],"
    found += f" {_over(pairs)}"
    outcome: Literal["higher", "lower", "undecided"] = "undecided"
    result = outcome_of(estimate)
    if result in ("win", "loss"):
        outcome = "higher" if result == "win" else "lower"
        sentence = f"Hybrid scored {outcome} than fo-peft: {found}."
    else:
        reason = "The interval holds 0" if result == "tie" else "Too few seeds for an interval"
        sentence = f"Undecided: hybrid − fo-peft is {found}. {reason}."
    closed = {id(gate.fo_peft) for gate in gates if gate.state == "closed"}
    if all(id(pair.fo_peft) in closed for pair in pairs):
        sentence += " There is no room for the base here: full fine-tuning is below fo-peft."
    all_counts = {name: counts.get(name, 0) for name in ("win", "tie", "loss", "undecided")}
    notes = (*room, *_notes(pairs, all_counts))
    return Verdict(outcome, sentence, notes, estimate, all_counts)


def _notes(pairs: Sequence[Pair], counts: dict[str, int]) -> list[str]:
    notes, spent = [], []
    for cost in COSTS:
        ratios = [r for pair in pairs if (r := pair.cost_ratios[cost]) is not None]
        if ratios:
            spent.append(f"{_range(ratios, '.2f')}× the {_COST_WORDS[cost]}")
    if spent:
        notes.append(f"Hybrid took {_joined(spent)} of fo-peft.")
    # With many intervals of 95%, some exclude 0 by chance, so the note says how many to expect.
    if len(pairs) > 1:
        notes.append(
            f"Pair by pair: {counts['win']} won, {counts['loss']} lost, {counts['tie']} tied (the "
            f"interval holds 0), {counts['undecided']} undecided (too few seeds). By chance alone "
            f"one pair in twenty is won or lost."
        )
    guessing = [pair for pair in pairs if _is_guessing(pair)]
    if guessing:
        where = _joined([_name(pair) for pair in guessing])
        notes.append(
            f"On {where} neither method reaches more than the majority rate: there the difference "
            "is one between guesses."
        )
    rows = [float(pair.hybrid.num_test) for pair in pairs if pair.hybrid.num_test]
    if rows:
        one = [100 / num for num in (max(rows), min(rows))]
        notes.append(
            f"Intervals are over seeds. A score is over {_range(rows, '.0f')} test rows: one row "
            f"is {_range(one, '.2f')} points."
        )
    return notes


def _is_guessing(pair: Pair) -> bool:
    majority = pair.hybrid.majority
    return majority is not None and all(
        group.accuracy is not None and group.accuracy.value <= majority
        for group in (pair.hybrid, pair.fo_peft)
    )


def _over(pairs: Sequence[Pair]) -> str:
    """The pairs and the number of their seeds, in words."""
    seeds = [len(pair.difference.seeds) for pair in pairs]
    num = _range([float(s) for s in seeds], ".0f")
    word = "seed" if max(seeds) == 1 else "seeds"
    if len(pairs) == 1:
        return f"on {_name(pairs[0])} over {num} {word}"
    return f"on average over {len(pairs)} pairs with {num} {word} each"


def _name(pair: Pair) -> str:
    group = pair.hybrid
    return f"{group.task} ({group.model}, {group.adapter}, {group.optimizer})"


def _range(values: Sequence[float], form: str) -> str:
    low, high = f"{min(values):{form}}", f"{max(values):{form}}"
    return low if low == high else f"{low} to {high}"


def _joined(parts: Sequence[str]) -> str:
    return parts[0] if len(parts) == 1 else f"{', '.join(parts[:-1])} and {parts[-1]}"
