"""The experiments, as a table: what each is to settle, and how."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final

from zofo.convergence.claims import Claim
from zofo.convergence.experiments import dimension, estimate, growth, order, rates, samples, zeroth
from zofo.convergence.experiments.scale import FULL as FULL
from zofo.convergence.experiments.scale import QUICK as QUICK
from zofo.convergence.experiments.scale import Scale


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


EXPERIMENTS: Final[tuple[Experiment, ...]] = (
    Experiment(
        "order",
        "Order of the samples, exact gradients",
        "Is reshuffling's exponent that of ε⁻³, and that of sampling with replacement ε⁻⁴?",
        "Both blocks by their gradients. Quadratics whose samples differ in gradient and curvature "
        "(curvature) or in gradient only (gradient), and a network with a low-rank adapter.",
        order.order_cells,
    ),
    Experiment(
        "order-n",
        "Number of samples, exact gradients",
        "Which power of n goes with which order?",
        "Both blocks by their gradients, 4 to 32 samples of the same variance.",
        samples.order_n_cells,
    ),
    Experiment(
        "last",
        "The last epoch, strongly convex, exact gradients",
        "Are the known rates of strongly convex sums seen where they should be?",
        "‖∇f‖² at the end of a run, not the mean over it, at the best rate for each T.",
        order.last_cells,
    ),
    Experiment(
        "zeroth",
        "Order of the samples, zeroth-order base",
        "Does the noise of fresh directions bring ε⁻⁴ back?",
        "The same with the base moved by differences.",
        zeroth.zeroth_cells,
    ),
    Experiment(
        "samples",
        "Number of samples: the two readings of the second cap",
        "√(T n) or √T n?",
        "Hybrid steps on one quadratic, n = 4 to 128 samples of the same variance.",
        samples.samples_cells,
    ),
    Experiment(
        "dimension",
        "Dimension of the base, effective rank",
        "Is it the dimension or the effective rank that the base's rate must shrink with?",
        "Hybrid steps, d_x = 4 to 64: flat spectrum, and four large curvatures with a faint tail.",
        dimension.dimension_cells,
    ),
    Experiment(
        "caps",
        "The largest rate that does not diverge",
        "Does it shrink with n, with d_x, or with the effective rank?",
        "A fine grid of base rates, the adapter at rest; quadratics.",
        dimension.caps_cells,
    ),
    Experiment(
        "estimate",
        "One estimate: error, bias, size",
        "What do forward and central difference cost in eps and d_x?",
        "Directions drawn at one point; exponential law, flat and low-rank quadratics.",
        estimate.estimate_cells,
    ),
    Experiment(
        "eps",
        "The largest harmless eps",
        "How must eps shrink with d_x?",
        "Hybrid steps with the forward difference over a grid of eps and d_x.",
        estimate.eps_cells,
    ),
    Experiment(
        "two-rates",
        "One learning rate or two",
        "Does one rate for both blocks diverge or crawl?",
        "L_x = 1, L_y = 1 / ratio, heights so that both gradients start alike; every pair of rates "
        "on a grid.",
        rates.two_rates_cells,
    ),
    Experiment(
        "directions",
        "Directions: distribution, estimator, number",
        "Gaussian or ±1, forward or central, how many?",
        "Hybrid steps at small eps; the base's part of the gradient.",
        rates.directions_cells,
    ),
    Experiment(
        "growth",
        "Smoothness that grows with the gradient",
        "Does the cap follow ℓ(‖∇f‖) at the start?",
        "φ'' = 1 + |φ'| in the base, from starts ever further out.",
        growth.growth_cells,
    ),
)

CLAIMS: Final[tuple[Claim, ...]] = (
    *order.order_claims(),
    *samples.order_n_claims(),
    *order.last_claims(),
    *zeroth.zeroth_claims(),
    *samples.samples_claims(),
    *dimension.dimension_claims(),
    *estimate.estimate_claims(),
    *estimate.eps_claims(),
    *rates.two_rates_claims(),
    *rates.directions_claims(),
    *growth.growth_claims(),
)
