"""Curvature measured by forward passes is exact on quadratics.

It is measured along the directions of the estimator.
"""

import pytest
import torch

from tests.support.dense import Quadratic, dense_hessian, objective_of, symmetric, tiny_objective
from tests.support.models import assert_same_bits, bits
from zofo.noise.combine import direction
from zofo.perturb.view import Perturbation
from zofo.smoothness.blocks import blocks_of
from zofo.smoothness.directional import directional_curvature

SEED, STEP = 11, 3
HESSIAN = symmetric([-2.0, 0.0, 0.5, 1.0, 3.0, 20.0])


def measured(model, parameters, tensors, closure, distribution="rademacher", **options):
    view = Perturbation(model, parameters, tensors, seed=SEED, distribution=distribution)
    return directional_curvature(closure, view, parameters, step=STEP, **options)


@pytest.mark.parametrize("distribution", ["rademacher", "gaussian"])
def test_a_quadratics_curvature_along_the_steps_own_directions(distribution):
    model = Quadratic(HESSIAN, 4)
    found = measured(
        model, [model.x, model.y], [0, 7], model, distribution, eps=1e-2, num_directions=5
    )
    gradient = HESSIAN @ torch.cat([model.x, model.y]).detach() + model.slope
    for k in range(5):
        v = torch.cat(
            [
                direction(
                    p.shape, seed=SEED, step=STEP, tensor=t, index=k, distribution=distribution
                )
                for p, t in ((model.x, 0), (model.y, 7))
            ]
        ).double()
        assert found.curvatures[k] == pytest.approx(float(v @ HESSIAN @ v), rel=1e-5, abs=1e-6)
        assert found.projections[k] == pytest.approx(float(v @ gradient), rel=1e-6)
    assert found.num_forwards == 1 + 2 * (5 + 2)
    assert found.truncation < 1e-6


def test_one_block_alone():
    model = Quadratic(HESSIAN, 4)
    found = measured(model, [model.y], [7], model, num_directions=1, num_checked=0)
    v = direction(model.y.shape, seed=SEED, step=STEP, tensor=7).double()
    assert found.curvatures[0] == pytest.approx(float(v @ HESSIAN[4:, 4:] @ v), rel=1e-4)
    assert found.num_parameters == 2


def test_the_mean_is_the_trace_of_a_transformers_block():
    model, objective = tiny_objective("llama", "lora")
    block = blocks_of(model)["adapter"]
    parameters = list(block.parameters.values())
    few = dict(list(block.parameters.items())[:2])
    dense = dense_hessian(objective, few)
    before = bits(model)
    generators = torch.get_rng_state()
    found = measured(
        model, parameters[:2], block.tensors[:2], objective.value, eps=3e-2, num_directions=60
    )
    off = (dense**2).sum() - (dense.diagonal() ** 2).sum()
    error = float((2 * off / 60).sqrt()) + found.truncation
    assert abs(found.trace.value - float(dense.trace())) < 4 * error
    assert_same_bits(bits(model), before)
    assert torch.equal(torch.get_rng_state(), generators)


def test_rounding_is_said():
    model = Quadratic(HESSIAN, 4).float()
    model.hessian, model.slope = HESSIAN.float(), model.slope.float()
    found = measured(model, [model.x], [0], model, eps=1e-3, num_directions=4)
    assert found.rounding == pytest.approx(4 * 2**-24 * abs(found.loss) / 1e-6)
    exact = HESSIAN[:4, :4]
    for k, curvature in enumerate(found.curvatures):
        v = direction(model.x.shape, seed=SEED, step=STEP, tensor=0, index=k).double()
        assert abs(curvature - float(v @ exact @ v)) < 20 * found.rounding
    assert objective_of(model).value() == pytest.approx(found.loss)
