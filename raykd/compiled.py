"""Loops over weights that numpy and torch have no function for, compiled by numba when they are first called.

They run without the interpreter's lock, so that threads share the work.
"""

from typing import Any

import numpy as np
from llvmlite import ir
from llvmlite.binding import ffi
from numba import njit
from numba.core import types
from numba.extending import intrinsic

# When vLLM's engine starts on CPU, it looks into the __dict__ of everything that any module holds. This object, a library, has
# none and answers with a function of that name.
ffi.lib._fntab.setdefault("__dict__", {})

compiled: Any = njit(nogil=True)
"""A function of numbers, as machine code."""

SIDE = 16
"""Rows and columns transposed at once: 64 bytes of each, a line of the caches."""


@compiled
def copy_and_sum(target, source):
    """Copy 8-byte words and return their sum modulo 2**64: as fast as the copy alone."""
    total = np.uint64(0)
    for i in range(source.size):
        word = source[i]
        target[i] = word
        total += word
    return total


@compiled
def interleave(rows, packed, first, begin, end):
    """``packed[n // width, k, n % width] = rows[n - first, k]`` in the blocks from ``begin`` to ``end``, where there are rows.

    ``rows`` [R, K] and ``packed`` [blocks, K or more, width] are 4-byte words; width is a multiple of 16, and packed begins at a
    multiple of 64 bytes.
    """
    depth, width = rows.shape[1], packed.shape[2]
    if width % 16 != 0 or packed.ctypes.data % 64 != 0 or depth > packed.shape[1]:
        raise ValueError("the packed matrix begins between two lines of the caches, or has other sizes")
    whole = depth // SIDE * SIDE
    for block in range(begin, end):
        top = block * width - first
        if top < 0 or top + width > len(rows):  # a block of which rows are missing
            for row in range(max(top, 0), min(top + width, len(rows))):
                for k in range(depth):
                    packed[block, k, row - top] = rows[row, k]
            continue
        for row in range(0, width, SIDE):
            for k in range(0, whole, SIDE):
                source, target = rows[top + row, k:].ctypes.data, packed[block, k, row:].ctypes.data
                _transpose(source, rows.strides[0], target, 4 * width)  # pyright: ignore[reportCallIssue]
        for k in range(whole, depth):
            for row in range(width):
                packed[block, k, row] = rows[top + row, k]


@intrinsic
def _transpose(typing: Any, source: Any, source_step: Any, target: Any, target_step: Any) -> Any:
    """Write 16 x 16 words to the address ``target``, a multiple of 64, as columns what are rows at ``source``; steps, from row to
    row, are in bytes. Past the caches: an ordinary store reads its line of memory before it writes it.

    Stage by stage, the words that stand apart by 1, 2, 4 and 8 rows and columns change places. Other threads see the bytes at the
    latest when this one gives back a lock.
    """

    def generate(context: Any, builder: ir.IRBuilder, signature: Any, arguments: Any) -> Any:
        line = ir.VectorType(ir.IntType(32), SIDE)
        kinds = zip(arguments, signature.args, strict=True)
        first, step, to, to_step = (context.cast(builder, argument, kind, types.uintp) for argument, kind in kinds)

        def place(start: Any, distance: Any, number: int) -> Any:
            offset = builder.mul(distance, ir.Constant(distance.type, number))
            return builder.inttoptr(builder.add(start, offset), line.as_pointer())

        def mixed(one: Any, other: Any, lanes: list[int]) -> Any:
            return builder.shuffle_vector(one, other, ir.Constant(ir.VectorType(ir.IntType(32), SIDE), lanes))

        rows = [builder.load(place(first, step, number), align=4) for number in range(SIDE)]
        for apart in (1, 2, 4, 8):
            for low in (number for number in range(SIDE) if not number & apart):
                one, other = rows[low], rows[low | apart]
                rows[low] = mixed(one, other, [lane + (SIDE - apart if lane & apart else 0) for lane in range(SIDE)])
                rows[low | apart] = mixed(one, other, [lane + (SIDE if lane & apart else apart) for lane in range(SIDE)])
        past_caches = builder.module.add_metadata([ir.Constant(ir.IntType(32), 1)])
        for number, row in enumerate(rows):
            builder.store(row, place(to, to_step, number), align=64).set_metadata("nontemporal", past_caches)
        return context.get_dummy_value()

    return types.void(source, source_step, target, target_step), generate
