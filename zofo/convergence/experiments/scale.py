"""Sizes and problems that the experiments share.

The problems are chosen so that a power law shows within the epochs that can be run. The samples'
gradients are large compared with the height of the start, so the cap stops limiting the best rate
early. The spectrum is flat, so all directions converge together. Heights and smoothness constants
are 1 unless stated otherwise.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Final

from zofo.convergence import measures
from zofo.convergence.cells import Cell, Rates
from zofo.convergence.claims import Claim
from zofo.convergence.engine import Setting

FIRST: Final = Setting(base_order="first")
ZEROTH: Final = Setting()


@dataclass(frozen=True)
class Scale:
    """How much is run.

    Attributes:
        num_seeds: seeds of every cell.
        shorter: every number of epochs is divided by 2^shorter.
        keep: largest number of values of a varying label.
        per_octave: rates per factor of 2.
        num_draws: directions per seed of a single estimate.
    """

    num_seeds: int = 24
    shorter: int = 0
    keep: int = 99
    per_octave: int = 2
    num_draws: int = 16384


FULL: Final = Scale()
QUICK: Final = Scale(num_seeds=6, shorter=7, keep=3, per_octave=1, num_draws=256)


def doubling(first: int, last: int, scale: Scale) -> tuple[int, ...]:
    """first, 2 first, ..., last, shortened by the scale to at least three numbers."""
    found = [first]
    while found[-1] < last:
        found.append(2 * found[-1])
    return tuple(found[: max(len(found) - scale.shorter, 3)])


def flat(num: int, curvature: float = 1.0) -> dict[str, Any]:
    """A flat spectrum, as `make_problem` takes it."""
    return {"kind": "flat", "num": num, "curvature": curvature}


def quadratic(num_samples: int, spectrum_x: Any, spectrum_y: Any, **options: Any) -> dict[str, Any]:
    """Options of a quadratic, as `make_problem` takes them."""
    spectra = {"spectrum_x": spectrum_x, "spectrum_y": spectrum_y}
    return {**spectra, "num_samples": num_samples, **options}


CURVATURE: Final = {"curvature_spread": 0.8, "alignment": 1.0}
"""Curvature and gradient vary together over the samples, so an epoch of reshuffling has a bias."""
NETWORK: Final = {"num_samples": 8, "hidden": 4, "inputs": 4, "target_noise": 1.0}


def network_cells(experiment: str, setting: Setting, rates: Rates, scale: Scale) -> list[Any]:
    """Cells on the network, in both orders of the samples."""
    return [
        Cell(
            experiment,
            {"samples": "network", "sampling": sampling},
            "network",
            NETWORK,
            replace(setting, sampling=sampling),
            rates,
            doubling(16, 4096, scale),
            scale.num_seeds,
        )
        for sampling in ("reshuffle", "with-replacement")
    ]


CURVED: Final = {"samples": "curvature"}
"""Labels of the cells in which curvature varies."""
_IN_T: Final = {"T^-1/2 (ε⁻⁴)": -1 / 2, "T^-2/3 (ε⁻³)": -2 / 3, "T^-1 (ε⁻²)": -1.0}
"""Candidates for exponents in T."""


def over_epochs(
    name: str,
    experiment: str,
    statement: str,
    source: str,
    where: Mapping[str, Any],
    claimed: str,
    candidates: Mapping[str, float] = _IN_T,
    **options: Any,
) -> Claim:
    """A claim on the exponent in the number of epochs T."""
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


def reshuffling_gains(name: str, experiment: str, statement: str, source: str) -> Claim:
    """A claim that reshuffling leaves a smaller gradient than sampling with replacement."""
    labels = {
        key: {**CURVED, "sampling": sampling}
        for key, sampling in (("first", "reshuffle"), ("second", "with-replacement"))
    }
    options = {**labels, "name": "reshuffle over with-replacement"}
    return Claim(name, experiment, statement, source, measures.ratio, options, (0.0, 1.0))
