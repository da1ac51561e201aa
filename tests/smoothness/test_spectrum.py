"""Spectra of block Hessians agree with closed forms and with dense Hessians from autograd."""

import warnings

import numpy as np
import pytest
import torch

from tests.support.dense import (
    Quadratic,
    blocks_of_quadratic,
    dense_hessian,
    objective_of,
    symmetric,
    tiny_objective,
)
from tests.support.models import assert_same_bits, bits
from zofo.smoothness.blocks import blocks_of
from zofo.smoothness.hessian import BlockHessian
from zofo.smoothness.spectrum import (
    converged_extremes,
    density,
    hutchpp,
    lanczos,
    measure_spectrum,
    signs,
)

DOUBLE = torch.zeros(1, dtype=torch.float64)
SPECTRUM = np.concatenate([[-3.0, -1.0], np.linspace(-0.1, 0.5, 36), [4.0, 9.0]])


@pytest.fixture(scope="module")
def matrix():
    return symmetric(SPECTRUM)


def test_lanczos_finds_the_ends_within_its_own_bound(matrix):
    found = lanczos(matrix, signs(40, torch.Generator().manual_seed(1), DOUBLE), 18)
    for value, residual in zip(found.values, found.residuals, strict=True):
        assert np.abs(SPECTRUM - value).min() <= residual + 1e-9
    assert found.values[-1] == pytest.approx(9.0, abs=1e-6)
    assert found.values[0] == pytest.approx(-3.0, abs=1e-4)
    assert found.values[-1] <= 9.0 + 1e-9
    assert found.values[0] >= -3.0 - 1e-9


def test_lanczos_without_kept_vectors_has_the_same_ends(matrix):
    start = signs(40, torch.Generator().manual_seed(1), DOUBLE)
    kept = lanczos(matrix, start, 16)
    three = lanczos(matrix, start, 16, keeps_vectors=False)
    assert three.values[[0, -1]] == pytest.approx(kept.values[[0, -1]], rel=1e-5)
    assert not three.is_orthogonal


def test_lanczos_stops_where_the_space_ends():
    rank_two = symmetric([5.0, -2.0, *[0.0] * 28])
    found = lanczos(rank_two, signs(30, torch.Generator().manual_seed(0), DOUBLE), 20)
    assert len(found.values) == 3
    assert found.values == pytest.approx([-2.0, 0.0, 5.0], abs=1e-8)
    assert found.residuals.max() < 1e-14


@pytest.mark.parametrize("seed", range(5))
def test_no_bound_is_closer_than_rounding(seed):
    """No error bound is smaller than the rounding error.

    A converged Ritz value in float32 is still off by rounding.
    """
    matrix = symmetric([1.11, *[0.01 * i for i in range(39)]], seed=seed)
    exact = np.linalg.eigvalsh(matrix.float().double().numpy())[-1]
    start = signs(40, torch.Generator().manual_seed(seed), torch.zeros(1))
    found = lanczos(matrix.float(), start, 30)
    assert found.residuals[-1] < 1e-5
    assert abs(found.values[-1] - exact) <= 4 * found.residuals[-1]
    assert found.residuals.min() >= 1e-7


def test_arpack_reaches_its_tolerance(matrix):
    bottom, top = converged_extremes(matrix, DOUBLE, num=2, tolerance=1e-8)
    assert [e.value for e in top] == pytest.approx([9.0, 4.0], abs=1e-6)
    assert [e.value for e in bottom] == pytest.approx([-3.0, -1.0], abs=1e-6)
    assert max(e.residual for e in (*top, *bottom)) < 1e-5


@pytest.mark.parametrize("method", ["hutchinson", "hutch++"])
def test_intervals_of_the_trace_hold_it(matrix, method):
    """The 95% intervals of the trace contain it for at least 34 of 40 seeds.

    Each is a t interval over 12 values of a skewed distribution.
    """
    hits = 0
    for seed in range(40):
        found = measure_spectrum(
            matrix, DOUBLE, num_steps=2, num_probes=12 if method == "hutchinson" else 36,
            method=method, seed=seed,
        )  # fmt: skip
        hits += found.trace.low <= SPECTRUM.sum() <= found.trace.high
    assert hits >= 34


def test_hutchpp_is_exact_on_low_rank():
    low_rank = symmetric([7.0, -4.0, 2.0, *[0.0] * 47])
    found = hutchpp(low_rank, DOUBLE, 15, torch.Generator().manual_seed(0))
    assert found.value == pytest.approx(5.0, abs=1e-8)


def test_norms_and_ranks(matrix):
    found = measure_spectrum(matrix, DOUBLE, num_steps=30, num_probes=400)
    squared = (SPECTRUM**2).sum()
    assert found.norm == pytest.approx(9.0, abs=1e-6)
    # With 400 probes both standard errors are below 3%.
    assert found.trace.value == pytest.approx(SPECTRUM.sum(), rel=0.15)
    assert found.squared_norm.value == pytest.approx(squared, rel=0.1)
    assert found.effective_rank.value == pytest.approx(found.trace.value / 9.0)
    assert found.stable_rank.value == pytest.approx(found.squared_norm.value / 81.0)
    values, weights = density(found.ritz)
    assert weights.sum() == pytest.approx(1.0)
    assert (np.diff(values) >= 0).all()


def test_a_hessian_of_zeros_has_no_rank():
    found = measure_spectrum(torch.zeros(6, 6, dtype=torch.float64), DOUBLE, num_steps=5)
    assert found.norm == 0.0
    assert found.effective_rank is None


def test_blocks_of_a_quadratic():
    hessian = symmetric(SPECTRUM, seed=3)
    model = Quadratic(hessian, 25)
    objective = objective_of(model)
    for block, part in (("base", slice(0, 25)), ("adapter", slice(25, 40))):
        own = hessian[part, part]
        parameters = blocks_of_quadratic(model)[block].parameters
        operator = BlockHessian(objective, parameters)
        found = measure_spectrum(operator, DOUBLE, num_steps=25, num_probes=300)
        values = torch.linalg.eigvalsh(own)
        assert found.top.value == pytest.approx(float(values[-1]), rel=1e-6)
        assert found.bottom.value == pytest.approx(float(values[0]), rel=1e-6)
        off = (own**2).sum() - (own.diagonal() ** 2).sum()
        # This is the standard error of Hutchinson's estimator with signs.
        error = float((2 * off / 300).sqrt())
        assert abs(found.trace.value - float(own.trace())) < 4 * error
        assert operator.num_products == found.num_products


@pytest.mark.parametrize(
    ("architecture", "adapter"),
    [
        ("llama", "lora"),
        ("llama", "prompt"),
        ("gpt2", "prefix"),
        ("bert", "prompt"),
        ("opt", "lora"),
    ],
)
def test_products_are_those_of_the_dense_hessian(architecture, adapter):
    model, objective = tiny_objective(architecture, adapter)
    before, flags = bits(model), [p.requires_grad for p in model.parameters()]
    few = dict(list(blocks_of(model)["adapter"].parameters.items())[:2])
    dense = dense_hessian(objective, few)
    operator = BlockHessian(objective, few)
    vector = torch.randn(len(dense), dtype=torch.float64)
    assert torch.allclose(operator @ vector, dense @ vector, atol=1e-6)
    base = blocks_of(model)["base"].parameters
    whole = BlockHessian(objective, base)
    a, b = (torch.randn(whole.shape[0], dtype=torch.float64) for _ in range(2))
    # Parts of the models compute in float32, whatever the dtype of their weights.
    assert float(a @ (whole @ b)) == pytest.approx(float(b @ (whole @ a)), rel=1e-4, abs=1e-6)
    assert_same_bits(bits(model), before)
    assert [p.requires_grad for p in model.parameters()] == flags
    assert all(isinstance(p, torch.nn.Parameter) for p in model.parameters())
    assert all(p.grad is None for p in model.parameters())


def test_eigenvalues_of_a_tiny_transformer_with_lora():
    """Lanczos, ARPACK and Hutchinson agree with the eigenvalues of the dense Hessian."""
    model, objective = tiny_objective("llama", "lora")
    blocks = blocks_of(model, "layer")
    for name in ("adapter", "layer 1"):
        parameters = blocks[name].parameters
        if name == "layer 1":  # autograd differentiates this part in a second.
            parameters = {n: p for n, p in parameters.items() if "k_proj" in n}
        dense = dense_hessian(objective, parameters)
        values = torch.linalg.eigvalsh(dense)
        operator = BlockHessian(objective, parameters)
        found = measure_spectrum(operator, DOUBLE, num_steps=30, num_probes=30)
        assert found.top.value == pytest.approx(float(values[-1]), rel=1e-4)
        assert found.bottom.value == pytest.approx(float(values[0]), rel=1e-4)
        off = (dense**2).sum() - (dense.diagonal() ** 2).sum()
        assert abs(found.trace.value - float(dense.trace())) < 4 * float((2 * off / 30).sqrt())
        bottom, top = converged_extremes(operator, DOUBLE, tolerance=1e-4, ncv=16)
        assert top[0].value == pytest.approx(float(values[-1]), rel=1e-3)
        assert bottom[0].value == pytest.approx(float(values[0]), rel=1e-3)


def test_products_are_curvlinops_own():
    from zofo.smoothness.hessian import HessianLinearOperator

    model, objective = tiny_objective("bert", "lora")
    parameters = blocks_of(model)["adapter"].parameters
    ours = BlockHessian(objective, parameters)
    vector = torch.randn(ours.shape[0], dtype=torch.float64)
    for p in model.parameters():
        p.requires_grad_(True)

    class Given(torch.nn.Module):
        reduction = "mean"

        def forward(self, prediction, target):
            return prediction

    class Loss(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.model = model

        def forward(self, batch):
            return self.model(**batch).loss

    theirs = HessianLinearOperator(
        Loss(), Given(), list(parameters.values()),
        [(dict(objective.batches[0]), torch.zeros(1))],
        check_deterministic=False, num_data=1, batch_size_fn=lambda _: 1,
    )  # fmt: skip
    with objective.measuring(), warnings.catch_warnings():
        # torch warns when its forward mode compiles scripts.
        warnings.simplefilter("ignore", DeprecationWarning)
        expected = theirs @ vector
    assert torch.allclose(ours @ vector, expected, atol=1e-6)
    as_scipy = ours.to_scipy(dtype=np.float64)
    assert as_scipy @ vector.numpy() == pytest.approx(expected.detach().numpy(), abs=1e-6)


def test_several_batches_are_their_mean():
    model, objective = tiny_objective("llama", "lora", num_batches=2)
    parameters = dict(list(blocks_of(model)["adapter"].parameters.items())[:2])
    dense = dense_hessian(objective, parameters)
    vector = torch.randn(len(dense), dtype=torch.float64)
    assert torch.allclose(BlockHessian(objective, parameters) @ vector, dense @ vector, atol=1e-6)
