"""The claims, and the rule that decides what the measurements say about each.

An exponent has candidates. It is assigned to a candidate if the whole interval is nearer to that
candidate than to any other, and within a third of the distance to the next. The claim is then
confirmed if it names this candidate, and refuted otherwise. A number has a range. Its claim is
confirmed if the interval lies within the range, and refuted if it lies outside. All other claims
are undecided at this scale, with a reason.

The theorem's conditions are sufficient. A cap on a rate is "refuted" here if runs do not need it on
these problems. This is not a counter-example to the theorem.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final, Literal

import numpy as np

from zofo.convergence.measures import Measured, Study
from zofo.statistics.resampling import Interval

Outcome = Literal["confirmed", "refuted", "undecided at this scale"]
CONFIRMED: Final = "confirmed"
REFUTED: Final = "refuted"
UNDECIDED: Final = "undecided at this scale"
PAPER: Final = "arXiv 2604.09940, theorem"
MKR: Final = "Mishchenko, Khaled, Richtárik, arXiv 2006.05988"
OURS: Final = "derived in docs/explain/theory.md"
_SHARE: Final = 1 / 3
"""Largest share of the distance to the next candidate."""


@dataclass(frozen=True)
class Claim:
    """A statement and its test.

    Attributes:
        name: identifier.
        experiment: the experiment that tests it.
        statement: the statement in words.
        source: where the statement comes from.
        measure: a function of `zofo.convergence.measures`, `epochs` or `radius`.
        options: keyword arguments of the measure, besides the experiment.
        claimed: name of the claimed candidate, or the claimed range (low, high).
        candidates: name -> exponent; empty for a range.
    """

    name: str
    experiment: str
    statement: str
    source: str
    measure: Callable[..., Measured]
    options: Mapping[str, Any]
    claimed: str | tuple[float, float]
    candidates: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Finding:
    """A claim, what was measured, and what follows, with the reason in words."""

    claim: Claim
    measured: Measured
    outcome: str
    reason: str


def judge(claim: Claim, found: Interval) -> tuple[str, str]:
    """Outcome and reason of a claim, given the measured interval."""
    if found.note:  # the note says why the number cannot be trusted
        return UNDECIDED, found.note
    if not np.isfinite([found.value, found.low, found.high]).all():
        return UNDECIDED, "not measured"
    if isinstance(claim.claimed, tuple):
        low, high = claim.claimed
        if low <= found.low and found.high <= high:
            return CONFIRMED, f"the interval lies within {_range(low, high)}"
        if found.high < low or found.low > high:
            return REFUTED, f"the interval lies outside {_range(low, high)}"
        return UNDECIDED, f"the interval crosses an end of {_range(low, high)}"
    names, values = [*claim.candidates], np.array([*claim.candidates.values()])
    ends = np.array([found.low, found.high])
    nearest = np.abs(values[:, None] - ends).argmin(0)  # nearest candidate of each end, [2]
    if nearest[0] != nearest[1]:
        between = " and ".join(names[i] for i in sorted({*map(int, nearest)}))
        return UNDECIDED, f"the interval does not separate {between}"
    i = int(nearest[0])  # both ends have the same nearest candidate
    gap = np.abs(np.delete(values, i) - values[i]).min()
    off = np.abs(ends - values[i]).max()
    if off > _SHARE * gap:
        return UNDECIDED, f"{names[i]} is nearest, but it is off by up to {off:.2f}"
    outcome = CONFIRMED if names[i] == claim.claimed else REFUTED
    return outcome, f"{names[i]}, off by at most {off:.2f}"


def _range(low: float, high: float) -> str:
    if np.isinf(high):
        return f"values above {low:g}"
    if np.isinf(low):
        return f"values below {high:g}"
    return f"{low:.3g} to {high:.3g}"


def findings(study: Study, claims: Sequence[Claim]) -> list[Finding]:
    """Judge every claim whose cells are present."""
    found = []
    for claim in claims:
        if not study.find(claim.experiment, {}):
            continue
        measured = claim.measure(study, experiment=claim.experiment, **claim.options)
        outcome, reason = judge(claim, measured.interval)
        found.append(Finding(claim, measured, outcome, reason))
    return found
