"""Claims on the order of the samples, their number, and the epochs to ε."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

from zofo.convergence import measures, readings
from zofo.convergence.claims import MKR, OURS, PAPER, Claim

_IN_T: Final = {"T^-1/2 (ε⁻⁴)": -1 / 2, "T^-2/3 (ε⁻³)": -2 / 3, "T^-1 (ε⁻²)": -1.0}
_SHARP_T: Final = {"T^-1/2": -1 / 2, "T^-2/3": -2 / 3, "T^-3/4": -3 / 4, "T^-1": -1.0}


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


def order() -> list[Claim]:
    """Claims on the experiment 'order'."""
    curved = {"samples": "curvature"}
    return [
        _epochs(
            "reshuffle-first",
            "order",
            "Reshuffling without zeroth-order noise: ‖∇f‖² falls as T^-2/3, ε⁻³",
            MKR,
            {**curved, "sampling": "reshuffle"},
            "T^-2/3",
            _SHARP_T,
        ),
        _epochs(
            "shuffle-once-first",
            "order",
            "Shuffling once has reshuffling's exponent",
            MKR,
            {**curved, "sampling": "shuffle-once"},
            "T^-2/3",
            _SHARP_T,
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
            MKR,
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
            MKR + " (a bound)",
            {"samples": "gradient", "sampling": "reshuffle"},
            "T^-2/3",
            _SHARP_T,
        ),
        _epochs(
            "network-first",
            "order",
            "On the network (not convex), reshuffling without zeroth-order noise: T^-2/3",
            MKR,
            {"samples": "network", "sampling": "reshuffle"},
            "T^-2/3 (ε⁻³)",
            last=4,
        ),
    ]


def last() -> list[Claim]:
    """Claims on the experiment 'last'."""
    return [
        _epochs(
            f"last-{sampling}",
            "last",
            f"Strongly convex, last epoch, {words}: T^{power:g} up to logarithms",
            source,
            {"sampling": sampling},
            f"T^{power:g}",
            {"T^-1": -1.0, "T^-2": -2.0},
            part="last",
        )
        for sampling, words, power, source in (
            (
                "reshuffle",
                "reshuffling",
                -2.0,
                "Safran, Shamir, arXiv 1908.00045; Rajput et al., arXiv 2002.10400",
            ),
            ("with-replacement", "with replacement", -1.0, "the usual bound of SGD"),
        )
    ]


def order_n() -> list[Claim]:
    """Claims on the experiment 'order-n'."""
    powers = {"n^-1/3": -1 / 3, "n^-1/2": -1 / 2, "n^-2/3": -2 / 3}
    return [
        Claim(
            f"samples-{sampling}",
            "order-n",
            statement,
            source,
            measures.across,
            {"where": {"sampling": sampling}, "label": "n", "x_title": "samples n"},
            claimed,
            powers,
        )
        for sampling, statement, source, claimed in (
            (
                "reshuffle",
                "Reshuffling without zeroth-order noise: the bound's n^-1/3 is attained",
                MKR + " (a bound)",
                "n^-1/3",
            ),
            (
                "shuffle-once",
                "Shuffling once attains the bound's n^-1/3",
                MKR + " (a bound)",
                "n^-1/3",
            ),
            (
                "with-replacement",
                "Sampling with replacement: n^-1/2",
                "the usual bound of SGD",
                "n^-1/2",
            ),
        )
    ]


def zeroth() -> list[Claim]:
    """Claims on the experiment 'zeroth'."""
    curved = {"samples": "curvature"}
    found = [
        _epochs(
            f"{sampling}-zeroth",
            "zeroth",
            f"With zeroth-order noise, {words}: T^-1/2, ε⁻⁴",
            PAPER,
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
            OURS,
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
            PAPER,
            {"samples": "network", "sampling": "reshuffle"},
            "T^-1/2 (ε⁻⁴)",
            last=4,
        ),
    ]


def samples() -> list[Claim]:
    """Claims on the experiment 'samples'."""
    axis = {"where": {}, "label": "n", "x_title": "samples n"}
    return [
        _epochs(
            "rate-in-epochs",
            "samples",
            "The best rate falls as T^-1/2",
            PAPER + ", both readings",
            {"n": 8},
            "T^-1/2",
            {"T^0": 0.0, "T^-1/3": -1 / 3, "T^-1/2": -1 / 2, "T^-1": -1.0},
            of="rate",
        ),
        Claim(
            "rate-in-samples",
            "samples",
            "The best rate falls as n^-1/2: the second cap is c / (√(T n) L)",
            PAPER + ", reading √(T n)",
            measures.across,
            {**axis, "of": "rate"},
            "√(T n)",
            {"√(T n)": -0.5, "√T n": -1.0, "n^0": 0.0},
        ),
        Claim(
            "value-in-samples",
            "samples",
            "At T epochs ‖∇f‖² falls as n^-1/2: T = O(ε⁻⁴ / n)",
            PAPER + ", reading √(T n)",
            measures.across,
            axis,
            "n^-1/2",
            {"n^-1/2": -0.5, "n^0": 0.0, "n^-1": -1.0},
        ),
        Claim(
            "epochs-with-sqrt-tn",
            "samples",
            "Rates c / √(T n): epochs to ε fall as 1 / n",
            PAPER + ", reading √(T n)",
            readings.reading,
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
            "Rates c / (√T n): epochs to ε do not depend on n, from n = 16",
            PAPER + ", reading √T n",
            readings.reading,
            {
                "where": {},
                "power": 1.0,
                "begin": 16,
                "name": "rates c / (√T n)",
            },
            "n^0",
            {"n^-1": -1.0, "n^0": 0.0},
        ),
        Claim(
            "predicted-epochs",
            "samples",
            "Epochs to ε are 2 F σ_x² (tr H + ‖H‖) / (n ε⁴), within a quarter",
            OURS,
            readings.predicted_epochs,
            {"where": {}, "constant": _predicted_constant},
            (0.75, 1.25),
        ),
    ]


def _predicted_constant(options: Mapping[str, Any]) -> float:
    """C of T = C / (n ε⁴) for a flat spectrum of curvature 1 and equal rates."""
    num = int(options["spectrum_x"]["num"])
    height = float(options.get("height_x", 1.0)) + float(options.get("height_y", 1.0))
    return 2 * height * float(options["noise_x"]) * (num + 1)
