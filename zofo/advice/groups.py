r"""Rates by group of modules: proposed only where groups of the base are told apart.

All groups share one scalar s, so with rates η_g one step has, up to terms between groups,

    E f(x⁺) − f = −Σ_g η_g G_g + ½ E s² Σ_g η_g² τ_g         E s² of the whole block
    τ_g = tr H_gg / K + (1 + 1/K) κ_g (G_g + S_g / b) / E s²

since only the group's share of s goes with its own directions. It is least at
η_g = G_g / (E s² τ_g): a group with much gradient and little curvature may move more. The best
decrease is ½ Σ_g G_g² / (E s² τ_g); of one rate for all, ½ (Σ G_g)² / (E s² Σ τ_g). The first is
never the smaller (Cauchy-Schwarz).

G_g is a mean of few squares, less the rows' noise: G_g = mean s² − S_g / b. Resampling four squares
does not show how far their mean may be off, so an interval of η_g reaches at least as far as that
of a mean of n squared normals, χ²_n / n, does for mean s².

A group's name is a set of shell patterns, the names of its weights with numbers replaced by `*`, as
`base_lr` takes them.
"""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np

from zofo.advice.moments import CAUTION, Moments
from zofo.advice.rates import bend
from zofo.statistics.resampling import Interval, interval, quantile

_TAIL: Final = 0.01
"""Of a group's χ² interval on either side: with ten pairs of groups, one or two in a hundred false
splits."""
LARGEST_RATIO: Final = 30.0
"""Choice: rates farther apart than any grid in the literature rest on too few directions."""

_KINDS: Final = (
    ("embedding", r"embed|wte|wpe|shared"),
    ("head", r"(^|\.)(lm_head|classifier|score|pooler|qa_outputs)(\.|$)"),
    ("norm", r"norm|(^|\.)ln_"),
    ("attention", r"attn|attention"),
    ("mlp", r"mlp|ffn|feed_forward|intermediate|output\.dense|fc1|fc2|DenseReluDense"),
)

NUM_KINDS: Final = len(_KINDS) + 1


@dataclass(frozen=True)
class Split:
    """Rates of groups.

    Attributes:
        rates: pattern of names -> rate, as `base_lr` takes it; empty: one rate for all.
        groups: group -> best rate of a single step, with its interval.
        gain: best decrease of a step with a rate for each group over that with one rate.
        reason: why there is a split, or why not.
    """

    rates: dict[str, float]
    groups: dict[str, Interval]
    gain: float
    reason: str


def kind_of(name: str) -> str:
    """The group that a base weight belongs to: embedding, head, norm, attention, mlp or other."""
    lower = name if "DenseReluDense" in name else name.lower()
    return next((kind for kind, pattern in _KINDS if re.search(pattern, lower)), "other")


def pattern_of(name: str) -> str:
    """The name with the numbers of layers replaced by `*`."""
    return re.sub(r"(?<=\.)\d+(?=\.)", "*", name)


def groups_of(names: Sequence[str], *, smallest: int = 1) -> dict[str, list[str]]:
    """Names of base weights by kind.

    Args:
        names: canonical names.
        smallest: groups of fewer tensors join the largest.
    """
    found: dict[str, list[str]] = {}
    for name in names:
        found.setdefault(kind_of(name), []).append(name)
    largest = max(found, key=lambda kind: len(found[kind]))
    for kind in [k for k, v in found.items() if len(v) < smallest and k != largest]:
        found[largest] += found.pop(kind)
    return found


def patterns_of(groups: Mapping[str, Sequence[str]]) -> dict[str, str] | None:
    """Pattern -> group, such that each name's first match is its group's; None if that fails."""
    patterns: dict[str, str] = {}
    for group, names in groups.items():
        for name in names:
            patterns.setdefault(pattern_of(name), group)
    # A longer pattern says more.
    ordered = dict(sorted(patterns.items(), key=lambda item: (-len(item[0]), item[0])))
    used: set[str] = set()
    for group, names in groups.items():
        for name in names:
            first = next((p for p in ordered if fnmatch.fnmatchcase(name, p)), None)
            if first is None or ordered[first] != group:
                return None
            used.add(first)
    return {pattern: group for pattern, group in ordered.items() if pattern in used}


def split_rates(
    parts: Mapping[str, Moments],
    groups: Mapping[str, Sequence[str]],
    *,
    batch_rows: int,
    rate: float,
    num_directions: int = 1,
) -> Split:
    """One rate for each group if their best rates lie apart, else none.

    Args:
        parts: group -> its moments, measured alone.
        groups: group -> names.
        batch_rows: b.
        rate: of the block as a whole: the groups' are scaled so that the expected bend of a step,
            Σ η_g² τ_g, is that of this one rate.
        num_directions: K.
    """
    replicates = {name: part.replicates for name, part in parts.items()}
    sizes = {n: np.maximum(r[:, 0], 0) + r[:, 1] / batch_rows for n, r in replicates.items()}
    size = np.maximum(sum(sizes.values()), 1e-300)
    bends = {
        n: np.asarray(bend(r[:, 2], r[:, 3] * sizes[n] / size, num_directions))
        for n, r in replicates.items()
    }
    careful_bends = {n: max(quantile(b, CAUTION, parts[n].num), 1e-30) for n, b in bends.items()}
    intervals: dict[str, Interval] = {}
    for name, r in replicates.items():
        # As for the block: never below what the spread of the curvatures leaves open.
        scales = size * np.maximum(bends[name], careful_bends[name] / 2)
        rates_of_step = np.maximum(r[:, 0], 0) / scales
        found = interval(float(rates_of_step[0]), rates_of_step, parts[name].num)
        intervals[name] = _reach(found, parts[name], float(scales[0]))
    signals = {n: max(part.signal, 0.0) for n, part in parts.items()}
    apart = sum(signals[n] ** 2 / careful_bends[n] for n in parts)
    together = sum(signals.values()) ** 2 / sum(careful_bends.values())
    gain = apart / together if together > 0 else 1.0
    if len(parts) < 2:
        return Split({}, intervals, 1.0, "one group")
    told = [
        (low, high)
        for low in intervals
        for high in intervals
        if intervals[low].high < intervals[high].low
    ]
    if not told:
        return Split({}, intervals, gain, "the groups' intervals overlap")
    patterns = patterns_of(groups)
    if patterns is None:
        return Split({}, intervals, gain, "no patterns of names tell the groups apart")
    # A group without signal keeps a small rate, not 0: it may have one yet.
    raw = {n: signals[n] / careful_bends[n] for n in parts}
    least = max(raw.values()) / LARGEST_RATIO
    raw = {n: max(value, least) for n, value in raw.items()}
    bent = sum(raw[n] ** 2 * careful_bends[n] for n in parts)
    scale = rate * np.sqrt(sum(careful_bends.values()) / bent)
    rates = {pattern: float(raw[group] * scale) for pattern, group in patterns.items()}
    low, high = told[0]
    return Split(rates, intervals, gain, f"{low} and {high} lie apart")


def _reach(found: Interval, part: Moments, scale: float) -> Interval:
    """The hull of an interval of G / scale and of what a mean of squared normals leaves open."""
    from scipy.stats import chi2

    noise = part.row_noise / part.num_rows
    low, high = (
        max(part.mean_square * part.num / float(chi2.ppf(p, part.num)) - noise, 0.0) / scale
        for p in (1 - _TAIL, _TAIL)
    )
    return Interval(found.value, min(found.low, low), max(found.high, high))
