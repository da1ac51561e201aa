"""Rank-one directions: kernels against the reference, structure, slices and several steps."""

from __future__ import annotations

import hypothesis
import pytest
import torch
from hypothesis import strategies as st

from zofo.noise import backends, philox
from zofo.noise.combine import combine, combine_many, combine_steps, direction
from zofo.noise.rank_one import signs, signs_of_rows

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
ADDRESS = {"seed": 0xF234_5678_9ABC_DEF0, "step": 7, "tensor": 3}


def reference(weight, coefficients, *, rounding, decay, first_row=0):
    out = torch.empty_like(weight)
    philox.combine(
        weight,
        out,
        tuple(coefficients),
        decay=decay,
        offset=first_row * weight.shape[1],
        purpose=philox.ROWS,
        first_direction=2,
        stochastic=rounding == "stochastic",
        **ADDRESS,
    )
    return out


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rounding", ["nearest", "stochastic"])
@hypothesis.settings(max_examples=8, deadline=None, derandomize=True)
@hypothesis.given(
    height=st.integers(1, 300),
    width=st.integers(1, 600),
    first_row=st.integers(0, 200),
    num=st.integers(1, 6),
)
def test_the_kernel_has_the_bits_of_the_reference(dtype, rounding, height, width, first_row, num):
    weight = torch.randn(height, width).to(dtype)
    coefficients = torch.randn(num).tolist()
    expected = reference(weight, coefficients, rounding=rounding, decay=0.9, first_row=first_row)
    drawing = {"decay": 0.9, "first_direction": 2, "distribution": "rank-one", **ADDRESS}
    drawing |= {"rounding": rounding, "offset": first_row * width}
    apart = combine(weight, coefficients, out=torch.empty_like(weight), **drawing)
    assert torch.equal(apart, expected)
    assert torch.equal(combine(weight, coefficients, **drawing), expected)


@pytest.mark.parametrize("dtype", DTYPES)
def test_many_tensors_threads_and_steps_have_the_bits_of_one_at_a_time(dtype, monkeypatch):
    weights = [torch.randn(shape).to(dtype) for shape in ((700, 530), (3, 5), (1, 900))]
    rows = [(0.5, -0.25, 1.0), (2.0, 0.0, -1.0)]
    expected = [weight.clone() for weight in weights]
    for i, weight in enumerate(expected):
        for step, row in enumerate(rows):
            drawing = {"seed": 5, "step": step, "tensor": i, "rounding": "stochastic"}
            combine(weight, row, decay=0.99, distribution="rank-one", **drawing)
    steps = [weight.clone() for weight in weights]
    for i, weight in enumerate(steps):
        drawing = {"seed": 5, "tensor": i, "rounding": "stochastic", "distribution": "rank-one"}
        combine_steps(weight, rows, decays=[0.99, 0.99], steps=[0, 1], **drawing)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    for step, row in enumerate(rows):
        drawing = {"seed": 5, "step": step, "rounding": "stochastic", "distribution": "rank-one"}
        combine_many(weights, row, tensors=range(3), decay=0.99, **drawing)
    for found, together, wanted in zip(steps, weights, expected, strict=True):
        assert torch.equal(found, wanted)
        assert torch.equal(together, wanted)


def test_a_direction_is_the_product_of_its_signs():
    drawing = {"num_directions": 3, "first_direction": 4, **ADDRESS}
    a, b = signs(300, "rows", **drawing), signs(131, "columns", **drawing)
    for k in range(3):
        v = direction((300, 131), index=4 + k, distribution="rank-one", **ADDRESS)
        assert torch.equal(v, torch.outer(a[k], b[k]))
    rows = torch.tensor([[5, 299], [0, 5], [7, 7]])
    found = signs_of_rows(rows, torch.arange(4, 7)[:, None], **ADDRESS)
    assert torch.equal(found, a.gather(1, rows))


def test_signs_are_the_same_without_the_kernel(monkeypatch):
    drawing = {"num_directions": 3, "first_direction": 4, **ADDRESS}
    by_kernel = signs(300, "columns", **drawing)
    elements = torch.arange(300).expand(3, 300)
    found = philox.rademacher(
        elements, direction=torch.arange(4, 7)[:, None], purpose=philox.COLUMNS, **ADDRESS
    )
    assert torch.equal(by_kernel, found)


def test_the_signs_of_rows_columns_and_elements_share_no_bits():
    drawing = {"num_directions": 1, "first_direction": 0, **ADDRESS}
    a, b = signs(4096, "rows", **drawing)[0], signs(4096, "columns", **drawing)[0]
    dense = direction((4096,), **ADDRESS)
    other = signs(4096, "rows", **{**drawing, "first_direction": 1})[0]
    for x, y in ((a, b), (a, dense), (b, dense), (a, other)):
        assert abs(float(x @ y)) < 5 * 64  # five standard deviations
        assert abs(float(x.sum())) < 5 * 64


@pytest.mark.parametrize("shape", [(5,), (2, 3, 4), ()])
def test_only_matrices_have_rank_one_directions(shape):
    with pytest.raises(ValueError, match="must be a matrix"):
        combine(torch.zeros(shape), (1.0,), distribution="rank-one", **ADDRESS)


def test_adding_zero_directions_changes_no_bit():
    weight = torch.randn(20, 30)
    weight[0, :5] = -0.0
    padded, plain = weight.clone(), weight.clone()
    combine(padded, (0.5, 0.0, -0.0), distribution="rank-one", **ADDRESS)
    combine(plain, (0.5,), distribution="rank-one", **ADDRESS)
    assert torch.equal(padded.view(torch.int32), plain.view(torch.int32))


def test_plain_torch_operations_give_the_same_bits(monkeypatch):
    weight = torch.randn(40, 70)
    by_kernel = combine(weight.clone(), (0.5, -2.0), distribution="rank-one", **ADDRESS)
    monkeypatch.setattr(backends, "backend", lambda device: "torch")
    by_torch = combine(weight.clone(), (0.5, -2.0), distribution="rank-one", **ADDRESS)
    assert torch.equal(by_kernel, by_torch)
