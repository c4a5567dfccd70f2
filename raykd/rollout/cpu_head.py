"""The output head of a bfloat16 model on CPU, whose logits are float32.

vLLM casts the whole matrix to float32 for every token: with V = 50,257 most of the time that a small model needs. For few rows
the time is that of reading the matrix, which MKL multiplies as it is; PyTorch carries MKL along, without a function for this
product. For many rows, and without MKL or AMX, it is cast once for each version of the weights.
"""

import ctypes
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear

from raykd.projection import halves

FEW = 32
"""Rows up to which MKL is the faster."""


class WideHead:
    """In the place of ``LogitsProcessor._apply_head``."""

    def __init__(self) -> None:
        self._weight: Tensor | None = None

    def __call__(self, lm_head: Any, hidden: Tensor, bias: Tensor | None) -> Tensor:
        """Logits ``[B, V]``."""
        if len(hidden) <= FEW and (multiply := mkl_product()) is not None:
            logits = multiply(hidden, lm_head.weight)
            return logits if bias is None else logits.add_(bias)
        weight = self._weight = lm_head.weight.float() if self._weight is None else self._weight
        with halves(True):
            return linear(hidden.float(), weight, None if bias is None else bias.float())

    def forget(self) -> None:
        """The weights have changed."""
        self._weight = None


def widen_head(model: Any, dtype: torch.dtype) -> WideHead | None:
    """Installs one where vLLM would cast bfloat16 matrices."""
    processor = getattr(model, "logits_processor", None)
    if dtype != torch.bfloat16 or processor is None or processor.head_dtype != torch.float32:
        return None
    processor._apply_head = WideHead()
    return processor._apply_head


@cache
def mkl_product() -> Callable[[Tensor, Tensor], Tensor] | None:
    """``hidden @ weight.T``, bfloat16 ``[B, H], [V, H]`` to float32 ``[B, V]``, by MKL's ``cblas_gemm_bf16bf16f32``; None where
    there is none, or no AMX."""
    if (
        not torch.cpu._is_amx_tile_supported()
    ):  # on an AMD EPYC with other such instructions it takes 1.7 times as long as PyTorch
        return None
    try:
        gemm = ctypes.CDLL(str(Path(torch.__file__).parent / "lib" / "libtorch_cpu.so")).cblas_gemm_bf16bf16f32
    except (OSError, AttributeError):
        return None
    number, real, address = ctypes.c_int, ctypes.c_float, ctypes.c_void_p
    gemm.argtypes = [number] * 6 + [real] + [address, number] * 2 + [real, address, number]
    gemm.restype = None
    by_rows, as_it_is, transposed = 101, 111, 112

    def multiply(hidden: Tensor, weight: Tensor) -> Tensor:
        assert hidden.dtype == weight.dtype == torch.bfloat16
        hidden, weight = hidden.contiguous(), weight.contiguous()
        size, width = weight.shape
        logits = torch.empty(len(hidden), size, dtype=torch.float32)
        operands = hidden.data_ptr(), width, weight.data_ptr(), width
        gemm(by_rows, as_it_is, transposed, len(hidden), size, width, 1.0, *operands, 0.0, logits.data_ptr(), size)
        return logits

    return multiply
