"""Tests of directions: published vectors, kernels against the reference, statistics, and slices."""

from __future__ import annotations

import math

import hypothesis
import pytest
import torch
from hypothesis import strategies as st
from scipy import stats

from zofo.noise import cpu, philox
from zofo.noise.combine import combine, combine_many, combine_rows, combine_steps, direction

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
ADDRESS = {"seed": 0x1234_5678_9ABC_DEF0, "step": 7, "tensor": 3}

# The authors of Philox publish these known-answer tests with Random123.
PUBLISHED = [
    ((0, 0, 0, 0), 0, (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    (
        (0xFFFFFFFF,) * 4,
        0xFFFFFFFF_FFFFFFFF,
        (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD),
    ),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        0x299F31D0_A4093822,
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
]


@pytest.mark.parametrize(("counter", "key", "expected"), PUBLISHED)
def test_philox_gives_the_published_vectors(counter, key, expected):
    words = philox.philox(tuple(torch.tensor([c]) for c in counter), key)
    assert tuple(int(w) for w in words) == expected


def reference(weight, coefficients, *, distribution, rounding, offset=0, decay=1.0, first=0):
    out = torch.empty(weight.shape, dtype=weight.dtype)
    philox.combine(
        weight.contiguous(),
        out,
        tuple(coefficients),
        decay=decay,
        offset=offset,
        purpose=philox.RADEMACHER if distribution == "rademacher" else philox.GAUSSIAN,
        first_direction=first,
        stochastic=rounding == "stochastic",
        **ADDRESS,
    )
    return out


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rounding", ["nearest", "stochastic"])
@hypothesis.settings(max_examples=15, deadline=None)
@hypothesis.given(
    size=st.integers(1, 5000),
    offset=st.integers(0, 2**40),
    scale=st.floats(1e-6, 1e3),
    num_directions=st.integers(1, 3),
)
def test_kernel_equals_reference_bit_for_bit(dtype, rounding, size, offset, scale, num_directions):
    weight = (torch.randn(size, dtype=torch.float64) * scale).to(dtype)
    coefficients = [1e-3 * (k + 1) for k in range(num_directions)]
    options = {"distribution": "rademacher", "rounding": rounding, "offset": offset}
    ours = combine(
        weight, coefficients, out=torch.empty_like(weight), decay=0.99, **options, **ADDRESS
    )
    assert torch.equal(ours, reference(weight, coefficients, decay=0.99, **options))


@pytest.mark.parametrize("rounding", ["nearest", "stochastic"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_special_values_survive_rounding(dtype, rounding):
    weight = torch.tensor([0.0, -0.0, 6e-8, -6e-8, 6.1e-5, 65504, math.inf, -math.inf], dtype=dtype)
    out = combine(weight, (0.0,), out=torch.empty_like(weight), rounding=rounding, **ADDRESS)
    assert torch.equal(out, weight)
    nan = torch.full((4,), math.nan, dtype=dtype)
    assert combine(nan, (1.0,), rounding=rounding, **ADDRESS).isnan().all()


def test_gaussian_kernel_agrees_with_float64_box_muller():
    ours = direction((200_001,), distribution="gaussian", **ADDRESS)
    exact = philox.gaussian(torch.arange(200_001), direction=0, **ADDRESS)
    torch.testing.assert_close(ours, exact, atol=2e-6, rtol=2e-6)


@pytest.mark.parametrize("distribution", ["rademacher", "gaussian"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_slices_equal_the_whole(distribution, dtype):
    weight = torch.randn(9001).to(dtype)
    kinds = {"distribution": distribution, "rounding": "stochastic"}
    options = {**kinds, **ADDRESS}
    whole = combine(weight, (0.1, -0.2), out=torch.empty_like(weight), **options)
    parts = [
        combine(weight[a:b].clone(), (0.1, -0.2), offset=a, **options)
        for a, b in [(0, 1), (1, 130), (130, 4097), (4097, 9001)]
    ]
    assert torch.equal(torch.cat(parts), whole)
    places = [(0, 1), (1, 130), (130, 4097), (4097, 9001)]
    slices = [weight[a:b].clone() for a, b in places]
    given = {"tensors": [ADDRESS["tensor"]] * 4, "offsets": [a for a, _ in places]}
    address = {key: ADDRESS[key] for key in ("seed", "step")}
    combine_many(slices, (0.1, -0.2), **given, **address, **kinds)
    assert torch.equal(torch.cat(slices), whole)


@pytest.mark.parametrize("distribution", ["rademacher", "gaussian", "rank-one"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_several_steps_of_slices_equal_those_of_the_whole(distribution, dtype):
    weight = torch.randn(37, 61).to(dtype)
    options = {
        "decays": (0.9, 1.0),
        "steps": (3, 5),
        "seed": 1,
        "tensor": 2,
        "distribution": distribution,
        "rounding": "stochastic",
    }
    parts = [
        combine_steps(weight[a:b].clone(), ((0.1,), (-0.2,)), offset=61 * a, **options)
        for a, b in [(0, 13), (13, 26), (26, 37), (37, 37)]
    ]
    assert torch.equal(torch.cat(parts), combine_steps(weight, ((0.1,), (-0.2,)), **options))


def test_threads_do_not_change_a_bit():
    before = torch.get_num_threads()
    weight = torch.randn(1_000_003)
    try:
        results = []
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results.append(combine(weight.clone(), (0.1,), **ADDRESS))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])


def test_strides_do_not_matter():
    base = torch.randn(40, 30)
    expected = combine(base.t().contiguous(), (0.1,), **ADDRESS)
    transposed = base.clone().t()
    assert torch.equal(combine(transposed, (0.1,), **ADDRESS), expected)
    out = torch.empty(40, 30).t()
    combine(base.t(), (0.1,), out=out, **ADDRESS)
    assert torch.equal(out, expected)


def test_empty_and_zero_dimensional_tensors():
    assert combine(torch.empty(0, 5), (1.0,), **ADDRESS).shape == (0, 5)
    assert combine(torch.tensor(2.0), (1.0,), **ADDRESS) in (torch.tensor(1.0), torch.tensor(3.0))


def test_elements_beyond_32_bits_have_directions_of_their_own():
    size = 4096
    zero = torch.zeros(size)
    near = combine(zero.clone(), (1.0,), offset=0, **ADDRESS)
    for offset in (2**31, 2**32, 2**39):
        far = combine(zero.clone(), (1.0,), offset=offset, **ADDRESS)
        assert abs(float((near * far).mean())) < 5 / math.sqrt(size)


@pytest.mark.parametrize("distribution", ["rademacher", "gaussian"])
def test_moments(distribution):
    n = 1_000_000
    v = direction((n,), distribution=distribution, **ADDRESS).double()
    assert abs(v.mean()) < 5 / math.sqrt(n)
    fourth = 1 if distribution == "rademacher" else 3
    assert abs(v.pow(2).mean() - 1) < 5 * math.sqrt(max(fourth - 1, 0) / n) + 1e-9
    assert abs(v.pow(4).mean() - fourth) < (1e-9 if fourth == 1 else 5 * math.sqrt(96 / n))


def test_gaussian_distribution_with_tails():
    v = direction((1_000_000,), distribution="gaussian", **ADDRESS).double().numpy()
    assert stats.kstest(v, "norm").pvalue > 1e-4
    expected = 1_000_000 * 2 * stats.norm.sf(4)
    assert abs((abs(v) > 4).sum() - expected) < 5 * math.sqrt(expected)


@pytest.mark.parametrize("distribution", ["rademacher", "gaussian"])
def test_directions_of_different_addresses_are_uncorrelated(distribution):
    n = 200_000
    addresses = [
        {"seed": s, "step": t, "tensor": i, "index": k}
        for s, t, i, k in [
            (0, 0, 0, 0), (1, 0, 0, 0), (2**32, 0, 0, 0), (0, 1, 0, 0), (0, 0, 1, 0), (0, 0, 0, 1),
        ]
    ]  # fmt: skip
    v = torch.stack([direction((n,), distribution=distribution, **a) for a in addresses])
    # The first direction is also compared with itself, shifted by one element and by one block.
    # Overlapping streams would show there.
    v = torch.cat([v, v[:1].roll(1, -1), v[:1].roll(128, -1)])
    correlation = torch.corrcoef(v.double()) - torch.eye(len(v))
    assert correlation.abs().max() < 5.5 / math.sqrt(n)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("value", [0.3, -1.7, 3e-6])
def test_stochastic_rounding_is_unbiased(dtype, value):
    n = 400_000
    weight = torch.full((n,), value, dtype=dtype)
    # This decay moves a weight by a fraction of the spacing of 16-bit numbers.
    decay = 1 - 2.0**-12
    out = combine(
        weight, (), decay=decay, out=torch.empty_like(weight), rounding="stochastic", **ADDRESS
    )
    exact = float(weight[0]) * decay
    values = out.double()
    assert len(values.unique()) == 2
    assert abs(values.mean() - exact) < 5 * values.std() / math.sqrt(n) + 1e-4 * abs(value) * 2**-8


def test_global_generators_are_untouched():
    state = torch.get_rng_state()
    combine(torch.zeros(1000, dtype=torch.bfloat16), (1.0,), rounding="stochastic", **ADDRESS)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"seed": -1}, "seed is -1"),
        ({"step": 2**32}, "step is 4294967296"),
        ({"tensor": 2**20}, "tensor is 1048576"),
    ],
)
def test_addresses_outside_their_range_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        combine(torch.zeros(3), (1.0,), **{**ADDRESS, **change})


def test_integer_weights_are_refused():
    with pytest.raises(ValueError, match=r"torch\.int64 cannot be perturbed"):
        combine(torch.zeros(3, dtype=torch.int64), (1.0,), **ADDRESS)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("num_directions", [1, 3])
@pytest.mark.parametrize("distribution", ["rademacher", "gaussian"])
def test_many_steps_at_once_are_the_steps_one_by_one(dtype, num_directions, distribution):
    weight = torch.randn(5003, dtype=torch.float64).to(dtype)
    coefficients = [[0.01 * (k + 1) * (-1) ** t for k in range(num_directions)] for t in range(7)]
    decays = [1.0 - 0.01 * t for t in range(7)]
    steps = [3, 4, 5, 9, 10, 11, 12]
    one_by_one = weight.clone()
    for row, decay, step in zip(coefficients, decays, steps, strict=True):
        combine(
            one_by_one,
            row,
            decay=decay,
            seed=5,
            step=step,
            tensor=2,
            distribution=distribution,
            rounding="stochastic",
        )
    at_once = combine_steps(
        weight.clone(),
        coefficients,
        decays=decays,
        steps=steps,
        seed=5,
        tensor=2,
        distribution=distribution,
        rounding="stochastic",
    )
    assert torch.equal(at_once, one_by_one)
    assert not torch.equal(at_once, weight)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("distribution", ["rademacher", "gaussian"])
def test_some_rows_are_rows_of_the_whole(dtype, distribution):
    weight = torch.randn(50, 37).to(dtype)
    rows = torch.tensor([0, 3, 49, 17])
    address = {"seed": 1, "step": 2, "tensor": 3, "distribution": distribution}
    whole = combine(weight.clone(), (0.1,), first_direction=2, **address)
    before = weight.clone()
    some = combine_rows(weight, rows, 0.1, first_direction=2, **address)
    assert torch.equal(some, whole[rows])
    assert torch.equal(weight, before)


def test_where_torch_has_no_openmp_a_thread_pool_gives_the_same(monkeypatch):
    weight = torch.randn(300_001)
    expected = combine(weight.clone(), (0.1,), **ADDRESS)
    monkeypatch.setattr(cpu, "_openmp_of_torch", lambda: None)
    before = torch.get_num_threads()
    cpu._launcher.cache_clear()
    try:
        torch.set_num_threads(3)
        ours = combine(weight.clone(), (0.1,), **ADDRESS)
    finally:
        torch.set_num_threads(before)
        cpu._launcher.cache_clear()
    assert torch.equal(ours, expected)
