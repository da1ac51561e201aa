"""Claims on dimension, caps, eps, one rate or two, directions, growing smoothness."""

from __future__ import annotations

from typing import Any

import numpy as np

from zofo.convergence import measures, radius
from zofo.convergence.claims import OURS, PAPER, Claim


def dimension() -> list[Claim]:
    """Claims on the experiment 'dimension'."""

    def claim(
        name: str, spectrum: str, of: str, statement: str, source: str, claimed: str, scale: float
    ) -> Claim:
        half = "1/2" if scale > 0 else "-1/2"
        return Claim(
            name,
            "dimension" if of != "cap" else "caps",
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
            {"d^0": 0.0, f"d^{half}": scale / 2, f"d^{scale:g}": scale},
        )

    return [
        claim("value-in-dimension", "flat", "value", "Flat spectrum: ‖∇_x f‖² grows as d_x^1/2, "
              "epochs to ε as d_x", OURS, "d^1/2", 1.0),
        claim("value-at-rank", "low-rank", "value", "Effective rank 4 held: ‖∇_x f‖² does not "
              "grow with d_x", OURS, "d^0", 1.0),
        claim("rate-in-dimension", "flat", "rate", "The second cap has no d_x: the best base rate "
              "does not fall with it", PAPER + ", second cap as transcribed", "d^0", -1.0),
        claim("cap-in-dimension", "flat", "cap", "Flat spectrum: the largest base rate falls as "
              "1 / d_x", PAPER + ", first cap", "d^-1", -1.0),
        claim("cap-at-rank", "low-rank", "cap", "Effective rank 4 held: the largest base rate "
              "still falls as 1 / d_x", PAPER + ", first cap (sufficient)", "d^-1", -1.0),
        Claim(
            "cap-in-samples",
            "caps",
            "The largest base rate that does not diverge falls as 1 / n",
            PAPER + ", first cap (sufficient)",
            measures.across,
            {"where": {"of": "n"}, "label": "n", "of": "cap", "part": "x", "x_title": "samples n"},
            "n^-1",
            {"n^0": 0.0, "n^-1/2": -0.5, "n^-1": -1.0},
        ),
    ]  # fmt: skip


def estimate() -> list[Claim]:
    """Claims on the experiment 'estimate'."""

    def in_eps(name: str, of: str, estimator: str, statement: str, claimed: str) -> Claim:
        return Claim(
            name,
            "estimate",
            statement,
            "Nesterov, Spokoiny, 2017" if of == "bias" else "Taylor's formula",
            radius.of_estimate,
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
            radius.size_across,
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


def eps() -> list[Claim]:
    """Claims on the experiment 'eps'."""
    return [
        Claim(
            "harmless-eps",
            "eps",
            "The largest harmless eps falls as d_x^-3/2",
            PAPER + ", practical condition on eps",
            radius.harmless_eps,
            {"where": {}, "label": "d_x", "x_title": "d_x"},
            "d^-3/2",
            {"d^-1/2": -0.5, "d^-1": -1.0, "d^-3/2": -1.5},
        )
    ]


def two_rates() -> list[Claim]:
    """Claims on the experiment 'two-rates'."""
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


def directions() -> list[Claim]:
    """Claims on the experiment 'directions'."""

    def against(
        name: str,
        statement: str,
        d: int,
        first: Any,
        second: Any,
        center: float,
        margin: float = 1.05,
    ) -> Claim:
        labels = {"of": "kind", "d_x": d, "distribution": "gaussian", "estimator": "forward"}
        return Claim(
            name,
            "directions",
            statement,
            OURS,
            measures.ratio,
            {"first": {**labels, **first}, "second": {**labels, **second}, "part": "x"},
            (center / margin, center * margin),
        )

    gain = {d: ((d + 1) / (d - 1)) ** 0.5 for d in (4, 32)}
    return [
        *(
            against(
                f"gaussian-{d}",
                f"d_x = {d}: Gaussian directions leave √((d + 1)/(d − 1)) = {gain[d]:.3f} times "
                f"the ‖∇_x f‖² of ±1, within {percent}%",
                d,
                {"distribution": "gaussian"},
                {"distribution": "rademacher"},
                gain[d],
                1 + percent / 100,
            )
            for d, percent in ((4, 10), (32, 5))
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
            OURS,
            measures.across,
            {"where": {"of": "number"}, "label": "directions", "part": "x", "x_title": "K"},
            "K^-1/2",
            {"K^0": 0.0, "K^-1/2": -0.5, "K^-1": -1.0},
        ),
    ]


def growth() -> list[Claim]:
    """Claims on the experiment 'growth'."""
    return [
        Claim(
            f"cap-in-ell-{order}",
            "growth",
            f"{words}: the largest base rate falls as (ln ℓ) / ℓ, ℓ = ℓ_x of the start",
            OURS,
            measures.across,
            {
                "where": {"base": order},
                "label": "start",
                "of": "cap",
                "part": "x",
                "per": _ell_at_start,
                "x_title": "ℓ / ln ℓ, ℓ = ℓ_x(‖∇f‖) at the start",
            },
            "-1",
            {"0": 0.0, "-1/2": -0.5, "-1": -1.0},
        )
        for order, words in (("first", "Exact gradients"), ("zeroth", "Differences"))
    ]


def _ell_at_start(start: float) -> float:
    """ℓ / ln ℓ, ℓ = 1 + ‖∇f‖ of four coordinates that all stand at `start`, φ'' = 1 + |φ'|."""
    ell = 1 + 2 * float(np.expm1(start))
    return ell / float(np.log(ell))
