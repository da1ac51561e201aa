"""Launch the CPU kernels: many tensors in one call, on the threads that torch computes with.

These threads are torch's own OpenMP team, which the OpenMP runtime that torch has loaded provides.
After a matrix product, its workers spin for a while, and threads of another pool would share the
cores with them. On two cores, such a pool measured three times slower than one thread. A pool
serves only if the runtime cannot be found.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
from torch import Tensor

from zofo.noise import kernels, philox

# Numba has no 16-bit floats.
_SEEN_AS: Final = {
    torch.float32: np.float32,
    torch.float64: np.float64,
    torch.bfloat16: np.uint16,
    torch.float16: np.int16,
}
_MIN_ELEMENTS_FOR_THREADS: Final = 1 << 16


class Plan:
    """The updates of every tensor in a call; arguments as for `zofo.noise.backends.compute`."""

    def __init__(
        self,
        dtype: torch.dtype,
        coefficients: Sequence[Sequence[float]],
        *,
        decays: Sequence[float],
        steps: Sequence[int],
        seed: int,
        purpose: int,
        first_direction: int,
        stochastic: bool,
    ) -> None:
        wide = np.float64 if dtype == torch.float64 else np.float32
        self.num_steps = len(steps)
        self.task_size = kernels.MATRIX_GRAIN if purpose == philox.ROWS else kernels.GRAIN
        self.function = kernels.entry(_SEEN_AS[dtype], wide)
        # [steps, directions]
        scalars = np.asarray(coefficients, dtype=wide).reshape(len(steps), -1)
        factors = np.asarray(decays, dtype=wide)
        addresses = np.asarray(steps, dtype=np.uint64)
        # The table below holds addresses of these arrays, so they must live as long as the plan.
        self._kept = (scalars, factors, addresses)
        self._table = np.array(
            (  # in the order of the fields in `kernels`
                scalars.ctypes.data,
                factors.ctypes.data,
                addresses.ctypes.data,
                len(steps),
                scalars.shape[1],
                seed - (1 << 64) if seed >> 63 else seed,  # the same 64 bits, as a signed integer
                purpose,
                first_direction,
                stochastic,
            ),
            dtype=np.int64,
        )
        self.address: int = self._table.ctypes.data


class Call:
    """Tensors of one dtype, laid out for the kernel. Many plans may run it, one at a time.

    Args:
        jobs: int64, [tensors, JOB_SIZE]; `kernels` names the columns.
    """

    def __init__(self, jobs: Any) -> None:
        self._jobs = jobs
        self._num_elements = int(jobs[-1, kernels.FIRST] + jobs[-1, kernels.SIZE])
        self._table = np.zeros(kernels.CALL_SIZE, dtype=np.int64)
        self._table[kernels.JOBS] = jobs.ctypes.data
        self._table[kernels.NUM_JOBS] = len(jobs)
        self._address = self._table.ctypes.data

    def run(self, plan: Plan) -> None:
        """Compute and write every tensor."""
        self._table[kernels.PLAN], self._table[kernels.COUNTER] = plan.address, 0
        self._table[kernels.TASK_SIZE] = plan.task_size
        self._table[kernels.NUM_TASKS] = -(-self._num_elements // plan.task_size)  # rounded up
        # The team has all threads or one, because libgomp ends the threads that a smaller team does
        # not use. Each step passes over all elements, so the steps count as work.
        is_large = self._num_elements * plan.num_steps >= _MIN_ELEMENTS_FOR_THREADS
        _launcher()(plan.function, self._address, torch.get_num_threads() if is_large else 1)


def call_of(
    weights: Sequence[Tensor],
    outs: Sequence[Tensor],
    tensors: Sequence[int],
    offsets: Sequence[int],
) -> Call:
    """Lay out a call on tensors that the caller keeps alive.

    Args:
        weights: contiguous, not empty, one dtype.
        outs: contiguous; each is its weight itself, or does not overlap it.
        tensors: the tensor indices.
        offsets: index of each weight's first element within its whole tensor.
    """
    sizes = [weight.numel() for weight in weights]
    jobs = np.empty((len(sizes), kernels.JOB_SIZE), dtype=np.int64)
    jobs[:, kernels.WEIGHT] = [weight.data_ptr() for weight in weights]
    jobs[:, kernels.OUT] = [out.data_ptr() for out in outs]
    jobs[:, kernels.SIZE] = sizes
    jobs[:, kernels.FIRST] = np.cumsum(sizes) - sizes
    jobs[:, kernels.TENSOR] = tensors
    jobs[:, kernels.OFFSET] = offsets
    jobs[:, kernels.WIDTH] = [weight.shape[-1] if weight.ndim else 1 for weight in weights]
    return Call(jobs)


def call_of_rows(table: Tensor, rows: Tensor, tensor: int) -> Call:
    """Lay out a call in place on `table` [n, width]; row i is row rows[i] of the whole tensor."""
    # Each row is a job, because rows that are neighbours here have distant addresses in the tensor.
    num_rows, width = table.shape
    places = np.arange(num_rows, dtype=np.int64)
    jobs = np.empty((num_rows, kernels.JOB_SIZE), dtype=np.int64)
    jobs[:, kernels.WEIGHT] = table.data_ptr() + places * (width * table.element_size())
    jobs[:, kernels.OUT] = jobs[:, kernels.WEIGHT]
    jobs[:, kernels.FIRST] = places * width
    jobs[:, kernels.SIZE] = width
    jobs[:, kernels.TENSOR] = tensor
    jobs[:, kernels.OFFSET] = rows.numpy() * width
    jobs[:, kernels.WIDTH] = width
    return Call(jobs)


def team_in_words() -> str:
    """Describe the threads that a large call runs on."""
    num_threads, path = torch.get_num_threads(), _openmp_of_torch()
    threads = "1 thread" if num_threads == 1 else f"{num_threads} threads"
    if path is None:
        return f"{threads} of a separate pool, because torch's OpenMP runtime cannot be told"
    return f"{threads} through torch's OpenMP runtime {Path(path).name}"


@lru_cache(maxsize=1)
def _launcher() -> Callable[[int, int, int], None]:
    """Make a function that runs a kernel at an address on several threads."""
    signature = ctypes.CFUNCTYPE(None, ctypes.c_void_p)
    path = _openmp_of_torch()
    parallel: Any = None if path is None else ctypes.CDLL(path).GOMP_parallel
    if parallel is not None:
        parallel.restype = None
        parallel.argtypes = (ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint)

    # ctypes releases the GIL while it calls such a function.
    @lru_cache(maxsize=8)
    def callable_at(function: int) -> Callable[[int], None]:
        return signature(function)

    def launch(function: int, call: int, num_threads: int) -> None:
        if num_threads == 1:
            callable_at(function)(call)
        elif parallel is not None:
            parallel(function, call, num_threads, 0)
        else:
            # All threads run the same call and take its tasks one by one, this thread too.
            run = callable_at(function)
            others = [_pool(num_threads).submit(run, call) for _ in range(num_threads - 1)]
            run(call)
            for other in others:
                other.result()

    return launch


def _openmp_of_torch() -> str | None:
    """The path of the OpenMP runtime that torch has loaded; None if it cannot be told.

    LLVM's and Intel's runtimes have libgomp's entry point as well.
    """
    try:
        maps = Path("/proc/self/maps").read_text()
    except OSError:
        return None
    # The sixth field of a line is the path of the file that is mapped into memory.
    loaded = {line.split(maxsplit=5)[5] for line in maps.splitlines() if line.count("/")}
    runtimes = [p for p in loaded if Path(p).name.startswith(("libgomp", "libiomp5", "libomp"))]
    # Other packages may have loaded a runtime too, so one in torch's own folder comes first.
    beside = str(Path(torch.__file__).parent)
    return min(runtimes, key=lambda path: (not path.startswith(beside), path), default=None)


@lru_cache(maxsize=1)
def _pool(num_threads: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(max_workers=num_threads, thread_name_prefix="zofo-noise")
