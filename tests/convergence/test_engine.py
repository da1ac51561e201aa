"""The compiled engine takes the steps of `zofo.HybridOptimizer` on the samples of its sampler."""

import itertools

import numpy as np
import pytest
import torch

from zofo.convergence import engine, kernels, reference
from zofo.convergence.cells import Cell, Rates, digest_of
from zofo.convergence.engine import Setting
from zofo.convergence.problems import ProblemModule, make_problem
from zofo.errors import UserError
from zofo.noise.combine import direction
from zofo.optim.reshuffle import SAMPLINGS

SEEDS = (3, 2**63 + 11)
SMALL = {
    "spectrum_x": {"kind": "power-law", "num": 5, "exponent": 0.5},
    "spectrum_y": [2.0, 1.0],
    "num_samples": 3,
    "coupling": 0.3,
    "curvature_spread": 0.5,
    "alignment": 0.5,
}
ONE_RATE, TWO_RATES = [(0.02, 0.02)], [(0.01, 0.1), (0.003, 0.05)]
TOLERANCE = 1e-10
"""Relative tolerance.

The rounding of a loss, 1e-16, grows when it is divided by eps and over a dozen steps.
"""


def assert_same(problem, setting, rates=TWO_RATES, checkpoints=(0, 1, 4)):
    fast = engine.run(problem, setting, rates, SEEDS, checkpoints)
    slow = reference.run(problem, setting, rates, SEEDS, checkpoints)
    assert not np.allclose(fast.w, problem.start().numpy(), atol=1e-3)
    for name in ("w", "mean_x", "mean_y", "last"):
        found, expected = getattr(fast, name), getattr(slow, name)
        assert found == pytest.approx(expected, rel=TOLERANCE, abs=TOLERANCE), name


@pytest.mark.parametrize("sampling", SAMPLINGS)
@pytest.mark.parametrize("rates", [ONE_RATE, TWO_RATES], ids=["one rate", "two rates"])
@pytest.mark.parametrize(
    ("estimator", "distribution", "num_directions"),
    [
        *itertools.product(("forward", "central"), ("gaussian", "rademacher"), (1,)),
        ("forward", "gaussian", 3),
        ("central", "rademacher", 2),
    ],
)
def test_every_option_gives_the_optimizers_iterates(
    sampling, rates, estimator, distribution, num_directions
):
    setting = Setting(
        sampling=sampling,
        estimator=estimator,
        distribution=distribution,
        num_directions=num_directions,
        eps=1e-3,
    )
    assert_same(make_problem("quadratic", **SMALL), setting, rates, (0, 2))


@pytest.mark.parametrize("sampling", SAMPLINGS)
def test_exact_gradients_in_both_blocks(sampling):
    assert_same(make_problem("quadratic", **SMALL), Setting(base_order="first", sampling=sampling))


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("growing", {"law_x": {"kind": "linear"}, "law_y": {"kind": "polynomial"}}),
        ("logistic", {"num_samples": 3}),
        ("network", {"num_samples": 3, "rank": 2}),
    ],
)
def test_every_problem(name, options):
    options = {"num_samples": 3, **options}
    assert_same(make_problem(name, **options), Setting(eps=1e-3))


@pytest.mark.parametrize("num", [1, 127, 128, 129, 300])
@pytest.mark.parametrize("distribution", ["gaussian", "rademacher"])
def test_directions_are_zofos(num, distribution):
    drawn = kernels.draw_many(3, num, np.uint64(SEEDS[1]), distribution == "gaussian")
    for step in range(3):
        expected = direction((num,), seed=SEEDS[1], step=step, tensor=0, distribution=distribution)
        assert np.array_equal(drawn[step].astype(np.float32), expected.numpy())


def test_a_seed_does_not_depend_on_its_neighbours():
    problem, setting = make_problem("quadratic", **SMALL), Setting()
    together = engine.run(problem, setting, TWO_RATES, (1, 2, 3), (2,))
    alone = engine.run(problem, setting, TWO_RATES[1:], (2,), (2,))
    assert np.array_equal(together.w[1, 1], alone.w[0, 0])


def test_checkpoints_are_prefixes():
    problem, setting = make_problem("quadratic", **SMALL), Setting()
    long = engine.run(problem, setting, TWO_RATES, SEEDS, (1, 3, 70))
    short = engine.run(problem, setting, TWO_RATES, SEEDS, (3,))
    assert np.array_equal(long.mean_x[1], short.mean_x[0])
    assert np.array_equal(long.last[1], short.last[0])


def test_what_is_measured_is_the_mean_over_starts_of_epochs():
    problem, setting = make_problem("quadratic", **SMALL), Setting(base_order="first")
    traces = engine.run(problem, setting, ONE_RATE, SEEDS, (0, 1, 2, 3))
    expected = (traces.last[0] + traces.last[1] + traces.last[2]) / 3
    assert traces.mean[3] == pytest.approx(expected, rel=1e-12)


def test_a_diverged_run_counts_as_infinite_and_harms_no_other():
    problem, setting = make_problem("quadratic", **SMALL), Setting()
    both = engine.run(problem, setting, [(0.01, 0.01), (50.0, 0.01)], SEEDS, (1, 40))
    alone = engine.run(problem, setting, [(0.01, 0.01)], SEEDS, (1, 40))
    assert np.isinf(both.mean[1, 1]).all()
    assert np.array_equal(both.mean[:, 0], alone.mean[:, 0])
    slow = reference.run(problem, setting, [(50.0, 0.01)], SEEDS[:1], (1, 40))
    assert np.isinf(slow.mean[1, 0]).all()


def test_a_rate_of_zero_leaves_the_base_where_it_was():
    problem = make_problem("quadratic", **SMALL)
    traces = engine.run(problem, Setting(), [(0.0, 0.1)], SEEDS, (3,))
    start = problem.split(problem.start())[0].numpy()
    assert np.array_equal(traces.w[0, :, : problem.d_x], np.stack([start] * len(SEEDS)))


def test_steady_state_of_gradient_noise_is_the_closed_form():
    """Sampling with replacement reaches the steady state E‖∇f‖² = γ h σ² / (2 − γ h).

    The curvature h is constant. The test has h = σ = 1 and averages over steps 200 to 2200.
    """
    problem = make_problem(
        "quadratic", spectrum_x=[1.0] * 4, spectrum_y=[1.0], noise_x=1.0, noise_y=0.0, height_y=0.0
    )
    setting = Setting(base_order="first", sampling="with-replacement")
    rate = 0.1
    traces = engine.run(problem, setting, [(rate, rate)], range(8), (200, 2200))
    tail = (2200 * traces.mean_x[1] - 200 * traces.mean_x[0]) / 2000
    assert tail.mean() == pytest.approx(rate / (2 - rate), rel=0.05)


def test_the_modules_point_is_the_start():
    problem = make_problem("quadratic", **SMALL)
    module = ProblemModule(problem)
    assert torch.equal(module.point(), problem.start())
    assert [name for name, p in module.named_parameters() if p.requires_grad] == ["y"]


def test_finished_cells_stay_valid_and_options_that_no_engine_varies_are_refused():
    setting = Setting(num_directions=2)
    options, labels = {"num_samples": 4}, {"samples": "few"}
    cell = Cell("order", labels, "quadratic", options, setting, Rates(-3, 0), (1, 2), 2)
    # Commit b66c549 computed this digest. At that time a setting held only the options that the
    # engines vary.
    assert digest_of(cell, "compiled") == "54ef5627a41d00151cb221531a857923"
    with pytest.raises(UserError, match="base_every"):
        Setting(base_every=2)
    with pytest.raises(UserError, match="vectors, which have no rank"):
        Setting(distribution="rank-one")
