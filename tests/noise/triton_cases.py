"""Tests of the Triton kernels against the reference, through the public functions.

test_triton.py runs this file with TRITON_INTERPRET=1 on CPU tensors, and without that variable
where there is a GPU. pytest does not collect this file by itself, because the variable must be set
before triton is imported.
"""

from __future__ import annotations

import math
import os
import struct
from functools import lru_cache

import pytest
import torch
import triton
import triton.language as tl
from scipy import stats

from tests.noise.test_noise import PUBLISHED
from zofo.cli import doctor
from zofo.noise import backends, philox, rank_one, triton_kernels, triton_launch
from zofo.noise.combine import (
    PURPOSES,
    combine,
    combine_many,
    combine_rows,
    combine_steps,
    direction,
    prepare,
)

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cpu" if INTERPRETED else "cuda"
DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
ROUNDED = [
    (torch.float32, "stochastic"),  # Stochastic rounding has no effect on float32.
    (torch.float64, "nearest"),
    (torch.bfloat16, "nearest"),
    (torch.bfloat16, "stochastic"),
    (torch.float16, "nearest"),
    (torch.float16, "stochastic"),
]
# The two halves of the seed differ, and the upper half is large. Swapped or signed halves would
# give other directions.
ADDRESS = {"seed": 0xF234_5678_9ABC_DEF0, "step": 0xFFFF_FFF0}
BITS = {2: torch.int16, 4: torch.int32, 8: torch.int64}
SPECIAL = [0.0, -0.0, math.inf, -math.inf, math.nan, 6e-8, -6e-8, 1e-40, -1e-40, 6.1e-5, 65504, 1]

# The interpreter computes with numpy, which warns about infinities.
pytestmark = pytest.mark.filterwarnings(
    "ignore:(overflow|invalid value) encountered:RuntimeWarning"
)


@pytest.fixture(autouse=True)
def _triton_computes(monkeypatch):
    if INTERPRETED:
        monkeypatch.setattr(backends, "backend", lambda device_type: "triton")
    assert backends.backend(DEVICE) == "triton"


@pytest.fixture
def _large_tiles(monkeypatch):
    """Make tiles 32 times as large. The interpreter takes about as long for a large tile."""
    monkeypatch.setattr(triton_launch, "_BLOCKS_PER_TILE", 32 * triton_launch._BLOCKS_PER_TILE)


def tensor_of(size, dtype, seed=0):
    """Return values of many magnitudes, with special values among them."""
    generator = torch.Generator().manual_seed(seed)
    scale = 10 ** (torch.rand(size, generator=generator, dtype=torch.float64) * 12 - 9)
    values = torch.randn(size, generator=generator, dtype=torch.float64) * scale
    values[5 : 5 + len(SPECIAL)] = torch.tensor(SPECIAL, dtype=torch.float64)[: max(size - 5, 0)]
    return values.to(dtype).to(DEVICE)


def reference(weight, coefficients, *, tensor, decay=1.0, offset=0, first=0, step=None, **kinds):
    out = torch.empty(weight.shape, dtype=weight.dtype)
    philox.combine(
        weight.cpu().contiguous(),
        out,
        tuple(coefficients),
        decay=decay,
        offset=offset,
        tensor=tensor,
        seed=ADDRESS["seed"],
        step=ADDRESS["step"] if step is None else step,
        purpose=PURPOSES[kinds.get("distribution", "rademacher")],
        first_direction=first,
        stochastic=kinds.get("rounding") == "stochastic",
    )
    return out


def assert_same_bits(ours, expected):
    """Assert that the bits are equal, including the signs of zeros.

    Every NaN equals every other NaN.
    """
    ours = ours.cpu()
    assert ours.shape == expected.shape
    assert torch.equal(ours.isnan(), expected.isnan())
    view = BITS[expected.element_size()]
    ours, expected = (x.contiguous().nan_to_num(nan=0.0, posinf=math.inf, neginf=-math.inf)
                      for x in (ours, expected))  # fmt: skip
    assert torch.equal(ours.view(view), expected.view(view))


@pytest.mark.parametrize(("counter", "key", "expected"), PUBLISHED)
def test_triton_gives_the_published_vectors(counter, key, expected):
    out = torch.zeros(4, dtype=torch.int64, device=DEVICE)
    _published[(1,)](out, key, *counter)
    assert tuple(out.tolist()) == expected


@triton.jit
def _published(
    out, key: tl.uint64, c0: tl.uint32, c1: tl.uint32, c2: tl.uint32, c3: tl.uint32
):  # fmt: skip
    words = tl.philox(
        key,
        c0.to(tl.uint32) + tl.zeros([1], tl.uint32),
        c1.to(tl.uint32),
        c2.to(tl.uint32),
        c3.to(tl.uint32),
    )
    at = tl.arange(0, 1)
    tl.store(out + at, words[0].to(tl.int64))
    tl.store(out + 1 + at, words[1].to(tl.int64))
    tl.store(out + 2 + at, words[2].to(tl.int64))
    tl.store(out + 3 + at, words[3].to(tl.int64))


@pytest.mark.parametrize(("dtype", "rounding"), ROUNDED)
@pytest.mark.parametrize(
    ("num_directions", "offset"), [(1, 0), (0, 16), (3, 129), (1, 2**39 - 1000), (2, 2**44 + 12345)]
)
def test_one_tensor_bit_for_bit(dtype, rounding, num_directions, offset):
    # At one of these offsets the tensor reaches into a third tile.
    weight = tensor_of(4090 if offset == 2**39 - 1000 else 2090, dtype)
    coefficients = [1e-3 * (k + 1) * (-1) ** k for k in range(num_directions)]
    ours = combine(
        weight,
        coefficients,
        out=torch.empty_like(weight),
        decay=0.99,
        offset=offset,
        tensor=2**20 - 1,
        first_direction=5,
        rounding=rounding,
        **ADDRESS,
    )
    options = {"decay": 0.99, "offset": offset, "rounding": rounding, "first": 5}
    assert_same_bits(ours, reference(weight, coefficients, tensor=2**20 - 1, **options))


SIZES = [129, 2049, 0, 4]


@pytest.mark.parametrize(
    ("dtype", "rounding", "num_directions", "on_device"),
    [
        *((*rounded, 1, False) for rounded in ROUNDED),
        *((*rounded, 2, True) for rounded in ROUNDED),
        # Numbers of directions and places of coefficients do not depend on the dtype.
        (*ROUNDED[0], 1, True),
        (*ROUNDED[0], 2, False),
        (*ROUNDED[3], 1, True),
        (*ROUNDED[3], 2, False),
    ],
)
def test_many_tensors_bit_for_bit(dtype, rounding, on_device, num_directions):
    weights = [tensor_of(size, dtype, seed=size) for size in SIZES]
    tensors = [3 * i + 1 for i in range(len(SIZES))]
    # float32 cannot represent these coefficients, so it matters where they are rounded.
    coefficients = [0.1, -0.3][:num_directions]
    expected = [
        reference(w, coefficients, tensor=i, decay=0.97, rounding=rounding)
        for w, i in zip(weights, tensors, strict=True)
    ]
    before = [w.clone() for w in weights]
    outs = [torch.zeros_like(w) for w in weights]
    given = torch.tensor(coefficients, dtype=torch.float64, device=DEVICE)
    options = {"tensors": tensors, "decay": 0.97, "rounding": rounding, **ADDRESS}
    combine_many(weights, given if on_device else coefficients, outs=outs, **options)
    for weight, out, copy, wanted in zip(weights, outs, before, expected, strict=True):
        assert_same_bits(out, wanted)
        assert_same_bits(weight, copy.cpu())
    returned = combine_many(weights, given if on_device else coefficients, **options)
    for weight, again, wanted in zip(weights, returned, expected, strict=True):
        assert again is weight
        assert_same_bits(weight, wanted)


@pytest.mark.parametrize(
    ("dtype", "rounding", "on_device"),
    [(torch.float32, "nearest", True), (torch.bfloat16, "stochastic", False)],
)
def test_rank_one_directions_bit_for_bit(dtype, rounding, on_device):
    options = {"distribution": "rank-one", "rounding": rounding}
    shapes = [(60, 61), (1, 300), (130, 2)]
    weights = [tensor_of(a * b, dtype, seed=a).view(a, b) for a, b in shapes]
    coefficients = [0.1, -0.3, 0.2]
    expected = [
        reference(w, coefficients, tensor=i, decay=0.97, **options) for i, w in enumerate(weights)
    ]
    part = combine(
        weights[0][7:], coefficients, out=weights[0][7:].clone(), tensor=0, decay=0.97,
        offset=7 * 61, **options, **ADDRESS,
    )  # fmt: skip
    assert_same_bits(part, expected[0][7:])
    given = torch.tensor(coefficients, dtype=torch.float64, device=DEVICE)
    given = given if on_device else coefficients
    places = [(0, 7), (7, 8), (8, 60)]
    parts = [weights[0][a:b].clone() for a, b in places]
    slices = {"tensors": [0] * 3, "offsets": [61 * a for a, _ in places]}
    combine_many(parts, given, decay=0.97, **slices, **options, **ADDRESS)
    assert_same_bits(torch.cat(parts), expected[0])
    combine_many(weights, given, tensors=range(3), decay=0.97, **options, **ADDRESS)
    for weight, wanted in zip(weights, expected, strict=True):
        assert_same_bits(weight, wanted)


@pytest.mark.parametrize("size", [1, 130, 5000])
def test_the_signs_of_a_side_are_those_of_the_reference(size):
    kinds = {**ADDRESS, "tensor": 9}
    for side, purpose in (("rows", philox.ROWS), ("columns", philox.COLUMNS)):
        drawn = rank_one.signs(
            size, side, num_directions=3, first_direction=4, device=DEVICE, **kinds
        )
        expected = philox.rademacher(
            torch.arange(size).expand(3, size),
            direction=torch.arange(4, 7)[:, None],
            purpose=purpose,
            **kinds,
        )
        assert torch.equal(drawn.cpu(), expected)


def count_launches(monkeypatch, names=("combine_tensors", "combine_rows")):
    launches = []
    for name in names:
        kernel = getattr(triton_kernels, name)

        class Counted:
            def __init__(self, kernel, name):
                self.kernel, self.name = kernel, name

            def __getitem__(self, grid):
                launches.append(self.name)
                return self.kernel[grid]

        monkeypatch.setattr(triton_kernels, name, Counted(kernel, name))
    return launches


def test_mixed_dtypes_take_one_launch_each(monkeypatch):
    launches = count_launches(monkeypatch)
    weights = [tensor_of(300 + i, DTYPES[i % 4]) for i in range(12)]
    expected = [reference(w, [0.1], tensor=i) for i, w in enumerate(weights)]
    combine_many(weights, [0.1], tensors=range(12), **ADDRESS)
    assert launches == ["combine_tensors"] * 4
    for weight, wanted in zip(weights, expected, strict=True):
        assert_same_bits(weight, wanted)


def test_prepared_sums_keep_their_tables(monkeypatch):
    """Prepared sums keep their tables, even if there are more sets than the cache holds.

    A model prepares one set per layer.
    """
    monkeypatch.setattr(triton_launch, "_table", lru_cache(maxsize=2)(triton_launch._new_table))
    weights = [tensor_of(300, DTYPES[i % 4], seed=i) for i in range(8)]
    outs = [torch.empty_like(w) for w in weights]
    launches = [
        prepare([w], [out], tensors=[i], seed=ADDRESS["seed"])
        for i, (w, out) in enumerate(zip(weights, outs, strict=True))
    ]
    triton_launch._table.cache_clear()
    for step in (3, 4):
        for launch in launches:
            launch(0.1, step, 2)
        for i, (weight, out) in enumerate(zip(weights, outs, strict=True)):
            assert_same_bits(out, reference(weight, [0.1], tensor=i, step=step, first=2))
    assert triton_launch._table.cache_info().misses == 0


def test_the_table_is_made_once_for_a_set_of_tensors():
    weights = [tensor_of(100, torch.float32, seed=i) for i in range(3)]
    triton_launch._table.cache_clear()
    for step in range(4):
        combine_many(weights, [0.1], seed=1, step=step, tensors=[0, 1, 2])
    assert triton_launch._table.cache_info().misses == 1
    combine_many(weights[:2], [0.1], seed=1, step=0, tensors=[0, 1])
    # The same memory with other tensor indices is another set.
    combine_many(weights[:2], [0.1], seed=1, step=0, tensors=[0, 2])
    info = triton_launch._table.cache_info()
    assert info.misses == 3
    assert info.maxsize is not None


def test_tensors_at_odd_addresses():
    base = tensor_of(3000, torch.bfloat16)
    weights = [base[1:1000], base[1003:2999]]
    outs = [torch.empty_like(base)[3:1002], torch.empty_like(base)[: 2999 - 1003]]
    combine_many(weights, [0.1], outs=outs, tensors=[0, 1], **ADDRESS)
    for i, (weight, out) in enumerate(zip(weights, outs, strict=True)):
        assert_same_bits(out, reference(weight, [0.1], tensor=i))


def test_nothing_is_written_beside_a_tensor():
    base = torch.zeros(5000, device=DEVICE)
    combine_many([base[7:2100], base[2103:4990]], [1.0], tensors=[0, 1], **ADDRESS)
    combine(base[4991:4999], [1.0], tensor=2, offset=77, **ADDRESS)
    beside = [*range(7), 2100, 2101, 2102, 4990, 4999]
    assert base.nonzero().numel() == 5000 - len(beside)
    assert not base[beside].any()


def test_strides_do_not_matter():
    base = tensor_of(1200, torch.float32).reshape(40, 30)
    expected = reference(base.t(), [0.1], tensor=3)
    weight, other = base.clone().t(), torch.empty(40, 30, device=DEVICE).t()
    combine_many([base.t()], [0.1], outs=[other], tensors=[3], **ADDRESS)
    combine_many([weight], [0.1], tensors=[3], **ADDRESS)
    assert_same_bits(other, expected)
    assert_same_bits(weight, expected)
    assert_same_bits(combine(base.t(), [0.1], tensor=3, **ADDRESS), expected)


@pytest.mark.parametrize(("position", "bad"), [(0, math.nan), (1, math.inf), (2, -math.inf)])
def test_a_coefficient_that_is_no_number_changes_no_bit(position, bad):
    coefficients = torch.tensor([0.1, 0.2, 0.3], dtype=torch.float64, device=DEVICE)
    coefficients[position] = bad
    weights = [tensor_of(n, dtype) for dtype, n in zip(DTYPES, (100, 3000, 100, 3000), strict=True)]
    weights.append(tensor_of(1200, torch.float32).reshape(40, 30).t())
    before = [w.clone() for w in weights]
    outs = [torch.full_like(w, 3) for w in weights]
    indices = range(len(weights))
    combine_many(weights, coefficients, tensors=indices, decay=0.5, **ADDRESS)
    combine_many(weights, coefficients, outs=outs, tensors=indices, decay=0.5, **ADDRESS)
    for weight, copy, out in zip(weights, before, outs, strict=True):
        assert_same_bits(weight, copy.cpu())
        assert (out == 3).all()


@pytest.mark.parametrize(
    ("dtype", "width", "distribution"),
    [
        (torch.float32, 1, "rademacher"),
        (torch.float32, 2000, "gaussian"),
        (torch.float64, 37, "gaussian"),
        (torch.bfloat16, 576, "rademacher"),
        (torch.bfloat16, 128, "gaussian"),
        (torch.float16, 2304, "rademacher"),
    ],
)
def test_some_rows_are_rows_of_the_whole(monkeypatch, dtype, width, distribution):
    weight = tensor_of(20 * width, dtype).reshape(20, width)
    rows = torch.tensor([0, 3, 19, 17, 3], device=DEVICE)
    options = {"tensor": 3, "first_direction": 2, "distribution": distribution, **ADDRESS}
    whole = combine(weight, (0.1,), out=torch.empty_like(weight), **options)
    before = weight.clone()
    launches = count_launches(monkeypatch)
    assert_same_bits(combine_rows(weight, rows, 0.1, **options), whole[rows].cpu())
    assert launches == ["combine_rows"]
    assert_same_bits(weight, before.cpu())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("num_directions", [1, 2])
def test_many_steps_at_once_are_the_steps_one_by_one(monkeypatch, dtype, num_directions):
    weight = tensor_of(2500, dtype)
    steps = [3, 4, 5, 2**32 - 1]
    coefficients = [[0.01 * (k + 1) * (-1) ** t for k in range(num_directions)] for t in range(4)]
    decays = [1.0 - 0.01 * t for t in range(4)]
    expected = weight.cpu()
    for row, decay, step in zip(coefficients, decays, steps, strict=True):
        expected = reference(expected, row, tensor=2, decay=decay, step=step, rounding="stochastic")
    launches = count_launches(monkeypatch)
    combine_steps(
        weight,
        coefficients,
        decays=decays,
        steps=steps,
        seed=ADDRESS["seed"],
        tensor=2,
        rounding="stochastic",
    )
    assert_same_bits(weight, expected)
    assert launches == ["combine_rows"]


@pytest.mark.usefixtures("_large_tiles")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("rounding", ["nearest", "stochastic"])
def test_every_16_bit_pattern_is_rounded_as_by_the_reference(dtype, rounding):
    weight = torch.arange(-(2**15), 2**15).to(torch.int16).view(dtype).to(DEVICE)
    options = {"decay": 0.7, "rounding": rounding, "tensor": 1}
    ours = combine(weight, [1e-6], out=torch.empty_like(weight), **options, **ADDRESS)
    assert_same_bits(ours, reference(weight, [1e-6], **options))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rounding", ["nearest", "stochastic"])
def test_every_nan_stays_one(dtype, rounding):
    # A GPU's own NaN has all payload bits set. Rounding it like a number would overflow.
    full = struct.unpack("<d", struct.pack("<q", 2**63 - 1))[0]
    weight = torch.ones(200, dtype=dtype, device=DEVICE)
    assert combine(weight, [full], tensor=0, rounding=rounding, **ADDRESS).isnan().all()


@pytest.mark.usefixtures("_large_tiles")
def test_gaussian_agrees_with_float64_box_muller():
    address = {"tensor": 3, **ADDRESS}
    ours = direction((20_001,), distribution="gaussian", device=DEVICE, **address).cpu()
    exact = philox.gaussian(torch.arange(20_001), direction=0, **address)
    torch.testing.assert_close(ours, exact, atol=2e-6, rtol=2e-6)


@pytest.mark.parametrize(("dtype", "rounding"), ROUNDED)
@pytest.mark.parametrize("offset", [0, 3, 2**40 + 1])
def test_gaussian_results_agree_with_the_reference(dtype, rounding, offset):
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(3001, generator=generator, dtype=torch.float64).to(dtype).to(DEVICE)
    options = {"distribution": "gaussian", "rounding": rounding, "offset": offset}
    ours = combine(
        weight, (0.1, -0.2), out=torch.empty_like(weight), tensor=3, **options, **ADDRESS
    )
    expected = reference(weight, (0.1, -0.2), tensor=3, **options)
    # A sum at the boundary between two 16-bit numbers may round to the other one.
    spacing = {2: 1e-2, 4: 2e-6, 8: 2e-6}[weight.element_size()]
    torch.testing.assert_close(ours.cpu(), expected, atol=2e-6, rtol=spacing)
    differing = (ours.cpu() != expected).double().mean()
    assert differing < (0.01 if weight.element_size() == 2 else 1.1)


@pytest.mark.usefixtures("_large_tiles")
def test_gaussian_distribution_with_tails():
    n = 100_000
    v = direction((n,), distribution="gaussian", tensor=3, device=DEVICE, **ADDRESS).cpu().double()
    assert abs(v.mean()) < 5 / math.sqrt(n)
    assert abs(v.pow(2).mean() - 1) < 5 * math.sqrt(2 / n)
    assert abs(v.pow(4).mean() - 3) < 5 * math.sqrt(96 / n)
    assert stats.kstest(v.numpy(), "norm").pvalue > 1e-4
    for threshold in (3, 4):
        for tail in (v > threshold, v < -threshold):
            expected = n * stats.norm.sf(threshold)
            assert abs(int(tail.sum()) - expected) < 5 * math.sqrt(expected)


@pytest.mark.usefixtures("_large_tiles")
def test_rademacher_moments():
    n = 50_000
    v = direction((n,), tensor=3, device=DEVICE, **ADDRESS).cpu()
    assert torch.equal(v.abs(), torch.ones(n))
    assert abs(v.double().mean()) < 5 / math.sqrt(n)


def test_addresses_outside_their_range_are_refused_before_anything_is_written():
    weights = [torch.zeros(3, device=DEVICE), torch.zeros(3, device=DEVICE)]
    with pytest.raises(ValueError, match="tensor is 1048576"):
        combine_many(weights, [1.0], tensors=[0, 2**20], **ADDRESS)
    assert not torch.stack(weights).any()


@pytest.mark.skipif(INTERPRETED, reason="needs a GPU")
def test_a_step_waits_for_nothing_and_compiles_nothing_anew():
    weights = [tensor_of(3000, dtype) for dtype in DTYPES]
    coefficients = torch.tensor([0.1], dtype=torch.float64, device=DEVICE)

    def move(seed, step):
        combine_many(weights, coefficients, seed=seed, step=step, tensors=[0, 1, 2, 3])
        combine_many(weights, [0.1 * step], seed=seed, step=step, tensors=[0, 1, 2, 3])
        combine(weights[0], [0.1 * step], seed=seed, step=step, tensor=step % 5)

    move(2, 2)
    kernels = (triton_kernels.combine_tensors, triton_kernels.combine_rows)
    before = [len(k.device_caches[torch.cuda.current_device()][0]) for k in kernels]
    torch.cuda.set_sync_debug_mode("error")
    try:
        for seed, step in [(0, 0), (1, 1), (16, 16), (2**31, 2**31), (2**64 - 1, 2**32 - 1)]:
            move(seed, step)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert [len(k.device_caches[torch.cuda.current_device()][0]) for k in kernels] == before


def test_doctor_compares_these_kernels_with_the_reference():
    expected = philox.rademacher(torch.arange(1000), seed=1, step=2, direction=0, tensor=3)
    assert torch.equal(doctor.signs_on(DEVICE), expected.float())
