"""The matrices of vLLM's CPU layers in the layout of the kernels that multiply by them, written in place.

vLLM on CPU multiplies by a copy of each matrix that oneDNN lays out anew, and has no way to change that copy but to make another:
8 to 15 times as slow as copying, in part because all of its memory is new. Here the memory is ours, and the kernels are two that
take it: of bfloat16 the one that vLLM has for small matrices (of SGLang's), else PyTorch's own of oneDNN. A matrix ``[N, K]`` is
seen as 4-byte words (two bfloat16 or one float32):

    packed[n // width, k, n % width] = words[n, k]        N and K padded with zeros

Nobody promises this layout, so the kernel's library packs a matrix of each shape by itself, and what we would have written has to
be equal.
"""

import ctypes
import math
from collections.abc import Callable
from concurrent.futures import Executor
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor
from vllm._custom_ops import weight_packed_linear_cpu

from raykd.compiled import interleave

WIDTHS = (64, 48, 32, 16)
"""Rows that lie beside each other, whichever was chosen."""
DEPTH = 16
"""K is padded to a multiple of so many words."""
SMALL = 2**20
"""Bytes of the largest matrix that vLLM's kernel multiplies by; of larger ones oneDNN's is as fast or faster."""
Linear = Callable[[Tensor, Tensor | None], Tensor]
"""``x @ weight.T + bias``."""


class PackedMatrix:
    """A matrix that a linear layer multiplies by, and that can be overwritten row by row."""

    linear: Linear

    def __init__(self, weight: Tensor) -> None:
        """Raises NotImplementedError where the layout is another than ours."""
        if weight.dtype not in (torch.bfloat16, torch.float32) or weight.shape[1] * weight.itemsize % 4:
            raise NotImplementedError(f"no in-place layout for {list(weight.shape)} of {weight.dtype}")
        self.dtype = weight.dtype
        numbered = torch.arange(weight.nbytes // 4, dtype=torch.int32).view(weight.dtype).view(weight.shape)  # no two words alike
        memory, self.linear = (_by_vllm if _vllm_multiplies(weight) else _by_onednn)(numbered)
        num_rows, depth = _words(weight).shape
        for width in WIDTHS:
            shape = -(-num_rows // width), -(-depth // DEPTH) * DEPTH, width
            if math.prod(shape) == memory.size:
                expected = torch.zeros(shape, dtype=torch.int32).numpy().view(np.uint32)  # torch's memory begins where it must
                interleave(_words(numbered), expected, 0, 0, len(expected))
                if np.array_equal(expected.reshape(-1), memory):
                    self._packed = memory.reshape(shape)
                    interleave(_words(weight), self._packed, 0, 0, len(expected))
                    return
        raise NotImplementedError(f"{list(weight.shape)} of {weight.dtype} is laid out in another way")

    def write(self, weight: Tensor, first: int, pool: Executor, num_threads: int) -> None:
        """Put ``weight`` ``[rows, K]`` in the place of the rows from ``first`` on, in parts of as many threads."""
        rows, width = _words(weight.to(self.dtype)), self._packed.shape[2]
        begin, end = first // width, -(-(first + len(rows)) // width)
        cuts = np.linspace(begin, end, num_threads + 1).astype(int)
        parts = [pool.submit(interleave, rows, self._packed, first, a, b) for a, b in pairwise(cuts)]
        for part in parts:
            part.result()


def _words(weight: Tensor) -> np.ndarray:
    """``[N, K]`` as 4-byte words."""
    return (weight if weight.stride(1) == 1 else weight.contiguous()).view(torch.int32).numpy().view(np.uint32)


def _vllm_multiplies(weight: Tensor) -> bool:
    """Whether vLLM's kernel takes such a matrix. Of a small one a call of oneDNN's takes longer than the product."""
    rows, depth = weight.shape
    fits = weight.dtype == torch.bfloat16 and rows % 16 == 0 and depth % 32 == 0 and weight.nbytes <= SMALL
    return fits and torch.cpu._is_avx512_bf16_supported() and hasattr(torch.ops._C, "weight_packed_linear")


def _by_vllm(weight: Tensor) -> tuple[np.ndarray, Linear]:
    packed, width = torch.ops._C.convert_weight_packed(weight), len(weight)

    def linear(x: Tensor, bias: Tensor | None) -> Tensor:
        return weight_packed_linear_cpu(x, packed, width, None if bias is None else bias.float())

    return _words(packed).reshape(-1), linear


def _by_onednn(weight: Tensor) -> tuple[np.ndarray, Linear]:
    try:
        packed = torch.ops.mkldnn._reorder_linear_weight(weight, None)
    except RuntimeError as error:  # bfloat16 on a processor without AVX-512
        raise NotImplementedError(f"oneDNN packs no {weight.dtype} on this processor") from error
    num_bytes: int = torch.ops.mkldnn._nbytes(packed)
    address: int = torch.ops.mkldnn.data_ptr(packed)
    memory = np.ctypeslib.as_array((ctypes.c_uint32 * (num_bytes // 4)).from_address(address))
    return memory, lambda x, bias: torch.ops.mkldnn._linear_pointwise(x, packed, bias, "none", [], "")
