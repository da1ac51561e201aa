"""An experiment on smoothness that grows with the gradient."""

from __future__ import annotations

from typing import Any

import numpy as np

from zofo.convergence import measures
from zofo.convergence.cells import Cell, Rates
from zofo.convergence.claims import OURS, Claim
from zofo.convergence.engine import Setting
from zofo.convergence.experiments.scale import Scale, doubling


def growth_cells(scale: Scale) -> list[Any]:
    """Rates up to divergence, from starts at growing distances."""
    return [
        Cell(
            "growth",
            {"base": order, "start": start},
            "growing",
            {
                "law_x": {"kind": "linear"},
                "law_y": {"kind": "exponential", "l1": 0.1},
                "d_x": 4,
                "d_y": 2,
                "num_samples": 4,
                "noise_x": 0.01,
                "noise_y": 0.01,
                "start_x": start,
                "start_y": 0.1,
            },
            Setting(base_order=order),
            Rates(-17, 2, 2 * scale.per_octave, times_y=0.0),
            doubling(16, 64, scale),
            scale.num_seeds,
        )
        for order in ("first", "zeroth")
        for start in (1.0, 2.0, 4.0, 6.0, 8.0, 10.0)[: max(scale.keep, 3)]
    ]


def growth_claims() -> list[Claim]:
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
    """ℓ / ln ℓ with ℓ = 1 + ‖∇f‖ of four coordinates that all equal `start`, φ'' = 1 + |φ'|."""
    ell = 1 + 2 * float(np.expm1(start))
    return ell / float(np.log(ell))
