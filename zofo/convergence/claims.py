"""The claims, as a table, and what the measurements say of each.

An exponent has candidates. It is decided for one if the whole interval lies nearer to it than to
any other, no further from it than a third of the way to the next; then the claim is confirmed, if
that is the candidate it names, or refuted. A number has a range: confirmed if the interval lies
within, refuted if it lies without. All else is undecided at this scale, with the reason.

The theorem's conditions are sufficient ones. A cap on a rate is "refuted" here when runs do not
need it on these problems; that is no counter-example to the theorem.
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
"""Of the way to the next candidate."""


@dataclass(frozen=True)
class Claim:
    """A statement and how it is tested.

    Attributes:
        name: for machines.
        experiment: that it is read from.
        statement: in words.
        source: where it comes from.
        measure: a function of `zofo.convergence.measures`.
        options: of the measure, beside the experiment.
        candidates: name -> exponent; empty for a range.
        claimed: name of the candidate, or the range (low, high).
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
    """A claim and what was found.

    Attributes:
        claim: it.
        measured: the number.
        outcome: confirmed, refuted, undecided at this scale.
        reason: in words.
    """

    claim: Claim
    measured: Measured
    outcome: str
    reason: str


def judge(claim: Claim, found: Interval) -> tuple[str, str]:
    """Outcome and reason."""
    if found.note:
        return UNDECIDED, found.note
    if not np.isfinite([found.value, found.low, found.high]).all():
        return UNDECIDED, "not measured"
    if isinstance(claim.claimed, tuple):
        low, high = claim.claimed
        if low <= found.low and found.high <= high:
            return CONFIRMED, f"the interval lies within {_range(low, high)}"
        if found.high < low or found.low > high:
            return REFUTED, f"the interval lies outside of {_range(low, high)}"
        return UNDECIDED, f"the interval reaches over an end of {_range(low, high)}"
    names, values = [*claim.candidates], np.array([*claim.candidates.values()])
    ends = np.array([found.low, found.high])
    nearest = np.abs(values[:, None] - ends).argmin(0)
    if nearest[0] != nearest[1]:
        between = " and ".join(names[i] for i in sorted({*map(int, nearest)}))
        return UNDECIDED, f"the interval does not tell {between} apart"
    i = int(nearest[0])
    gap = np.abs(np.delete(values, i) - values[i]).min()
    off = np.abs(ends - values[i]).max()
    if off > _SHARE * gap:
        return UNDECIDED, f"nearest to {names[i]}, but off by up to {off:.2f}"
    outcome = CONFIRMED if names[i] == claim.claimed else REFUTED
    return outcome, f"{names[i]}, off by at most {off:.2f}"


def _range(low: float, high: float) -> str:
    if np.isinf(high):
        return f"what is above {low:g}"
    if np.isinf(low):
        return f"what is below {high:g}"
    return f"{low:.3g} to {high:.3g}"


def findings(study: Study, claims: Sequence[Claim]) -> list[Finding]:
    """Every claim whose cells are there."""
    found = []
    for claim in claims:
        if not study.find(claim.experiment, {}):
            continue
        measured = claim.measure(study, experiment=claim.experiment, **claim.options)
        outcome, reason = judge(claim, measured.interval)
        found.append(Finding(claim, measured, outcome, reason))
    return found
