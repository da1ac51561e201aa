"""The table of experiments: the question and the design of each."""

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
    """A question, the design that answers it, and a function that makes its cells at a scale."""

    name: str
    title: str
    question: str
    design: str
    build: Callable[[Scale], list[Any]]


EXPERIMENTS: Final[tuple[Experiment, ...]] = (
    Experiment(
        "order",
        "Order of the samples, exact gradients",
        "Does reshuffling need ε⁻³ epochs, and sampling with replacement ε⁻⁴?",
        "Both blocks use exact gradients. The problems are quadratics whose samples differ in "
        "gradient and curvature (curvature) or only in gradient (gradient), and a network with a "
        "low-rank adapter.",
        order.order_cells,
    ),
    Experiment(
        "order-n",
        "Number of samples, exact gradients",
        "Which power of n does each order have?",
        "Both blocks use exact gradients, with 4 to 32 samples of the same variance.",
        samples.order_n_cells,
    ),
    Experiment(
        "last",
        "The last epoch, strongly convex, exact gradients",
        "Do runs show the known rates of strongly convex sums?",
        "‖∇f‖² is taken at the end of a run, not averaged, at the best rate for each T.",
        order.last_cells,
    ),
    Experiment(
        "zeroth",
        "Order of the samples, zeroth-order base",
        "Does the noise of the random directions lead back to ε⁻⁴?",
        "As in order, but the base is updated by loss differences.",
        zeroth.zeroth_cells,
    ),
    Experiment(
        "samples",
        "Number of samples: the two readings of the second cap",
        "Does the second cap contain √(T n) or √T n?",
        "Hybrid steps on one quadratic, n = 4 to 128 samples of the same variance.",
        samples.samples_cells,
    ),
    Experiment(
        "dimension",
        "Dimension of the base, effective rank",
        "Must the base's rate shrink with the dimension or with the effective rank?",
        "Hybrid steps, d_x = 4 to 64: flat spectrum, or four large curvatures and a small tail.",
        dimension.dimension_cells,
    ),
    Experiment(
        "caps",
        "The largest rate that does not diverge",
        "Does it shrink with n, with d_x, or with the effective rank?",
        "A fine grid of base rates on quadratics; the adapter is not updated.",
        dimension.caps_cells,
    ),
    Experiment(
        "estimate",
        "One estimate: error, bias, size",
        "How do the errors of both differences depend on eps and d_x?",
        "Directions are drawn at one point: exponential law, flat and low-rank quadratics.",
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
        "Does one rate for both blocks diverge or converge slowly?",
        "L_x = 1 and L_y = 1 / ratio; both gradients start with the same size. Every pair of rates "
        "on a grid is run.",
        rates.two_rates_cells,
    ),
    Experiment(
        "directions",
        "Directions: distribution, estimator, number",
        "Gaussian or ±1? Forward or central? How many?",
        "Hybrid steps at small eps; the base's part of the gradient is measured.",
        rates.directions_cells,
    ),
    Experiment(
        "growth",
        "Smoothness that grows with the gradient",
        "Does the cap follow ℓ(‖∇f‖) at the start?",
        "φ'' = 1 + |φ'| in the base, from starts at growing distances.",
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
