"""Experiments on one learning rate or two, and on the choice of directions."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from zofo.convergence import measures
from zofo.convergence.cells import Cell, Rates
from zofo.convergence.claims import OURS, Claim
from zofo.convergence.engine import Setting
from zofo.convergence.experiments.scale import ZEROTH, Scale, doubling, flat, quadratic


def two_rates_cells(scale: Scale) -> list[Any]:
    """Every pair of rates, over ratios of smoothness."""
    return [
        Cell(
            "two-rates",
            {"ratio": ratio},
            "quadratic",
            quadratic(
                4, flat(8), flat(2, 1 / ratio), noise_x=1.0, noise_y=1.0, height_y=float(ratio)
            ),
            ZEROTH,
            Rates(-11, 11, 1, high_y=11),
            doubling(64, 1024, scale),
            scale.num_seeds,
        )
        for ratio in (1, 10, 100, 1000)[: max(scale.keep, 3)]
    ]


def directions_cells(scale: Scale) -> list[Any]:
    """Distribution, estimator and number of directions."""

    def cell(labels: dict[str, Any], d: int, setting: Setting) -> Cell:
        return Cell(
            "directions",
            labels,
            "quadratic",
            quadratic(4, flat(d), flat(2), noise_x=4.0, noise_y=0.1, height_y=0.01),
            setting,
            Rates(-13, -1, scale.per_octave),
            doubling(64, 2048, scale),
            # At d = 4 the ratio is known in closed form and runs are cheap, so more seeds are used.
            scale.num_seeds * (4 if d == 4 else 1),
        )

    cells = [
        cell(
            {"of": "kind", "d_x": d, "distribution": distribution, "estimator": estimator},
            d,
            replace(ZEROTH, distribution=distribution, estimator=estimator),
        )
        for d in (4, 32)
        for distribution in ("gaussian", "rademacher")
        for estimator in ("forward", "central")
    ]
    return cells + [
        cell({"of": "number", "directions": k}, 16, replace(ZEROTH, num_directions=k))
        for k in (1, 2, 4, 8)[: max(scale.keep, 3)]
    ]


def two_rates_claims() -> list[Claim]:
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


def directions_claims() -> list[Claim]:
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
