"""One learning rate per group of modules, if the groups of the base differ measurably.

All groups share one scalar s. With rates η_g, one step has, except for terms between groups,

    E f(x⁺) − f = −Σ_g η_g G_g + ½ E s² Σ_g η_g² τ_g         E s² of the whole block
    τ_g = tr H_gg / K + (1 + 1/K) κ_g (G_g + S_g / b) / E s²

because only the group's own share of s is correlated with its directions. D directions that rows
share count as K = E s² / (G / D + S / b). The best rates are η_g = G_g / (E s² τ_g): a group with a
large gradient and little curvature may move more. The best decrease is ½ Σ_g G_g² / (E s² τ_g) with
one rate per group, and ½ (Σ G_g)² / (E s² Σ τ_g) with one rate for all. The first is at least as
large (Cauchy-Schwarz).

G_g is the mean of a few squares minus the noise of the rows: G_g = mean s² − S_g / b. Resampling
four squares understates how far their mean may be wrong. The interval of η_g therefore reaches at
least as far as the interval that χ²_n / n, the mean of n squared standard normals, gives for mean
s².

A group is written as shell patterns, as `base_lr` takes them: the names of its weights with `*` in
place of numbers.
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
"""Probability in each tail of a group's χ² interval. With ten pairs of groups it gives one or two
false splits in a hundred."""
LARGEST_RATIO: Final = 30.0
"""A choice: larger ratios of rates than in any grid in the literature would rest on too few
directions."""

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
    """Rates per group.

    Attributes:
        rates: pattern of names -> rate, as `base_lr` takes it; empty if one rate serves all.
        groups: group -> best rate of a single step, with its interval.
        gain: best decrease of a step with one rate per group, relative to one rate for all.
        reason: why the rates are split or not.
    """

    rates: dict[str, float]
    groups: dict[str, Interval]
    gain: float
    reason: str


def kind_of(name: str) -> str:
    """The group of a base weight: embedding, head, norm, attention, mlp or other."""
    # T5 calls its feed-forward module DenseReluDense. All other patterns are in lower case.
    lower = name if "DenseReluDense" in name else name.lower()
    return next((kind for kind, pattern in _KINDS if re.search(pattern, lower)), "other")


def pattern_of(name: str) -> str:
    """The name with `*` in place of layer numbers."""
    return re.sub(r"(?<=\.)\d+(?=\.)", "*", name)


def groups_of(names: Sequence[str]) -> dict[str, list[str]]:
    """Group -> canonical names of its base weights."""
    found: dict[str, list[str]] = {}
    for name in names:
        found.setdefault(kind_of(name), []).append(name)
    return found


def patterns_of(groups: Mapping[str, Sequence[str]]) -> dict[str, str] | None:
    """Pattern -> group, such that the first match of each name is its own group, or None."""
    patterns: dict[str, str] = {}
    for group, names in groups.items():
        for name in names:
            patterns.setdefault(pattern_of(name), group)
    # Longer patterns come first, because they are more specific.
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
    by_rows: bool = False,
) -> Split:
    """Give each group its own rate if the best rates of two groups differ measurably.

    Args:
        parts: group -> its moments, measured alone.
        groups: group -> names of its weights.
        batch_rows: b.
        rate: rate of the whole block. The groups' rates are scaled so that the expected curvature
            term of a step, Σ η_g² τ_g, equals that of this one rate.
        num_directions: K, or D with `by_rows`.
        by_rows: whether the rows of a batch share the directions in turn.
    """
    replicates = {name: part.replicates for name, part in parts.items()}
    sizes = {n: np.maximum(r[:, 0], 0) + r[:, 1] / batch_rows for n, r in replicates.items()}
    size = np.maximum(sum(sizes.values()), 1e-300)  # E s² of the whole block, [resamples]
    num: int | np.ndarray = num_directions
    if by_rows:
        noise = np.asarray(sum(r[:, 1] for r in replicates.values())) / batch_rows
        num = size / np.maximum((size - noise) / num_directions + noise, 1e-300)
    bends = {
        n: np.asarray(bend(r[:, 2], r[:, 3] * sizes[n] / size, num)) for n, r in replicates.items()
    }
    careful_bends = {n: max(quantile(b, CAUTION, parts[n].num), 1e-30) for n, b in bends.items()}
    intervals: dict[str, Interval] = {}
    for name, r in replicates.items():
        # As for the whole block, the interval of the curvature guards against underestimates.
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
    separated = [
        (low, high)
        for low in intervals
        for high in intervals
        if intervals[low].high < intervals[high].low
    ]
    if not separated:
        return Split({}, intervals, gain, "the groups' intervals overlap")
    patterns = patterns_of(groups)
    if patterns is None:
        return Split({}, intervals, gain, "no patterns of names separate the groups")
    # A group without signal keeps a small rate, because a signal may appear during training.
    raw = {n: signals[n] / careful_bends[n] for n in parts}
    least = max(raw.values()) / LARGEST_RATIO
    raw = {n: max(value, least) for n, value in raw.items()}
    bent = sum(raw[n] ** 2 * careful_bends[n] for n in parts)
    scale = rate * np.sqrt(sum(careful_bends.values()) / bent)
    rates = {pattern: float(raw[group] * scale) for pattern, group in patterns.items()}
    low, high = separated[0]
    return Split(rates, intervals, gain, f"the intervals of {low} and {high} do not overlap")


def _reach(found: Interval, part: Moments, scale: float) -> Interval:
    """Widen an interval of G / scale to the interval that a mean of squared normals has."""
    from scipy.stats import chi2

    noise = part.row_noise / part.num_rows
    low, high = (
        max(part.mean_square * part.num / float(chi2.ppf(p, part.num)) - noise, 0.0) / scale
        for p in (1 - _TAIL, _TAIL)
    )
    return Interval(found.value, min(found.low, low), max(found.high, high))
