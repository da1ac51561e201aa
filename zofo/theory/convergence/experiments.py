"""The experiments, as a table: what varies, over which grid of rates, for how long.

Problems are chosen so that a power shows within the epochs that can be run: the samples' gradients
are large beside the start's height, so the best rate leaves the cap early; the spectrum is flat, so
every direction has settled. Heights and smoothness are 1 where nothing else is said.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Final

from zofo.theory.convergence.cells import Cell, Rates
from zofo.theory.convergence.engine import Setting
from zofo.theory.convergence.estimates import EstimateCell

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
QUICK: Final = Scale(num_seeds=6, shorter=4, keep=3, per_octave=1, num_draws=256)


@dataclass(frozen=True)
class Experiment:
    """Cells that belong together.

    Attributes:
        name: on the command line.
        title: for readers.
        question: what it is to settle.
        design: how.
        build: the cells at a scale.
    """

    name: str
    title: str
    question: str
    design: str
    build: Callable[[Scale], list[Any]]


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


def _order(scale: Scale) -> list[Any]:
    epochs = doubling(16, 4096, scale)
    rates = Rates(-12, -1, scale.per_octave)
    cells = []
    for variant, samplings, options in (
        (
            "curvature",
            ("reshuffle", "shuffle-once", "with-replacement"),
            quadratic(4, flat(6), flat(2), noise_x=10.0, noise_y=10.0, **CURVATURE),
        ),
        (
            "gradient",
            ("reshuffle", "with-replacement"),
            quadratic(4, flat(6), flat(2), noise_x=10.0, noise_y=10.0),
        ),
    ):
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
    return cells + _network("order", FIRST, Rates(-10, 3, scale.per_octave), scale)


def _network(experiment: str, setting: Setting, rates: Rates, scale: Scale) -> list[Any]:
    return [
        Cell(
            experiment,
            {"samples": "network", "sampling": sampling},
            "network",
            NETWORK,
            replace(setting, sampling=sampling),
            rates,
            doubling(16, 1024, scale),
            scale.num_seeds,
        )
        for sampling in ("reshuffle", "with-replacement")
    ]


def _zeroth(scale: Scale) -> list[Any]:
    options = quadratic(4, flat(8), flat(2), noise_x=4.0, noise_y=4.0, **CURVATURE)
    cells = [
        Cell(
            "zeroth",
            {"samples": "curvature", "sampling": sampling},
            "quadratic",
            options,
            replace(ZEROTH, sampling=sampling),
            Rates(-14, -2, scale.per_octave),
            doubling(16, 4096, scale),
            scale.num_seeds,
        )
        for sampling in ("reshuffle", "shuffle-once", "with-replacement")
    ]
    return cells + _network("zeroth", ZEROTH, Rates(-12, 0, scale.per_octave), scale)


SAMPLES: Final = {"noise_x": 4.0, "noise_y": 0.5, "height_y": 0.1}


def _samples(scale: Scale) -> list[Any]:
    return [
        Cell(
            "samples",
            {"n": n},
            "quadratic",
            quadratic(n, flat(8), flat(2), **SAMPLES),
            ZEROTH,
            Rates(-14, 1, scale.per_octave),
            doubling(16, 2048, scale),
            scale.num_seeds,
        )
        for n in (4, 8, 16, 32, 64)[: scale.keep]
    ]


def _dimension(scale: Scale) -> list[Any]:
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
            Rates(-14, 1, scale.per_octave),
            doubling(64, 2048, scale),
            scale.num_seeds,
        )
        for kind, make in spectra.items()
        for d in dims
    ]


def _estimate(scale: Scale) -> list[Any]:
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


def _eps(scale: Scale) -> list[Any]:
    return [
        Cell(
            "eps",
            {"d_x": d, "eps": 2.0**k},
            "quadratic",
            quadratic(4, flat(d), flat(2), noise_x=4.0, noise_y=0.1, height_y=0.01),
            replace(ZEROTH, eps=2.0**k),
            Rates(-13, -1, scale.per_octave),
            doubling(64, 512, scale),
            scale.num_seeds,
        )
        for d in (4, 8, 16, 32, 64)[: scale.keep]
        for k in range(-7, 4, 1 if scale.keep > 9 else 3)
    ]


def _two_rates(scale: Scale) -> list[Any]:
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


def _directions(scale: Scale) -> list[Any]:
    def cell(labels: dict[str, Any], d: int, setting: Setting) -> Cell:
        return Cell(
            "directions",
            labels,
            "quadratic",
            quadratic(4, flat(d), flat(2), noise_x=4.0, noise_y=0.1, height_y=0.01),
            setting,
            Rates(-13, 1, scale.per_octave),
            doubling(64, 2048, scale),
            scale.num_seeds,
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


def _growth(scale: Scale) -> list[Any]:
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


EXPERIMENTS: Final[tuple[Experiment, ...]] = (
    Experiment(
        "order",
        "Order of the samples, exact gradients",
        "Is reshuffling's exponent that of ε⁻³, and that of sampling with replacement ε⁻⁴?",
        "Both blocks by their gradients. Quadratics whose samples differ in gradient and curvature "
        "(curvature) or in gradient only (gradient), and a network with a low-rank adapter.",
        _order,
    ),
    Experiment(
        "zeroth",
        "Order of the samples, zeroth-order base",
        "Does the noise of fresh directions bring ε⁻⁴ back?",
        "The same with the base moved by differences.",
        _zeroth,
    ),
    Experiment(
        "samples",
        "Number of samples: the two readings of the second cap",
        "√(T n) or √T n?",
        "Hybrid steps on one quadratic, n = 4 to 64 samples of the same variance.",
        _samples,
    ),
    Experiment(
        "dimension",
        "Dimension of the base, effective rank",
        "Is it the dimension or the effective rank that the base's rate must shrink with?",
        "Hybrid steps, d_x = 4 to 64: flat spectrum, and four large curvatures with a faint tail.",
        _dimension,
    ),
    Experiment(
        "estimate",
        "One estimate: error, bias, size",
        "What do forward and central difference cost in eps and d_x?",
        "Directions drawn at one point; exponential law, flat and low-rank quadratics.",
        _estimate,
    ),
    Experiment(
        "eps",
        "The largest harmless eps",
        "How must eps shrink with d_x?",
        "Hybrid steps with the forward difference over a grid of eps and d_x.",
        _eps,
    ),
    Experiment(
        "two-rates",
        "One learning rate or two",
        "Does one rate for both blocks diverge or crawl?",
        "L_x = 1, L_y = 1 / ratio, heights so that both gradients start alike; every pair of rates "
        "on a grid.",
        _two_rates,
    ),
    Experiment(
        "directions",
        "Directions: distribution, estimator, number",
        "Gaussian or ±1, forward or central, how many?",
        "Hybrid steps at small eps; the base's part of the gradient.",
        _directions,
    ),
    Experiment(
        "growth",
        "Smoothness that grows with the gradient",
        "Does the cap follow ℓ(‖∇f‖) at the start?",
        "φ'' = 1 + |φ'| in the base, from starts ever further out.",
        _growth,
    ),
)
