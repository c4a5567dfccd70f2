"""The two loops over weights that numpy and torch have no function for, compiled by numba when they are first called.

Both run without the interpreter's lock, so that threads share the work.
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

TILE = 1024
"""Words of a row transposed at a time: width x tile words stay in the second-level cache."""
LANES = 8
"""Rows interleaved at once."""
APART = 2
"""Gap between two such groups in the tile: a power of two as their distance would map them all to the same cache lines."""


@njit(nogil=True)
def copy_and_sum(target, source):
    """Copy 8-byte words and return their sum modulo 2**64: as fast as the copy alone."""
    total = np.uint64(0)
    for i in range(source.size):
        word = source[i]
        target[i] = word
        total += word
    return total


@njit(nogil=True)
def interleave(rows, packed, first, begin, end):
    """``packed[n // width, k, n % width] = rows[n - first, k]`` in the blocks from ``begin`` to ``end``, where there are rows.

    ``rows`` [R, K] and ``packed`` [blocks, K or more, width] are 4-byte words; width is a multiple of 16, and packed begins at a
    multiple of 64 bytes.
    """
    depth, width = rows.shape[1], packed.shape[2]
    if width % 16 != 0 or packed.ctypes.data % 64 != 0 or depth > packed.shape[1]:
        raise ValueError("the packed matrix begins between two lines of the caches, or has other sizes")
    groups = width // LANES
    tile = np.empty((groups, TILE + APART, LANES), dtype=np.uint32)
    for block in range(begin, end):
        top = block * width - first
        if top < 0 or top + width > len(rows):  # a block of which rows are missing
            for row in range(max(top, 0), min(top + width, len(rows))):
                for k in range(depth):
                    packed[block, k, row - top] = rows[row, k]
            continue
        for left in range(0, depth, TILE):
            length = min(TILE, depth - left)
            for group in range(groups):
                _zip(rows[top + group * LANES : top + (group + 1) * LANES, left : left + length], tile[group])
            for k in range(length):
                target = np.uint64(packed[block, left + k].ctypes.data)
                for group in range(0, groups, 2):
                    halves = tile[group, k].ctypes.data, tile[group + 1, k].ctypes.data
                    line = target + np.uint64(4 * LANES * group)
                    _stream(line, np.uint64(halves[0]), np.uint64(halves[1]))  # pyright: ignore[reportCallIssue]


@njit(nogil=True)
def _zip(rows, tile):
    """``tile[k, lane] = rows[lane, k]``, written out such that it becomes vector instructions."""
    a, b, c, d, e, f, g, h = rows[0], rows[1], rows[2], rows[3], rows[4], rows[5], rows[6], rows[7]
    for k in range(rows.shape[1]):
        tile[k, 0], tile[k, 1], tile[k, 2], tile[k, 3] = a[k], b[k], c[k], d[k]
        tile[k, 4], tile[k, 5], tile[k, 6], tile[k, 7] = e[k], f[k], g[k], h[k]


@intrinsic
def _stream(typing: Any, target: Any, first: Any, second: Any) -> Any:
    """Store the 32 bytes at each of two addresses at a third, a multiple of 64, past the caches.

    An ordinary store reads its line of memory before it writes it, which makes up two fifths of the time. Other threads see the
    bytes at the latest when this one gives back a lock.
    """

    def generate(context: Any, builder: ir.IRBuilder, signature: Any, addresses: Any) -> Any:
        half, line = ir.VectorType(ir.IntType(64), 4), ir.VectorType(ir.IntType(64), 8)
        kinds = zip(addresses, (line, half, half), strict=True)
        to, *halves = (builder.inttoptr(address, kind.as_pointer()) for address, kind in kinds)
        order = ir.Constant(ir.VectorType(ir.IntType(32), 8), list(range(8)))
        first_half, second_half = (builder.load(half, align=4) for half in halves)
        store = builder.store(builder.shuffle_vector(first_half, second_half, order), to, align=64)
        store.set_metadata("nontemporal", builder.module.add_metadata([ir.Constant(ir.IntType(32), 1)]))
        return context.get_dummy_value()

    return types.void(types.uintp, types.uintp, types.uintp), generate
