"""Experiments on the order of the samples, with exact gradients."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, Final

from zofo.convergence.cells import Cell, Rates
from zofo.convergence.claims import MKR, Claim
from zofo.convergence.experiments.scale import (
    CURVATURE,
    CURVED,
    FIRST,
    Scale,
    doubling,
    flat,
    network_cells,
    over_epochs,
    quadratic,
    reshuffling_gains,
)
from zofo.optim.reshuffle import Sampling

_LAST: Final = "Safran, Shamir, arXiv 1908.00045; Rajput et al., arXiv 2002.10400"
SHARP_T: Final = {"T^-1/2": -1 / 2, "T^-2/3": -2 / 3, "T^-3/4": -3 / 4, "T^-1": -1.0}


def order_cells(scale: Scale) -> list[Any]:
    """Both blocks with exact gradients, in each order of the samples."""
    epochs = doubling(16, 16384, scale)
    rates = Rates(-15, -2, scale.per_octave)
    variants: tuple[tuple[str, tuple[Sampling, ...], dict[str, Any]], ...] = (
        ("curvature", ("reshuffle", "shuffle-once", "with-replacement"), CURVATURE),
        ("gradient", ("reshuffle", "with-replacement"), {}),
    )
    cells = []
    for variant, samplings, spread in variants:
        options = quadratic(4, flat(6), flat(2), noise_x=100.0, noise_y=100.0, **spread)
        cells += [
            Cell(
                "order",
                {"samples": variant, "sampling": sampling},
                "quadratic",
                options,
                replace(FIRST, sampling=sampling),
                rates,
                epochs,
                scale.num_seeds,
            )
            for sampling in samplings
        ]
    return cells + network_cells("order", FIRST, Rates(-11, 3, scale.per_octave), scale)


def last_cells(scale: Scale) -> list[Any]:
    """The end of a run. It needs many seeds, because each run gives a single value."""
    samplings: tuple[Sampling, ...] = ("reshuffle", "with-replacement")
    return [
        Cell(
            "last",
            {"sampling": sampling},
            "quadratic",
            quadratic(4, flat(6), flat(2), noise_x=10.0, noise_y=10.0, **CURVATURE),
            replace(FIRST, sampling=sampling),
            # The grid is fine, because the value rises steeply below the best rate.
            Rates(-13, -1, 4 * scale.per_octave),
            doubling(32, 2048, scale),
            8 * scale.num_seeds,
        )
        for sampling in samplings
    ]


def order_claims() -> list[Claim]:
    """Claims on the experiment 'order'."""

    def sharp(
        name: str, statement: str, samples: str, sampling: str = "reshuffle", source: str = MKR
    ) -> Claim:
        where = {"samples": samples, "sampling": sampling}
        return over_epochs(name, "order", statement, source, where, "T^-2/3", SHARP_T)

    return [
        sharp(
            "reshuffle-first",
            "Reshuffling without zeroth-order noise: ‖∇f‖² falls as T^-2/3, ε⁻³",
            "curvature",
        ),
        sharp(
            "shuffle-once-first",
            "Shuffling once has reshuffling's exponent",
            "curvature",
            "shuffle-once",
        ),
        over_epochs(
            "with-replacement-first",
            "order",
            "Sampling with replacement: T^-1/2, ε⁻⁴",
            "the usual bound of SGD",
            {**CURVED, "sampling": "with-replacement"},
            "T^-1/2 (ε⁻⁴)",
        ),
        reshuffling_gains(
            "reshuffle-gain-first",
            "order",
            "Without zeroth-order noise reshuffling reaches a lower ‖∇f‖² than sampling with "
            "replacement",
            MKR,
        ),
        sharp(
            "reshuffle-gradient-only",
            "T^-2/3 is attained where samples differ in their gradients only",
            "gradient",
            source=MKR + " (a bound)",
        ),
        over_epochs(
            "network-first",
            "order",
            "On the network (not convex), reshuffling without zeroth-order noise: T^-2/3",
            MKR,
            {"samples": "network", "sampling": "reshuffle"},
            "T^-2/3 (ε⁻³)",
            last=4,
        ),
    ]


def last_claims() -> list[Claim]:
    """Claims on the experiment 'last'."""
    return [
        over_epochs(
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
            ("reshuffle", "reshuffling", -2.0, _LAST),
            ("with-replacement", "with replacement", -1.0, "the usual bound of SGD"),
        )
    ]
