"""Autograd confirms every constant that a problem states, at sampled and at extreme points."""

import math

import numpy as np
import pytest
import torch

from zofo.convergence import kernels
from zofo.convergence.problems import make_problem
from zofo.convergence.problems.base import Problem
from zofo.errors import UserError

FLAT = {"kind": "flat", "num": 3, "curvature": 2.0}
SPECIMENS = {
    "quadratic": {
        "spectrum_x": {"kind": "power-law", "num": 4, "exponent": 1.0},
        "spectrum_y": {"kind": "flat", "num": 2, "curvature": 30.0},
        "coupling": 0.9,
        "curvature_spread": 0.8,
        "alignment": 0.6,
    },
    "quadratic-plain": {"spectrum_x": FLAT, "spectrum_y": {"kind": "flat", "num": 3}},
    "growing-linear": {
        "law_x": {"kind": "linear", "l1": 3.0},
        "law_y": {"kind": "exponential", "l0": 0.2},
    },
    "growing-polynomial": {
        "law_x": {"kind": "polynomial", "l0": 0.5, "a": 2.0, "p": 4.0},
        "law_y": {"kind": "polynomial", "p": 3.0},
    },
    "logistic": {"scale_x": 3.0},
    "logistic-nonconvex": {"regulariser": "nonconvex", "strength": 2.0},
    "network": {"hidden": 3, "inputs": 4, "rank": 2, "num_samples": 5},
}


def specimen(name):
    return make_problem(name.split("-")[0], **SPECIMENS[name])


@pytest.fixture(params=SPECIMENS)
def problem(request):
    return specimen(request.param)


def points(problem, num=6, seed=0):
    """Return the start, the origin, and random points from very near to very far."""
    generator = torch.Generator().manual_seed(seed)
    d = problem.d_x + problem.d_y
    found = [problem.start(), torch.zeros(d, dtype=torch.float64)]
    for size in torch.logspace(-3, 1, num).tolist():
        direction = torch.randn(d, dtype=torch.float64, generator=generator)
        found.append(size * direction)
        # This point differs from zero in one coordinate only.
        axis = torch.zeros(d, dtype=torch.float64)
        axis[int(size * 1000) % d] = size
        found.append(axis)
    return found


def test_the_diagonal_majorises_the_hessian_both_ways(problem):
    for w in points(problem):
        assert problem.majoriser_margin(w) >= -1e-10


def test_smoothness_never_falls_and_is_subquadratic(problem):
    us = np.logspace(-3, 9, 25)
    for ell in (problem.constants.ell_x, problem.constants.ell_y):
        values = np.array([ell(u) for u in us])
        assert (np.diff(values) >= 0).all()
        assert values[-1] / us[-1] ** 2 < 1e-6 * values[0] / us[0] ** 2


@pytest.mark.parametrize(
    ("name", "slack"),
    [("growing-linear", 1e-9), ("growing-polynomial", 0.3), ("quadratic-plain", 1e-9)],
)
def test_the_smoothness_of_the_base_is_attained(name, slack):
    problem = specimen(name)
    w = torch.zeros(problem.d_x + problem.d_y, dtype=torch.float64)
    w[0] = 1.7
    top = float(torch.linalg.eigvalsh(problem.hessian(w)[: problem.d_x, : problem.d_x])[-1])
    assert top == pytest.approx(
        problem.constants.ell_x(float(problem.gradient(w).norm())), rel=slack
    )


def test_coupled_quadratic_spectrum_is_that_of_its_2_by_2_blocks():
    problem = specimen("quadratic")
    hessian = problem.hessian(problem.start())
    blocks = [
        np.linalg.eigvalsh([[float(problem.h[j]), 0.9], [0.9, float(problem.k[j])]])
        for j in range(2)
    ]
    expected = np.sort(np.concatenate([*blocks, problem.h[2:].numpy()]))
    assert np.linalg.eigvalsh(hessian.numpy()) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("name", [name for name in SPECIMENS if name != "network"])
def test_the_variance_of_the_samples_is_bounded_as_stated(name):
    problem = specimen(name)
    sigma2 = problem.constants.sigma2
    for w in points(problem):
        gradient2 = float(problem.gradient(w).square().sum())
        bound = sigma2 + problem.constants.noise_growth * gradient2
        assert problem.sample_variance(w) <= bound * (1 + 1e-9)


def test_without_spread_the_variance_is_exact_everywhere():
    problem = specimen("quadratic-plain")
    assert problem.constants.sigma2 == pytest.approx(2.0, rel=1e-12)
    for w in points(problem):
        assert problem.sample_variance(w) == pytest.approx(2.0, rel=1e-9)


def test_f_star_is_reached_or_bounds(problem):
    constants = problem.constants
    for w in points(problem):
        assert float(problem.value(w)) >= constants.f_star - 1e-12
    if constants.f_star_is_exact:
        w = problem.start().clone().requires_grad_()
        optimizer = torch.optim.LBFGS([w], max_iter=500, line_search_fn="strong_wolfe")
        optimizer.step(lambda: _backward(problem, w, optimizer))
        assert float(problem.value(w.detach())) == pytest.approx(constants.f_star, abs=1e-5)


def _backward(problem, w, optimizer):
    optimizer.zero_grad()
    loss = problem.value(w)
    loss.backward()
    return loss


def test_closed_forms_agree_with_autograd(problem):
    rows = problem.rows(torch.arange(problem.num_samples))
    for w in points(problem):
        wide = w.expand(problem.num_samples, -1)
        expected = Problem.gradients(problem, wide, rows)
        assert torch.allclose(problem.gradients(wide, rows), expected, rtol=1e-10, atol=1e-10)
        assert torch.allclose(problem.gradient(w), expected.mean(0), rtol=1e-9, atol=1e-9)
        mean = problem.losses(wide, rows).mean()
        assert torch.allclose(problem.value(w), mean, rtol=1e-10, atol=1e-10)


def test_batches_are_their_points(problem):
    w = torch.stack(points(problem)[:6]).view(2, 3, -1)
    samples = torch.tensor([0, 2, 1])
    rows = problem.rows(samples)
    losses, gradients = problem.losses(w, rows), problem.gradients(w, rows)
    for i in range(2):
        for j in range(3):
            row = problem.rows(samples[j])
            assert torch.allclose(losses[i, j], problem.losses(w[i, j], row), rtol=1e-12)
            assert torch.allclose(gradients[i, j], problem.gradients(w[i, j], row), rtol=1e-12)


def test_the_compiled_form_agrees(problem):
    kind, params, data, mean_row = problem.compiled()
    d = problem.d_x + problem.d_y
    scratch, part, out = np.zeros(2 * d + 2), np.zeros(d), np.zeros(d)
    for w in points(problem):
        for i in range(2):
            rows = problem.rows(torch.tensor(i))
            loss = kernels.loss_of(kind, problem.d_x, params, data[i], w.numpy(), scratch)
            assert loss == pytest.approx(float(problem.losses(w, rows)), rel=1e-11, abs=1e-11)
            kernels.gradient_of(kind, problem.d_x, params, data[i], w.numpy(), scratch, 0, out)
            expected = problem.gradients(w, rows).numpy()
            assert out == pytest.approx(expected, rel=1e-10, abs=1e-10)
        args = (kind, problem.d_x, params, data, mean_row, w.numpy(), scratch, part, out)
        kernels.whole_gradient(*args)
        assert out == pytest.approx(problem.gradient(w).numpy(), rel=1e-10, abs=1e-10)


def test_effective_rank():
    low = {"kind": "low-rank", "num": 100, "rank": 4}
    problem = make_problem("quadratic", spectrum_x=low, spectrum_y=FLAT)
    hessian = problem.hessian(problem.start())[:100, :100]
    rank = float(hessian.trace() / torch.linalg.matrix_norm(hessian, 2))
    assert problem.constants.effective_rank_x == pytest.approx(rank, rel=1e-9)
    assert rank == pytest.approx(4.04, rel=1e-9)


def test_heights_of_the_start():
    problem = make_problem(
        "quadratic", spectrum_x=FLAT, spectrum_y=FLAT, height_x=3.0, height_y=0.25
    )
    assert float(problem.value(problem.start())) == pytest.approx(3.25, rel=1e-12)


def test_the_networks_smoothness_differs_by_block_and_grows():
    constants = specimen("network").constants
    assert constants.l_x < math.inf
    assert constants.l_y == math.inf
    slope = math.log(constants.ell_y(1e8) / constants.ell_y(1e6)) / math.log(100)
    assert slope == pytest.approx(2 / 3, abs=1e-3)


@pytest.mark.parametrize(
    ("name", "options", "said"),
    [
        ("cubic", {}, "choose one of quadratic"),
        ("quadratic", {"spectrum_x": [1.0], "spectrum_y": [1.0], "coupling": 2.0}, "coupling is 2"),
        ("quadratic", {"spectrum_x": [-1.0], "spectrum_y": [1.0]}, "must be positive"),
        ("quadratic", {"spectrum_x": {"kind": "steep"}, "spectrum_y": [1.0]}, "spectrum is"),
        ("growing", {"law_x": {"kind": "cubic"}, "law_y": {"kind": "linear"}}, "law is 'cubic'"),
        ("growing", {"law_x": {"kind": "linear", "l1": 0.0}, "law_y": {"kind": "linear"}}, "l1 is"),
        ("logistic", {"regulariser": "lasso"}, "choose one of ridge"),
        ("network", {"quartic": 0.0}, "at least 0, the second positive"),
        ("logistic", {"width": 3}, "width"),
    ],
)
def test_wrong_options_are_said(name, options, said):
    with pytest.raises(UserError, match=said):
        make_problem(name, **options)
