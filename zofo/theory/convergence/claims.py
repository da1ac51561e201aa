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

from zofo.theory.convergence import measures
from zofo.theory.convergence.fits import Interval
from zofo.theory.convergence.measures import Measured, Study

Outcome = Literal["confirmed", "refuted", "undecided at this scale"]
CONFIRMED: Final = "confirmed"
REFUTED: Final = "refuted"
UNDECIDED: Final = "undecided at this scale"
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
        measure: a function of `zofo.theory.convergence.measures`.
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


_IN_T: Final = {"T^-1/2 (ε⁻⁴)": -1 / 2, "T^-2/3 (ε⁻³)": -2 / 3, "T^-1 (ε⁻²)": -1.0}
_SHARP_T: Final = {"T^-1/2": -1 / 2, "T^-2/3": -2 / 3, "T^-3/4": -3 / 4, "T^-1": -1.0}
_PAPER: Final = "arXiv 2604.09940, theorem"
_MKR: Final = "Mishchenko, Khaled, Richtárik, arXiv 2006.05988"
_OURS: Final = "derived in docs/theory.md"


def _epochs(
    name: str,
    experiment: str,
    statement: str,
    source: str,
    where: Mapping[str, Any],
    claimed: str,
    candidates: Mapping[str, float] = _IN_T,
    **options: Any,
) -> Claim:
    return Claim(
        name,
        experiment,
        statement,
        source,
        measures.in_epochs,
        {"where": where, **options},
        claimed,
        candidates,
    )


def _order_claims() -> list[Claim]:
    curved = {"samples": "curvature"}
    return [
        _epochs(
            "reshuffle-first",
            "order",
            "Reshuffling without zeroth-order noise: ‖∇f‖² falls as T^-2/3, ε⁻³",
            _MKR,
            {**curved, "sampling": "reshuffle"},
            "T^-2/3 (ε⁻³)",
        ),
        _epochs(
            "shuffle-once-first",
            "order",
            "Shuffling once has reshuffling's exponent",
            _MKR,
            {**curved, "sampling": "shuffle-once"},
            "T^-2/3 (ε⁻³)",
        ),
        _epochs(
            "with-replacement-first",
            "order",
            "Sampling with replacement: T^-1/2, ε⁻⁴",
            "the usual bound of SGD",
            {**curved, "sampling": "with-replacement"},
            "T^-1/2 (ε⁻⁴)",
        ),
        Claim(
            "reshuffle-gain-first",
            "order",
            "Without zeroth-order noise reshuffling reaches a lower ‖∇f‖² than sampling with "
            "replacement",
            _MKR,
            measures.ratio,
            {
                "first": {**curved, "sampling": "reshuffle"},
                "second": {**curved, "sampling": "with-replacement"},
                "name": "reshuffle over with-replacement",
            },
            (0.0, 1.0),
        ),
        _epochs(
            "reshuffle-gradient-only",
            "order",
            "T^-2/3 is attained where samples differ in their gradients only",
            _MKR + " (a bound)",
            {"samples": "gradient", "sampling": "reshuffle"},
            "T^-2/3",
            _SHARP_T,
        ),
        _epochs(
            "last-reshuffle",
            "order",
            "Strongly convex, last epoch, exact gradients: reshuffling T^-2 up to logarithms",
            "Rajput, Gupta, Papailiopoulos, arXiv 2002.10400; Safran, Shamir, arXiv 1908.00045",
            {**curved, "sampling": "reshuffle"},
            "T^-2",
            {"T^-1": -1.0, "T^-2": -2.0},
            part="last",
        ),
        _epochs(
            "last-with-replacement",
            "order",
            "Strongly convex, last epoch, exact gradients: with replacement T^-1 up to logarithms",
            "the usual bound of SGD",
            {**curved, "sampling": "with-replacement"},
            "T^-1",
            {"T^-1": -1.0, "T^-2": -2.0},
            part="last",
        ),
        _epochs(
            "network-first",
            "order",
            "On the network (not convex), reshuffling without zeroth-order noise: T^-2/3",
            _MKR,
            {"samples": "network", "sampling": "reshuffle"},
            "T^-2/3 (ε⁻³)",
            last=4,
        ),
    ]


def _zeroth_claims() -> list[Claim]:
    curved = {"samples": "curvature"}
    found = [
        _epochs(
            f"{sampling}-zeroth",
            "zeroth",
            f"With zeroth-order noise, {words}: T^-1/2, ε⁻⁴",
            _PAPER,
            {**curved, "sampling": sampling},
            "T^-1/2 (ε⁻⁴)",
        )
        for sampling, words in (
            ("reshuffle", "reshuffling"),
            ("shuffle-once", "shuffling once"),
            ("with-replacement", "sampling with replacement"),
        )
    ]
    return [
        *found,
        Claim(
            "reshuffle-gain-zeroth",
            "zeroth",
            "With zeroth-order noise reshuffling still reaches a lower ‖∇f‖² than sampling with "
            "replacement (by a constant)",
            _OURS,
            measures.ratio,
            {
                "first": {**curved, "sampling": "reshuffle"},
                "second": {**curved, "sampling": "with-replacement"},
                "name": "reshuffle over with-replacement",
            },
            (0.0, 1.0),
        ),
        _epochs(
            "network-zeroth",
            "zeroth",
            "On the network (not convex), hybrid with reshuffling: T^-1/2",
            _PAPER,
            {"samples": "network", "sampling": "reshuffle"},
            "T^-1/2 (ε⁻⁴)",
            last=4,
        ),
    ]


def _samples_claims() -> list[Claim]:
    axis = {"where": {}, "label": "n", "x_title": "samples n"}
    return [
        _epochs(
            "rate-in-epochs",
            "samples",
            "The best rate falls as T^-1/2",
            _PAPER + ", both readings",
            {"n": 8},
            "T^-1/2",
            {"T^0": 0.0, "T^-1/3": -1 / 3, "T^-1/2": -1 / 2, "T^-1": -1.0},
            of="rate",
        ),
        Claim(
            "rate-in-samples",
            "samples",
            "The best rate falls as n^-1/2: the second cap is c / (√(T n) L)",
            _PAPER + ", reading √(T n)",
            measures.across,
            {**axis, "of": "rate"},
            "√(T n)",
            {"√(T n)": -0.5, "√T n": -1.0, "n^0": 0.0},
        ),
        Claim(
            "value-in-samples",
            "samples",
            "At T epochs ‖∇f‖² falls as n^-1/2: T = O(ε⁻⁴ / n)",
            _PAPER + ", reading √(T n)",
            measures.across,
            axis,
            "n^-1/2",
            {"n^-1/2": -0.5, "n^0": 0.0, "n^-1": -1.0},
        ),
        Claim(
            "epochs-with-sqrt-tn",
            "samples",
            "Rates c / √(T n): epochs to ε fall as 1 / n",
            _PAPER + ", reading √(T n)",
            measures.reading,
            {
                "where": {},
                "power": 0.5,
                "name": "rates c / √(T n)",
            },
            "n^-1",
            {"n^-1": -1.0, "n^0": 0.0},
        ),
        Claim(
            "epochs-with-sqrt-t-n",
            "samples",
            "Rates c / (√T n): epochs to ε do not depend on n",
            _PAPER + ", reading √T n",
            measures.reading,
            {
                "where": {},
                "power": 1.0,
                "name": "rates c / (√T n)",
            },
            "n^0",
            {"n^-1": -1.0, "n^0": 0.0},
        ),
        Claim(
            "predicted-epochs",
            "samples",
            "Epochs to ε are 2 F σ_x² (tr H + ‖H‖) / (n ε⁴), within a quarter",
            _OURS,
            measures.predicted_epochs,
            {"where": {}, "constant": _predicted_constant},
            (0.75, 1.25),
        ),
        Claim(
            "cap-in-samples",
            "samples",
            "The largest base rate that does not diverge falls as 1 / n",
            _PAPER + ", first cap (sufficient)",
            measures.across,
            {**axis, "of": "cap", "part": "x"},
            "n^-1",
            {"n^0": 0.0, "n^-1/2": -0.5, "n^-1": -1.0},
        ),
    ]


def _predicted_constant(options: Mapping[str, Any]) -> float:
    """C of T = C / (n ε⁴) for a flat spectrum of curvature 1 and equal rates."""
    num = int(options["spectrum_x"]["num"])
    height = float(options.get("height_x", 1.0)) + float(options.get("height_y", 1.0))
    return 2 * height * float(options["noise_x"]) * (num + 1)


def _dimension_claims() -> list[Claim]:
    def claim(
        name: str, spectrum: str, of: str, statement: str, source: str, claimed: str, scale: float
    ) -> Claim:
        return Claim(
            name,
            "dimension",
            statement,
            source,
            measures.across,
            {
                "where": {"spectrum": spectrum},
                "label": "d_x",
                "of": of,
                "part": "x",
                "x_title": "d_x",
            },
            claimed,
            {"d^0": 0.0, f"d^{_half(scale)}": scale / 2, f"d^{scale:g}": scale},
        )

    return [
        claim("cap-in-dimension", "flat", "cap", "Flat spectrum: the largest base rate falls as "
              "1 / d_x", _PAPER + ", first cap", "d^-1", -1.0),
        claim("cap-at-rank", "low-rank", "cap", "Effective rank 4 held: the largest base rate "
              "still falls as 1 / d_x", _PAPER + ", first cap (sufficient)", "d^-1", -1.0),
        claim("value-in-dimension", "flat", "value", "Flat spectrum: ‖∇_x f‖² grows as d_x^1/2, "
              "epochs to ε as d_x", _OURS, "d^1/2", 1.0),
        claim("value-at-rank", "low-rank", "value", "Effective rank 4 held: ‖∇_x f‖² does not "
              "grow with d_x", _OURS, "d^0", 1.0),
        claim("rate-in-dimension", "flat", "rate", "The second cap has no d_x: the best base rate "
              "does not fall with it", _PAPER + ", second cap as transcribed", "d^0", -1.0),
    ]  # fmt: skip


def _half(scale: float) -> str:
    return "1/2" if scale > 0 else "-1/2"


def _estimate_claims() -> list[Claim]:
    def in_eps(name: str, of: str, estimator: str, statement: str, claimed: str) -> Claim:
        return Claim(
            name,
            "estimate",
            statement,
            "Nesterov, Spokoiny, 2017" if of == "bias" else "Taylor's formula",
            measures.of_estimate,
            {"where": {"of": of, "estimator": estimator}, "of": of},
            claimed,
            {"eps^1": 1.0, "eps^2": 2.0},
        )

    def size(name: str, spectrum: str, statement: str, source: str, claimed: str) -> Claim:
        return Claim(
            name,
            "estimate",
            statement,
            source,
            measures.size_across,
            {"where": {"of": "size", "spectrum": spectrum}, "label": "d_x", "x_title": "d_x"},
            claimed,
            {"d^1": 1.0, "d^2": 2.0, "d^3": 3.0},
        )

    return [
        in_eps("error-forward", "error", "forward",
               "Forward: the error of one difference is O(eps)", "eps^1"),
        in_eps("error-central", "error", "central",
               "Central: the error of one difference is O(eps²)", "eps^2"),
        in_eps("bias-forward", "bias", "forward",
               "Forward: the bias of the estimate is O(eps) and no better", "eps^1"),
        in_eps("bias-central", "bias", "central",
               "Central: the bias of the estimate is O(eps²)", "eps^2"),
        size("size-in-dimension", "flat",
             "Forward: E‖g‖² has a part eps² L² d³ / 4 that does not vanish at a minimum",
             "Nesterov, Spokoiny, 2017", "d^3"),
        size("size-at-rank", "low-rank",
             "Effective rank 4 held: that part still grows as d³",
             "Nesterov, Spokoiny, 2017 (a bound)", "d^3"),
    ]  # fmt: skip


def _eps_claims() -> list[Claim]:
    return [
        Claim(
            "harmless-eps",
            "eps",
            "The largest harmless eps falls as d_x^-3/2",
            _PAPER + ", practical condition on eps",
            measures.harmless_eps,
            {"where": {}, "label": "d_x", "x_title": "d_x"},
            "d^-3/2",
            {"d^-1/2": -0.5, "d^-1": -1.0, "d^-3/2": -1.5},
        )
    ]


def _two_rates_claims() -> list[Claim]:
    crawls = [
        Claim(
            f"one-rate-{ratio}",
            "two-rates",
            f"L_x / L_y = {ratio}: the best single rate leaves ‖∇f‖² at least {least:g} times as "
            "large as two rates",
            "arXiv 2604.09940, motivation",
            measures.one_rate,
            {"where": {"ratio": ratio}},
            (least, float("inf")),
        )
        for ratio, least in ((10, 1.5), (100, 3.0))
    ]
    return [
        *crawls,
        Claim(
            "one-rate-diverges",
            "two-rates",
            "L_x / L_y = 100: the adapter's best rate for both blocks diverges in every seed",
            "arXiv 2604.09940, motivation",
            measures.lost_with_one_rate,
            {"where": {"ratio": 100}},
            (0.99, 1.01),
        ),
    ]


def _directions_claims() -> list[Claim]:
    def against(name: str, statement: str, d: int, first: Any, second: Any, center: float) -> Claim:
        labels = {"of": "kind", "d_x": d, "distribution": "gaussian", "estimator": "forward"}
        return Claim(
            name,
            "directions",
            statement,
            _OURS,
            measures.ratio,
            {"first": {**labels, **first}, "second": {**labels, **second}, "part": "x"},
            (0.95 * center, 1.05 * center),
        )

    gain = {d: ((d + 1) / (d - 1)) ** 0.5 for d in (4, 32)}
    return [
        *(
            against(
                f"gaussian-{d}",
                f"d_x = {d}: Gaussian directions leave √((d + 1)/(d − 1)) = {gain[d]:.3f} times "
                "the ‖∇_x f‖² of ±1, within 5%",
                d,
                {"distribution": "gaussian"},
                {"distribution": "rademacher"},
                gain[d],
            )
            for d in (4, 32)
        ),
        against(
            "forward-over-central",
            "At eps = 1e-4 forward and central reach the same, within 5%",
            32,
            {"estimator": "forward"},
            {"estimator": "central"},
            1.0,
        ),
        Claim(
            "value-in-directions",
            "directions",
            "K directions: ‖∇_x f‖² falls as K^-1/2, so forwards to ε do not change",
            _OURS,
            measures.across,
            {"where": {"of": "number"}, "label": "directions", "part": "x", "x_title": "K"},
            "K^-1/2",
            {"K^0": 0.0, "K^-1/2": -0.5, "K^-1": -1.0},
        ),
    ]


def _growth_claims() -> list[Claim]:
    return [
        Claim(
            f"cap-in-ell-{order}",
            "growth",
            f"{words}: the largest base rate falls as 1 / ℓ_x of the start, up to a logarithm",
            _PAPER + "; arXiv 2306.01264",
            measures.across,
            {
                "where": {"base": order},
                "label": "start",
                "of": "cap",
                "part": "x",
                "per": _ell_at_start,
                "x_title": "ℓ_x(‖∇f‖) at the start",
            },
            "ℓ^-1",
            {"ℓ^0": 0.0, "ℓ^-1": -1.0},
        )
        for order, words in (("first", "Exact gradients"), ("zeroth", "Differences"))
    ]


def _ell_at_start(start: float) -> float:
    """1 + ‖∇f‖ of four coordinates that all stand at `start` under φ'' = 1 + |φ'|."""
    return 1 + 2 * float(np.expm1(start))


CLAIMS: Final[tuple[Claim, ...]] = (
    *_order_claims(),
    *_zeroth_claims(),
    *_samples_claims(),
    *_dimension_claims(),
    *_estimate_claims(),
    *_eps_claims(),
    *_two_rates_claims(),
    *_directions_claims(),
    *_growth_claims(),
)
