"""An experiment on the order of the samples, with a zeroth-order base."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from zofo.convergence.cells import Cell, Rates
from zofo.convergence.claims import OURS, PAPER, Claim
from zofo.convergence.experiments.scale import (
    CURVATURE,
    CURVED,
    ZEROTH,
    Scale,
    doubling,
    flat,
    network_cells,
    over_epochs,
    quadratic,
    reshuffling_gains,
)


def zeroth_cells(scale: Scale) -> list[Any]:
    """Hybrid steps in each order of the samples."""
    options = quadratic(4, flat(8), flat(2), noise_x=4.0, noise_y=4.0, **CURVATURE)
    cells = [
        Cell(
            "zeroth",
            {"samples": "curvature", "sampling": sampling},
            "quadratic",
            options,
            replace(ZEROTH, sampling=sampling),
            Rates(-14, -2, scale.per_octave),
            doubling(16, 8192, scale),
            scale.num_seeds,
        )
        for sampling in ("reshuffle", "shuffle-once", "with-replacement")
    ]
    return cells + network_cells("zeroth", ZEROTH, Rates(-13, 0, scale.per_octave), scale)


def zeroth_claims() -> list[Claim]:
    """Claims on the experiment 'zeroth'."""
    words = {
        "reshuffle": "reshuffling",
        "shuffle-once": "shuffling once",
        "with-replacement": "sampling with replacement",
    }
    return [
        *(
            over_epochs(
                f"{sampling}-zeroth",
                "zeroth",
                f"With zeroth-order noise, {words[sampling]}: T^-1/2, ε⁻⁴",
                PAPER,
                {**CURVED, "sampling": sampling},
                "T^-1/2 (ε⁻⁴)",
            )
            for sampling in words
        ),
        reshuffling_gains(
            "reshuffle-gain-zeroth",
            "zeroth",
            "With zeroth-order noise reshuffling still reaches a lower ‖∇f‖² than sampling with "
            "replacement (by a constant)",
            OURS,
        ),
        over_epochs(
            "network-zeroth",
            "zeroth",
            "On the network (not convex), hybrid with reshuffling: T^-1/2",
            PAPER,
            {"samples": "network", "sampling": "reshuffle"},
            "T^-1/2 (ε⁻⁴)",
            last=4,
        ),
    ]
