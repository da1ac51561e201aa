"""Experiments on the number of samples."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from zofo.convergence import epochs, measures
from zofo.convergence.cells import Cell, Rates
from zofo.convergence.claims import MKR, OURS, PAPER, Claim
from zofo.convergence.experiments.scale import (
    CURVATURE,
    FIRST,
    ZEROTH,
    Scale,
    doubling,
    flat,
    over_epochs,
    quadratic,
)
from zofo.optim.reshuffle import Sampling


def order_n_cells(scale: Scale) -> list[Any]:
    """Exact gradients over numbers of samples."""

    def cell(n: int, sampling: Sampling, noise: float, options: dict[str, Any]) -> Cell:
        return Cell(
            "order-n",
            {"sampling": sampling, "n": n},
            "quadratic",
            quadratic(n, flat(6), flat(2), noise_x=noise, noise_y=noise, **options),
            replace(FIRST, sampling=sampling),
            Rates(-16, -3, scale.per_octave),
            doubling(1024, 8192, scale),
            # Shuffling once needs more seeds, because each seed has a single permutation.
            scale.num_seeds * (4 if sampling == "shuffle-once" else 1),
        )

    # If curvature varies too, shuffling once has the bias of reshuffling, which hides its own
    # dependence on n. The noise is chosen so that each order shows its limit: the best rates are
    # small, but every direction has converged.
    designs: tuple[tuple[Sampling, float, tuple[int, ...], dict[str, Any]], ...] = (
        ("reshuffle", 1e5, (4, 8, 16), CURVATURE),
        ("shuffle-once", 1e3, (8, 16, 32), {}),
        ("with-replacement", 1e2, (8, 16, 32), {}),
    )
    return [
        cell(n, sampling, noise, options) for sampling, noise, ns, options in designs for n in ns
    ]


def samples_cells(scale: Scale) -> list[Any]:
    """Hybrid steps over numbers of samples."""
    return [
        Cell(
            "samples",
            {"n": n},
            "quadratic",
            quadratic(n, flat(8), flat(2), noise_x=4.0, noise_y=0.5, height_y=0.1),
            ZEROTH,
            Rates(-18, -2, scale.per_octave),
            doubling(16, 2048, scale),
            scale.num_seeds,
        )
        for n in (4, 8, 16, 32, 64, 128)[: scale.keep]
    ]


def order_n_claims() -> list[Claim]:
    """Claims on the experiment 'order-n'."""
    powers = {"n^-1/3": -1 / 3, "n^-1/2": -1 / 2, "n^-2/3": -2 / 3}
    bound, usual = MKR + " (a bound)", "the usual bound of SGD"
    attained = "the bound's n^-1/3 is attained"
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
            ("reshuffle", f"Reshuffling without zeroth-order noise: {attained}", bound, "n^-1/3"),
            ("shuffle-once", "Shuffling once attains the bound's n^-1/3", bound, "n^-1/3"),
            ("with-replacement", "Sampling with replacement: n^-1/2", usual, "n^-1/2"),
        )
    ]


def samples_claims() -> list[Claim]:
    """Claims on the experiment 'samples'."""
    axis = {"where": {}, "label": "n", "x_title": "samples n"}
    return [
        over_epochs(
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
            epochs.epochs_under_cap,
            {"where": {}, "power": 0.5, "name": "rates c / √(T n)"},
            "n^-1",
            {"n^-1": -1.0, "n^0": 0.0},
        ),
        Claim(
            "epochs-with-sqrt-t-n",
            "samples",
            "Rates c / (√T n): epochs to ε do not depend on n",
            PAPER + ", reading √T n",
            epochs.epochs_under_cap,
            {"where": {}, "power": 1.0, "name": "rates c / (√T n)"},
            "n^0",
            {"n^-1": -1.0, "n^0": 0.0},
        ),
        Claim(
            "predicted-epochs",
            "samples",
            "Epochs to ε are 2 F σ_x² (tr H + ‖H‖) / (n ε⁴), within a quarter",
            OURS,
            epochs.predicted_epochs,
            {"where": {}, "constant": _predicted_constant},
            (0.75, 1.25),
        ),
    ]


def _predicted_constant(options: Mapping[str, Any]) -> float:
    """C of T = C / (n ε⁴) for a flat spectrum of curvature 1 and equal rates."""
    num = int(options["spectrum_x"]["num"])
    height = float(options.get("height_x", 1.0)) + float(options.get("height_y", 1.0))
    return 2 * height * float(options["noise_x"]) * (num + 1)
