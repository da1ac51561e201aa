"""Tests of the code that the compiler makes of the Triton kernels.

They need no GPU. test_triton.py runs this file.
"""

from __future__ import annotations

import pytest
import torch
import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, make_backend
from triton.runtime.jit import create_function_from_signature

from zofo.noise import philox, triton_kernels, triton_launch

TARGET = GPUTarget("cuda", 80, 32)
STORED = {tl.float32: "fp32", tl.float64: "fp64", tl.bfloat16: "u16", tl.float16: "u16"}
KERNELS = [triton_kernels.combine_tensors, triton_kernels.combine_rows]


def assembly(kernel, dtype, purpose, scalars, aligned=True):
    stored = STORED[dtype]
    given = {
        "DTYPE": dtype,
        "STORED": tl.uint16 if stored == "u16" else dtype,
        "PURPOSE": purpose,
        "STOCHASTIC": stored == "u16",
        "SCALARS": scalars.value,
        "NUM_DIRECTIONS": 2 if scalars is triton_kernels.SCHEDULE else 1,
        "ALIGNED": aligned,
        "BLOCKS": triton_launch._BLOCKS_PER_TILE,
        "HAS_ROWS": False,
        "rows": None,
    }
    types = {
        "table": "*i64",
        "tensor_of_tile": "*i32",
        "scalars": "*fp64",
        "source": f"*{stored}",
        "out": f"*{stored}",
        "seed": "u64",
    }
    names = kernel.arg_names
    signature = {n: "constexpr" if n in given else types.get(n, "i64") for n in names}
    constants = {(i,): given[n] for i, n in enumerate(names) if n in given}
    # A launch gives the compiler these attributes for pointers that are multiples of 16 bytes.
    attributes = {
        (i,): [["tt.divisibility", 16]] for i, n in enumerate(names) if aligned and n in types
        and n not in ("seed", "scalars")
    }  # fmt: skip
    source = ASTSource(kernel, signature, constexprs=constants, attrs=attributes)
    return triton.compile(source, target=TARGET, options={"enable_fp_fusion": False}).asm["ptx"]


# Both kernels compile the same tile; only the second takes a schedule.
CASES = [
    (KERNELS[0], tl.float32, philox.RADEMACHER, triton_kernels.ARGUMENT),
    (KERNELS[0], tl.float64, philox.RADEMACHER, triton_kernels.DEVICE),
    (KERNELS[0], tl.bfloat16, philox.RADEMACHER, triton_kernels.DEVICE),
    (KERNELS[1], tl.float32, philox.RADEMACHER, triton_kernels.ARGUMENT),
    (KERNELS[1], tl.float16, philox.GAUSSIAN, triton_kernels.SCHEDULE),
]


@pytest.mark.parametrize(("kernel", "dtype", "purpose", "scalars"), CASES)
def test_nothing_is_fused_or_flushed_and_accesses_are_wide(kernel, dtype, purpose, scalars):
    ptx = assembly(kernel, dtype, purpose, scalars)
    assert "fma." not in ptx
    assert ".ftz" not in ptx
    wide = "v2.b64" if dtype == tl.float64 else "v4.b32"
    assert f"ld.global.{wide}" in ptx
    assert f"st.global.{wide}" in ptx


def test_odd_addresses_compile_without_wide_accesses():
    # A wide access to an unaligned address faults on the device.
    ptx = assembly(KERNELS[0], tl.bfloat16, philox.RADEMACHER, triton_kernels.DEVICE, False)
    assert "global.v" not in ptx


@pytest.mark.parametrize("kernel", KERNELS, ids=lambda kernel: kernel.__name__)
def test_no_value_compiles_a_kernel_anew(kernel):
    bind = create_function_from_signature(kernel.signature, kernel.params, make_backend(TARGET))
    given = {
        name: torch.zeros(2) if name in ("source", "out", "table", "tensor_of_tile") else None
        for name in kernel.arg_names
    }
    numbers = [p.name for p in kernel.params if not p.is_constexpr and given[p.name] is None]
    numbers = [n for n in numbers if n not in ("rows", "scalars")]
    assert {"seed", "step", "decay", "coefficient"} < set(numbers)
    seen = {
        str(bind(**{**given, **dict.fromkeys(numbers, value), "seed": seed})[1])
        for value in (0, 1, 16, 2**31, -(2**63))
        for seed in (0, 1, 16, 2**31, 2**64 - 1)
    }
    assert len(seen) == 1
