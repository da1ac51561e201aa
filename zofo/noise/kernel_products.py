"""Sums of rank-one products in registers: the inner loop of the CPU kernel of rank-one directions.

    sums[i, j] = Σ_k left[k, i] · right[k, j]        in the order of k, right ±1

LLVM would keep the sums of a plain loop in memory, which measured half as fast. Here the sums
of a block of 4 × 64 bytes stay in registers while k runs. A product with a sign is exact, so a
fused multiply-add, where the CPU has one, gives the same bits as a product and a sum.
"""

# Numba infers the types of these functions from their arguments.
# mypy: disallow-untyped-defs=False, disallow-untyped-calls=False, check-untyped-defs=False
from __future__ import annotations

import numba
from llvmlite import ir
from numba.core import cgutils
from numba.extending import intrinsic, overload

BLOCK_ROWS = 4
_VECTOR_BYTES, _NUM_VECTORS = 32, 2
_INDEX, _LANE = ir.IntType(64), ir.IntType(32)
_EXACT = ["contract"]


@intrinsic
def _sum_block(typing_context, sums, left, right, row, column):
    """Compute sums[:4, column : column + n], from left[:, row : row + 4]; n is 64 bytes."""

    def codegen(context, builder, signature, args):
        arrays = [
            context.make_array(kind)(context, builder, value)
            for kind, value in zip(signature.args[:3], args[:3], strict=True)
        ]
        row, column = args[3:]
        itemsize = sums.dtype.bitwidth // 8
        lanes = _VECTOR_BYTES // itemsize
        vector = ir.VectorType(context.get_data_type(sums.dtype), lanes)
        zero = ir.Constant(vector, None)
        spread = ir.Constant(ir.VectorType(_LANE, lanes), None)  # the first lane, for all

        def pointer(which, i, j):
            index = [i, builder.add(column if which != 1 else row, ir.Constant(_INDEX, j))]
            return cgutils.get_item_pointer(
                context, builder, signature.args[which], arrays[which], index
            )

        def vector_pointer(which, i, number):
            return builder.bitcast(pointer(which, i, number * lanes), vector.as_pointer())

        places = [(i, v) for i in range(BLOCK_ROWS) for v in range(_NUM_VECTORS)]
        totals = {place: cgutils.alloca_once_value(builder, zero) for place in places}
        for total in totals.values():
            builder.store(zero, total)
        (num_directions, _) = cgutils.unpack_tuple(builder, arrays[1].shape)
        with cgutils.for_range(builder, num_directions) as loop:
            signs = [
                builder.load(vector_pointer(2, loop.index, v), align=itemsize)
                for v in range(_NUM_VECTORS)
            ]
            for i in range(BLOCK_ROWS):
                scalar = builder.load(pointer(1, loop.index, i))
                lane = builder.insert_element(zero, scalar, ir.Constant(_LANE, 0))
                scalars = builder.shuffle_vector(lane, zero, spread)
                for v in range(_NUM_VECTORS):
                    product = builder.fmul(scalars, signs[v], flags=_EXACT)
                    total = builder.fadd(builder.load(totals[i, v]), product, flags=_EXACT)
                    builder.store(total, totals[i, v])
        for i, v in places:
            target = vector_pointer(0, ir.Constant(_INDEX, i), v)
            builder.store(builder.load(totals[i, v]), target, align=itemsize)
        return context.get_dummy_value()

    return numba.types.void(sums, left, right, row, column), codegen


def _block_columns(sums):
    """The columns of a block, which are known when numba compiles."""


@overload(_block_columns)
def _block_columns_overload(sums):
    columns = _NUM_VECTORS * _VECTOR_BYTES // (sums.dtype.bitwidth // 8)
    return lambda sums: columns


@numba.njit
def sum_products(sums, left, right, row, num_columns):
    """Write the sums of four rows to sums[:, :num_columns].

    Args:
        sums: [4, columns]; num_columns rounded up to a multiple of 16 is at most columns.
        left: [directions, rows].
        right: ±1, [directions, columns], likewise.
        row: the first of the four rows.
        num_columns: number of columns that are needed.
    """
    for column in range(0, num_columns, _block_columns(sums)):
        _sum_block(sums, left, right, row, column)
