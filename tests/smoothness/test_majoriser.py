"""Tests of the diagonal majoriser: when it holds, and what random vectors do not detect."""

import pytest
import torch

from tests.support.dense import Quadratic, blocks_of_quadratic, objective_of, symmetric
from zofo.smoothness.hessian import BlockHessian
from zofo.smoothness.majoriser import check_majoriser
from zofo.smoothness.measure import measure_point
from zofo.smoothness.options import SmoothnessOptions
from zofo.smoothness.records import Records

DOUBLE = torch.zeros(1, dtype=torch.float64)
SIZES = {"base": 12, "adapter": 5}


def exact(hessian, constants):
    scale = torch.cat([torch.full((n,), constants[b] ** -0.5) for b, n in SIZES.items()]).double()
    return float(torch.linalg.eigvalsh(scale[:, None] * hessian * scale).abs().max())


def norms(hessian):
    return {
        "base": float(torch.linalg.matrix_norm(hessian[:12, :12], 2)),
        "adapter": float(torch.linalg.matrix_norm(hessian[12:, 12:], 2)),
    }


@pytest.mark.parametrize("seed", range(3))
def test_kappa_is_that_of_the_dense_hessian(seed):
    hessian = symmetric(torch.linspace(-4, 9, 17), seed=seed)
    constants = norms(hessian)
    model = Quadratic(hessian, 12)
    blocks = blocks_of_quadratic(model)
    everything = {n: p for block in blocks.values() for n, p in block.parameters.items()}
    found = check_majoriser(
        BlockHessian(objective_of(model), everything), SIZES, constants, DOUBLE, num_steps=17
    )
    assert found.kappa == pytest.approx(exact(hessian, constants), rel=1e-6)
    assert found.verdict == "refuted"
    repaired = {b: 1.001 * found.kappa * c for b, c in constants.items()}
    assert check_majoriser(hessian, SIZES, repaired, DOUBLE, num_steps=17).verdict == "confirmed"


def test_blocks_that_do_not_couple_are_majorised_by_their_norms():
    hessian = torch.block_diag(
        symmetric(torch.linspace(0, 9, 12)), symmetric(torch.linspace(-1, 2, 5))
    )
    found = check_majoriser(hessian, SIZES, norms(hessian), DOUBLE, num_steps=17)
    assert found.kappa == pytest.approx(1.0)


def test_norms_that_lanczos_has_not_reached_refute_nothing():
    """A norm that Lanczos has not reached never refutes the majoriser.

    The two blocks do not couple, and their extreme eigenvalues lie close together.
    """
    for seed in range(6):
        blocks = [
            torch.randn(n, n, generator=torch.Generator().manual_seed(10 * seed + n)).double()
            for n in (80, 60)
        ]
        hessian = torch.block_diag(*[(b + b.T) / (2 * len(b)) ** 0.5 for b in blocks])
        model = Quadratic(hessian, 80)
        records = Records()
        measure_point(
            objective_of(model),
            blocks_of_quadratic(model),
            SmoothnessOptions(lanczos_steps=10, probes=2, directions=0, seed=seed),
            records,
            0,
        )
        (found,) = records.of("majoriser")
        assert found["verdict"] != "refuted"


def test_convex_coupling_costs_at_most_a_factor_of_two():
    root = torch.randn(17, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    hessian = root @ root.T
    found = check_majoriser(hessian, SIZES, norms(hessian), DOUBLE, num_steps=17)
    assert 1.0 < found.kappa <= 2.0 + 1e-9


def test_random_vectors_pass_where_an_extreme_one_does_not():
    hessian = torch.zeros(17, 17, dtype=torch.float64)
    hessian[0, 12] = hessian[12, 0] = 5.0  # Only this cross term couples the blocks.
    hessian.diagonal().add_(0.1)
    found = check_majoriser(
        hessian, SIZES, {"base": 1.0, "adapter": 1.0}, DOUBLE, num_steps=17, num_samples=1
    )
    assert found.kappa == pytest.approx(5.1)
    assert found.verdict == "refuted"
    extreme = torch.zeros(17, dtype=torch.float64)
    extreme[[0, 12]] = 1.0
    given = check_majoriser(
        hessian, SIZES, {"base": 1.0, "adapter": 1.0}, DOUBLE, vectors=[extreme], num_samples=0
    )
    assert given.sampled == (pytest.approx(5.1),)
    assert max(given.sampled) > 1.0


def test_constants_must_be_positive():
    with pytest.raises(ValueError, match="adapter"):
        check_majoriser(torch.eye(17), SIZES, {"base": 1.0, "adapter": 0.0}, DOUBLE)
