"""The cells of each experiment.

Problems are chosen so that a power shows within the epochs that can be run: the samples' gradients
are large beside the start's height, so the best rate leaves the cap early; the spectrum is flat, so
every direction has settled. Heights and smoothness are 1 where nothing else is said.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Final

from zofo.convergence.cells import Cell, Rates
from zofo.convergence.engine import Setting
from zofo.convergence.estimates import EstimateCell
from zofo.optim.reshuffle import Sampling

FIRST: Final = Setting(base_order="first")
ZEROTH: Final = Setting()


@dataclass(frozen=True)
class Scale:
    """How much is run.

    Attributes:
        num_seeds: of every cell.
        shorter: factor of 2 that every number of epochs is cut by, as an exponent.
        keep: of a list of values that vary, at most so many.
        per_octave: rates for a factor of 2.
        num_draws: directions of a seed where estimates are looked at alone.
    """

    num_seeds: int = 24
    shorter: int = 0
    keep: int = 99
    per_octave: int = 2
    num_draws: int = 16384


FULL: Final = Scale()
QUICK: Final = Scale(num_seeds=6, shorter=7, keep=3, per_octave=1, num_draws=256)


def doubling(first: int, last: int, scale: Scale) -> tuple[int, ...]:
    """first, 2 first, ..., last, cut as the scale says, but for at least three."""
    found = [first]
    while found[-1] < last:
        found.append(2 * found[-1])
    return tuple(found[: max(len(found) - scale.shorter, 3)])


def flat(num: int, curvature: float = 1.0) -> dict[str, Any]:
    """A flat spectrum."""
    return {"kind": "flat", "num": num, "curvature": curvature}


def quadratic(num_samples: int, spectrum_x: Any, spectrum_y: Any, **options: Any) -> dict[str, Any]:
    """Options of a quadratic."""
    return {
        "spectrum_x": spectrum_x,
        "spectrum_y": spectrum_y,
        "num_samples": num_samples,
        **options,
    }


CURVATURE: Final = {"curvature_spread": 0.8, "alignment": 1.0}
"""Samples differ in curvature and gradient together: an epoch of reshuffling has a bias."""
NETWORK: Final = {"num_samples": 8, "hidden": 4, "inputs": 4, "target_noise": 1.0}


def order(scale: Scale) -> list[Any]:
    """Both blocks by exact gradients, in each order of the samples."""
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
    return cells + _network("order", FIRST, Rates(-11, 3, scale.per_octave), scale)


def order_n(scale: Scale) -> list[Any]:
    """The same over numbers of samples."""

    def cell(n: int, sampling: Sampling, noise: float, options: dict[str, Any]) -> Cell:
        return Cell(
            "order-n",
            {"sampling": sampling, "n": n},
            "quadratic",
            quadratic(n, flat(6), flat(2), noise_x=noise, noise_y=noise, **options),
            replace(FIRST, sampling=sampling),
            Rates(-16, -3, scale.per_octave),
            doubling(1024, 8192, scale),
            # Shuffling once has one permutation a seed.
            scale.num_seeds * (4 if sampling == "shuffle-once" else 1),
        )

    # Where curvature differs too, shuffling once shares reshuffling's bias, which hides its n. The
    # noise is what brings each into its limit: small best rates, but every direction settled.
    designs: tuple[tuple[Sampling, float, tuple[int, ...], dict[str, Any]], ...] = (
        ("reshuffle", 1e5, (4, 8, 16), CURVATURE),
        ("shuffle-once", 1e3, (8, 16, 32), {}),
        ("with-replacement", 1e2, (8, 16, 32), {}),
    )
    return [
        cell(n, sampling, noise, options) for sampling, noise, ns, options in designs for n in ns
    ]


def _network(experiment: str, setting: Setting, rates: Rates, scale: Scale) -> list[Any]:
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


def last(scale: Scale) -> list[Any]:
    """The end of a run, which many seeds are needed for: one value a run, no mean over epochs."""
    samplings: tuple[Sampling, ...] = ("reshuffle", "with-replacement")
    return [
        Cell(
            "last",
            {"sampling": sampling},
            "quadratic",
            quadratic(4, flat(6), flat(2), noise_x=10.0, noise_y=10.0, **CURVATURE),
            replace(FIRST, sampling=sampling),
            # The value rises steeply below the best rate.
            Rates(-13, -1, 4 * scale.per_octave),
            doubling(32, 2048, scale),
            8 * scale.num_seeds,
        )
        for sampling in samplings
    ]


def zeroth(scale: Scale) -> list[Any]:
    """The base by differences, in each order."""
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
    return cells + _network("zeroth", ZEROTH, Rates(-13, 0, scale.per_octave), scale)


SAMPLES: Final = {"noise_x": 4.0, "noise_y": 0.5, "height_y": 0.1}


def samples(scale: Scale) -> list[Any]:
    """Hybrid steps over numbers of samples."""
    return [
        Cell(
            "samples",
            {"n": n},
            "quadratic",
            quadratic(n, flat(8), flat(2), **SAMPLES),
            ZEROTH,
            Rates(-18, -2, scale.per_octave),
            doubling(16, 2048, scale),
            scale.num_seeds,
        )
        for n in (4, 8, 16, 32, 64, 128)[: scale.keep]
    ]


def dimension(scale: Scale) -> list[Any]:
    """Hybrid steps over dimensions, at growing and at held effective rank."""
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


def caps(scale: Scale) -> list[Any]:
    """Rates up to where runs diverge."""

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


def estimate(scale: Scale) -> list[Any]:
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

    wide = [2.0**k for k in (-8, -7, -6, -5, -4, -3)]
    cells = [
        cell({"of": "error", "estimator": e}, "growing", bent, wide) for e in ("forward", "central")
    ]
    large = [2.0**k for k in (-3, -2.5, -2, -1.5, -1)]
    cells += [
        cell({"of": "bias", "estimator": e}, "growing", bent, large) for e in ("forward", "central")
    ]
    for kind in ("flat", "low-rank"):
        for d in (16, 64, 256, 1024)[: scale.keep]:
            spectrum = {"kind": kind, "num": d, **({"rank": 4} if kind == "low-rank" else {})}
            labels = {"of": "size", "estimator": "forward", "spectrum": kind, "d_x": d}
            cells.append(cell(labels, "quadratic", quadratic(4, spectrum, flat(2)), (0.1,), 8))
    return cells


def eps(scale: Scale) -> list[Any]:
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


def two_rates(scale: Scale) -> list[Any]:
    """Every pair of rates, over ratios of smoothness."""
    return [
        Cell(
            "two-rates",
            {"ratio": ratio},
            "quadratic",
            quadratic(
                4,
                flat(8),
                flat(2, 1 / ratio),
                noise_x=1.0,
                noise_y=1.0,
                height_y=float(ratio),
            ),
            ZEROTH,
            Rates(-11, 11, 1, high_y=11),
            doubling(64, 1024, scale),
            scale.num_seeds,
        )
        for ratio in (1, 10, 100, 1000)[: max(scale.keep, 3)]
    ]


def directions(scale: Scale) -> list[Any]:
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
            # The ratio at d = 4 is known in closed form, and cheap.
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


def growth(scale: Scale) -> list[Any]:
    """Rates up to where runs diverge, from starts ever further out."""
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
