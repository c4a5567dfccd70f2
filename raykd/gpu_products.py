"""A GPU's sums of products of bfloat16 matrices, in three bytes a number: the two of a bfloat16 result and one more.

The gradient of an output head [V, H] is summed over chunks of positions. A sum in float32 would take as much memory again as the
gradient itself, one in bfloat16 would be rounded after each chunk. Here the sum of all chunks so far is a float32 without its
last byte, two thirds of which lie where the gradient is wanted in the end:

    bits of the float32:    sign, exponent, 7 of the mantissa (high)  |  8 of the mantissa (low)  |  8 that are rounded away

A chunk rounds by 2**-17 at most, and the last one by 2**-9 as any sum does that becomes bfloat16. Product, addition and rounding
are one kernel: with so few positions in a chunk, reading and writing the sums takes as long as multiplying.
"""

from functools import cache
from importlib.util import find_spec
from typing import Any, NamedTuple

import torch
from torch import Tensor

BLOCK_V, BLOCK_H, BLOCK_N = 128, 128, 64
WARPS, STAGES = 4, 3
SCALED = 8192
"""Numbers that a block handles at a time."""


class Sum:
    """A running sum of products ``first.T @ second`` of ``[n, V]`` and ``[n, H]``, added in order."""

    def __init__(self, total: Tensor) -> None:
        """The sum goes to ``total``, ``[V, H]``. Raises NotImplementedError where that is not bfloat16 on a GPU of Hopper's kind
        or later, or has rows that its copying engine does not take."""
        suits = total.is_cuda and total.dtype == torch.bfloat16 and total.shape[1] % 16 == 0
        if not suits or torch.cuda.get_device_capability(total.device) < (9, 0) or find_spec("triton") is None:
            raise NotImplementedError(f"no sums of {total.dtype} {list(total.shape)} on {total.device} in three bytes")
        self._total, low = total, torch.empty_like(total, dtype=torch.uint8)
        self._parts = [_descriptor(part, BLOCK_V, BLOCK_H) for part in (total, low)]
        self._blocks = -(-total.shape[0] // BLOCK_V) * -(-total.shape[1] // BLOCK_H)

    def add(self, first: Tensor, second: Tensor, *, begins: bool, ends: bool) -> None:
        """Add one product; ``total`` is the whole sum after the product that ``ends`` it."""
        if len(first) == 0:  # it is the only one, and nothing describes a matrix without rows
            self._total.zero_()
            return
        factors = _descriptor(first, BLOCK_N, BLOCK_V), _descriptor(second.contiguous(), BLOCK_N, BLOCK_H)
        sizes = len(first), second.shape[1], begins, ends, BLOCK_V, BLOCK_H, BLOCK_N
        _kernels().add_product[(self._blocks,)](*factors, *self._parts, *sizes, num_warps=WARPS, num_stages=STAGES)


def _descriptor(matrix: Tensor, rows: int, columns: int) -> Any:
    """Describes a matrix to the hardware that reads and writes it in blocks."""
    from triton.tools.tensor_descriptor import TensorDescriptor  # pyright: ignore[reportMissingImports]

    return TensorDescriptor.from_tensor(matrix, [rows, columns])


def scale_(values: Tensor, factor: Tensor) -> None:
    """``values *= factor``, one number on the same GPU. A factor of 1 costs nothing, and is not waited for."""
    if find_spec("triton") is None or not values.is_contiguous():
        values.mul_(factor)
    else:
        _kernels().scale[(-(-values.numel() // SCALED),)](values, factor, values.numel(), SCALED, num_warps=WARPS)


class _Kernels(NamedTuple):
    add_product: Any
    scale: Any


@cache
def _kernels() -> _Kernels:
    import triton  # pyright: ignore[reportMissingImports]
    import triton.language as tl  # pyright: ignore[reportMissingImports]

    @triton.jit(do_not_specialize=["count"])  # one program for blocks of all sizes
    def add_product(
        first,
        second,
        high,
        low,
        count,
        width,
        begins: tl.constexpr,
        ends: tl.constexpr,
        block_v: tl.constexpr,
        block_h: tl.constexpr,
        block_n: tl.constexpr,
    ) -> None:
        # What lies beyond a matrix is read as zeros and not written. Blocks of the same rows follow each other: they read the
        # same part of ``first``.
        columns = tl.cdiv(width, block_h)
        row, column = tl.program_id(0) // columns * block_v, tl.program_id(0) % columns * block_h
        total = tl.zeros((block_v, block_h), tl.float32)
        for position in range(0, count, block_n):
            total = tl.dot(first.load([position, row]).T, second.load([position, column]), total)
        if not begins:
            upper = high.load([row, column]).to(tl.uint16, bitcast=True).to(tl.uint32)
            total += (upper << 16 | low.load([row, column]).to(tl.uint32) << 8).to(tl.float32, bitcast=True)
        if ends:
            high.store([row, column], total.to(tl.bfloat16))
        else:
            bits = total.to(tl.uint32, bitcast=True)
            bits = tl.where(total == total, bits + 128, bits)  # a NaN stays one
            high.store([row, column], (bits >> 16).to(tl.uint16).to(tl.bfloat16, bitcast=True))
            low.store([row, column], (bits >> 8 & 255).to(tl.uint8))

    @triton.jit
    def scale(values, factor, count, block: tl.constexpr) -> None:
        factor = tl.load(factor)
        if factor != 1:
            place = tl.program_id(0).to(tl.int64) * block + tl.arange(0, block)
            scaled = tl.load(values + place, place < count) * factor
            tl.store(values + place, scaled, place < count)

    return _Kernels(add_product, scale)
