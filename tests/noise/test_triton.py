"""Tests of the CUDA kernels without a GPU: interpreted, compiled, and unavailable.

Triton decides when it is imported whether it interprets its kernels, and other tests may have
imported it. The cases therefore run in a process of their own.
"""

from __future__ import annotations

import importlib.util
import math
import os
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch

from zofo.noise import backends
from zofo.noise.combine import combine, combine_many, combine_rows

ROOT = Path(__file__).parents[2]
ADDRESS = {"seed": 0x1234_5678_9ABC_DEF0, "step": 7}

needs_triton = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="triton is not installed"
)


def run(file: str, tmp_path: Path, **environment: str) -> None:
    options = ["-q", "--noconftest", "-p", "no:cacheprovider", "-p", "no:xdist"]
    command = [sys.executable, "-m", "pytest", *options, f"tests/noise/{file}"]
    outside = {k: v for k, v in os.environ.items() if not k.startswith(("TRITON_", "PYTEST_"))}
    done = subprocess.run(
        command,
        cwd=ROOT,
        env={**outside, "TRITON_CACHE_DIR": str(tmp_path), **environment},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]


@needs_triton
def test_interpreted_kernels(tmp_path):
    run("triton_cases.py", tmp_path, TRITON_INTERPRET="1")


@needs_triton
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_kernels_on_a_gpu(tmp_path):
    run("triton_cases.py", tmp_path)


@needs_triton
def test_compiled_kernels(tmp_path):
    run("triton_compiled.py", tmp_path)


def test_import_leaves_triton_alone():
    code = "import sys, zofo, zofo.noise; sys.exit('triton' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0


@pytest.fixture
def _forgotten():
    backends.backend.cache_clear()
    yield
    backends.backend.cache_clear()


def _no_triton():
    raise ImportError("No module named 'triton'")


@pytest.mark.usefixtures("_forgotten")
@pytest.mark.parametrize(("device", "reason"), [("cuda", "install"), ("mps", "kernels for CPU")])
def test_the_slow_way_is_said_once(monkeypatch, device, reason):
    monkeypatch.setattr(backends, "triton_launch", _no_triton)
    with pytest.warns(UserWarning, match=f"{device}.*slower.*{reason}") as caught:
        chosen = [backends.backend(device) for _ in range(3)]
    assert chosen == ["torch"] * 3
    assert len(caught) == 1


@pytest.mark.usefixtures("_forgotten")
def test_the_cpu_needs_no_triton(monkeypatch):
    monkeypatch.setattr(backends, "triton_launch", _no_triton)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        combine(torch.zeros(3), (1.0,), tensor=0, **ADDRESS)


@pytest.mark.parametrize("distribution", ["rademacher", "gaussian"])
def test_the_slow_way_gives_the_same(monkeypatch, distribution):
    weights = [torch.randn(37, 5), torch.randn(999), torch.randn(64).bfloat16()]
    options = {"distribution": distribution, **ADDRESS}

    def results():
        moved = [w.clone() for w in weights]
        rows = combine_rows(weights[0], torch.tensor([4, 0]), 0.1, tensor=0, **options)
        return [*combine_many(moved, [0.1, 0.2], tensors=[0, 1, 2], **options), rows]

    expected = results()
    monkeypatch.setattr(backends, "backend", lambda device_type: "torch")
    for ours, wanted in zip(results(), expected, strict=True):
        torch.testing.assert_close(ours, wanted, atol=2e-6, rtol=2e-6)


def test_a_device_with_kernels_goes_to_them(monkeypatch):
    """The kernels get one call for all tensors that are not empty, with unchanged coefficients."""
    calls = []

    class Kernels:
        def __getattr__(self, name):
            return lambda *args, **options: calls.append((name, args))

    monkeypatch.setattr(backends, "backend", lambda device_type: "triton")
    monkeypatch.setattr(backends, "triton_launch", Kernels)
    weights = [torch.zeros(3, 2), torch.zeros(0), torch.zeros(2)]
    coefficients = torch.tensor([0.1])
    combine_many(weights, coefficients, tensors=[0, 1, 2], **ADDRESS)
    combine(weights[0], [0.1], tensor=0, **ADDRESS)
    combine_rows(weights[0], torch.tensor([1]), 0.1, tensor=0, **ADDRESS)
    combine_many([], coefficients, tensors=[], **ADDRESS)
    assert [name for name, _ in calls] == ["combine_many", "combine", "combine_rows"]
    sources, targets, given = calls[0][1]
    assert [t.data_ptr() for t in sources] == [weights[0].data_ptr(), weights[2].data_ptr()]
    assert [t.data_ptr() for t in targets] == [t.data_ptr() for t in sources]
    assert given is coefficients


@pytest.mark.parametrize("as_tensor", [False, True])
def test_many_are_each_by_itself(as_tensor):
    weights = [torch.randn(5, 7), torch.randn(300).double(), torch.randn(33, 3).half().t()]
    coefficients = [0.1, -0.3]
    options = {"decay": 0.9, "first_direction": 3, "rounding": "stochastic", **ADDRESS}
    expected = [
        combine(w.clone(), coefficients, tensor=i + 4, **options) for i, w in enumerate(weights)
    ]
    given = torch.tensor(coefficients, dtype=torch.float64) if as_tensor else coefficients
    outs = [torch.zeros_like(w) for w in weights]
    returned = combine_many(weights, given, outs=outs, tensors=[4, 5, 6], **options)
    for out, again, wanted in zip(outs, returned, expected, strict=True):
        assert again is out
        assert torch.equal(out, wanted)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_tensor_that_is_no_number_changes_no_bit(bad):
    weights = [torch.randn(5, 7), torch.randn(300)]
    before = [w.clone() for w in weights]
    combine_many(weights, torch.tensor([0.1, bad]), tensors=[0, 1], **ADDRESS)
    for weight, copy in zip(weights, before, strict=True):
        assert torch.equal(weight, copy)


def test_unequal_numbers_are_refused():
    with pytest.raises(ValueError, match="2 weights, 2 outs and 1 tensor indices"):
        combine_many([torch.zeros(2)] * 2, [0.1], tensors=[0], **ADDRESS)
    with pytest.raises(ValueError, match=r"shape \(1, 1\)"):
        combine_many([torch.zeros(2)], torch.ones(1, 1), tensors=[0], **ADDRESS)


def test_a_bad_index_is_refused_before_anything_is_written():
    weights = [torch.zeros(3), torch.zeros(3)]
    with pytest.raises(ValueError, match="tensor is 1048576"):
        combine_many(weights, [1.0], tensors=[0, 2**20], **ADDRESS)
    assert not torch.stack(weights).any()
