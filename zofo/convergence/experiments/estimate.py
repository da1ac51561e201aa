"""Experiments on one zeroth-order estimate and on its smoothing radius."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from zofo.convergence import radius
from zofo.convergence.cells import Cell, Rates
from zofo.convergence.claims import PAPER, Claim
from zofo.convergence.estimates import EstimateCell
from zofo.convergence.experiments.scale import ZEROTH, Scale, doubling, flat, quadratic


def estimate_cells(scale: Scale) -> list[Any]:
    """Estimates at one point."""
    bent: dict[str, Any] = {
        "law_x": {"kind": "exponential"},
        "law_y": {"kind": "exponential"},
        "d_x": 8,
        "start_x": 0.7,
        "num_samples": 4,
    }

    def cell(
        labels: dict[str, Any], problem: str, options: Any, eps: Sequence[float], share: int = 1
    ) -> Any:
        return EstimateCell(
            "estimate",
            labels,
            problem,
            options,
            problem == "quadratic",
            str(labels["estimator"]),
            "gaussian",
            tuple(eps),
            scale.num_draws // share,
            scale.num_seeds,
        )

    # A bias shows above the noise of the draws only at large eps, an error at small ones too.
    ranges = {"error": (-8, -7, -6, -5, -4, -3), "bias": (-3, -2.5, -2, -1.5, -1)}
    cells = [
        cell({"of": of, "estimator": e}, "growing", bent, [2.0**k for k in exponents])
        for of, exponents in ranges.items()
        for e in ("forward", "central")
    ]
    for kind in ("flat", "low-rank"):
        for d in (16, 64, 256, 1024)[: scale.keep]:
            spectrum = {"kind": kind, "num": d, **({"rank": 4} if kind == "low-rank" else {})}
            labels = {"of": "size", "estimator": "forward", "spectrum": kind, "d_x": d}
            cells.append(cell(labels, "quadratic", quadratic(4, spectrum, flat(2)), (0.1,), 8))
    return cells


def eps_cells(scale: Scale) -> list[Any]:
    """Hybrid steps over dimensions and eps."""
    return [
        Cell(
            "eps",
            {"d_x": d, "eps": 2.0**k},
            "quadratic",
            quadratic(4, flat(d), flat(2), noise_x=4.0, noise_y=0.1, height_y=0.01),
            replace(ZEROTH, eps=2.0**k),
            Rates(-14, -3, scale.per_octave),
            doubling(512, 2048, scale),
            scale.num_seeds,
        )
        for d in (16, 32, 64, 128)[: scale.keep]
        for k in range(-8, 2, 1 if scale.keep > 9 else 3)
    ]


def estimate_claims() -> list[Claim]:
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


def eps_claims() -> list[Claim]:
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
