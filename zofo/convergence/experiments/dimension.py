"""Experiments on the dimension of the base and on the largest rate that does not diverge."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from zofo.convergence import measures
from zofo.convergence.cells import Cell, Rates
from zofo.convergence.claims import OURS, PAPER, Claim
from zofo.convergence.experiments.scale import ZEROTH, Scale, doubling, flat, quadratic


def dimension_cells(scale: Scale) -> list[Any]:
    """Hybrid steps over dimensions, with a growing and with a fixed effective rank."""
    dims = (4, 8, 16, 32, 64)[: scale.keep]
    spectra: dict[str, Callable[[int], dict[str, Any]]] = {
        "flat": flat,
        "low-rank": lambda num: {"kind": "low-rank", "num": num, "rank": 4},
    }
    return [
        Cell(
            "dimension",
            {"spectrum": kind, "d_x": d},
            "quadratic",
            quadratic(4, make(d), flat(2), noise_x=4.0, noise_y=0.1, height_y=0.01),
            ZEROTH,
            Rates(-14, -1, scale.per_octave),
            doubling(64, 2048, scale),
            scale.num_seeds,
        )
        for kind, make in spectra.items()
        for d in dims
    ]


def caps_cells(scale: Scale) -> list[Any]:
    """A fine grid of rates up to divergence."""

    def cell(labels: dict[str, Any], n: int, spectrum: dict[str, Any]) -> Cell:
        return Cell(
            "caps",
            labels,
            "quadratic",
            quadratic(n, spectrum, flat(2), noise_x=4.0, noise_y=0.1, height_y=0.01),
            ZEROTH,
            Rates(-8, 2, 8, times_y=0.0),
            (64, 256),
            scale.num_seeds,
        )

    cells = [cell({"of": "n", "n": n}, n, flat(8)) for n in (4, 16, 64)]
    for d in (4, 8, 16, 32, 64, 128)[: scale.keep]:
        cells.append(cell({"of": "d_x", "spectrum": "flat", "d_x": d}, 4, flat(d)))
        low = {"kind": "low-rank", "num": d, "rank": 4}
        cells.append(cell({"of": "d_x", "spectrum": "low-rank", "d_x": d}, 4, low))
    return cells


def dimension_claims() -> list[Claim]:
    """Claims on the experiment 'dimension'."""

    def claim(
        name: str, spectrum: str, of: str, statement: str, source: str, claimed: str, scale: float
    ) -> Claim:
        half = "1/2" if scale > 0 else "-1/2"
        axis = {"label": "d_x", "part": "x", "x_title": "d_x"}
        return Claim(
            name,
            "dimension" if of != "cap" else "caps",
            statement,
            source,
            measures.across,
            {"where": {"spectrum": spectrum}, "of": of, **axis},
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
