"""Finite sums with known constants, by name.

name         problem                                              ℓ_x, ℓ_y
quadratic    chosen spectra, coupling, samples' curvatures        constant
growing      separable, curvature grows by a law in each block    linear, exponential, polynomial
logistic     ridge or non-convex penalty                          constant
network      two layers, low-rank adapter, not convex             constant, u^{2/3}
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Final

from zofo.convergence.problems.base import Constants, Problem, ProblemModule
from zofo.convergence.problems.growth import Growing, law
from zofo.convergence.problems.logistic import Logistic
from zofo.convergence.problems.network import LowRankNetwork
from zofo.convergence.problems.quadratic import Quadratic, flat, low_rank, power_law
from zofo.errors import UserError

__all__ = [
    "PROBLEMS",
    "Constants",
    "Growing",
    "Logistic",
    "LowRankNetwork",
    "Problem",
    "ProblemModule",
    "Quadratic",
    "law",
    "make_problem",
]

_SPECTRA: Final[Mapping[str, Callable[..., list[float]]]] = {
    "flat": flat,
    "low-rank": low_rank,
    "power-law": power_law,
}


def _spectrum(spec: Mapping[str, Any]) -> list[float]:
    """Curvatures from {"kind": "flat", "num": 8, ...}."""
    options = dict(spec)
    kind = options.pop("kind", "flat")
    if kind not in _SPECTRA:
        raise UserError(f"spectrum is {kind!r}; choose one of {', '.join(_SPECTRA)}")
    return _SPECTRA[kind](**options)


def _quadratic(spectrum_x: Any, spectrum_y: Any, **options: Any) -> Problem:
    spectra = (
        _spectrum(spec) if isinstance(spec, Mapping) else spec for spec in (spectrum_x, spectrum_y)
    )
    return Quadratic(*spectra, **options)


def _growing(law_x: Mapping[str, Any], law_y: Mapping[str, Any], **options: Any) -> Problem:
    return Growing(law(**law_x), law(**law_y), **options)


PROBLEMS: Final[Mapping[str, Callable[..., Problem]]] = {
    "quadratic": _quadratic,
    "growing": _growing,
    "logistic": Logistic,
    "network": LowRankNetwork,
}


def make_problem(name: str, **options: Any) -> Problem:
    """Make a problem from plain values, such as those in a file.

    Args:
        name: a key of `PROBLEMS`.
        options: options of the class; spectra and laws are mappings with a `kind`.

    Raises:
        UserError: for an unknown name or option.
    """
    if name not in PROBLEMS:
        raise UserError(f"problem is {name!r}; choose one of {', '.join(PROBLEMS)}")
    try:
        return PROBLEMS[name](**options)
    except TypeError as error:  # an option that the class does not have
        raise UserError(f"problem {name!r}: {error}") from error
