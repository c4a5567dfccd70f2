"""Matrices in a kernel's layout: multiplied by as PyTorch does, rewritten in place as its library would have packed them."""

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from torch.nn.functional import linear

from raykd.rollout import packed_matrix
from raykd.rollout.packed_matrix import PackedMatrix

SHAPES = [(8, 8), (16, 24), (48, 64), (64, 64), (96, 172), (128, 64), (344, 64), (512, 256), (1000, 1100)]
"""[N, K]: rows that fill no block, one block, several; columns that need padding; more than one tile."""


def matrix(shape: tuple[int, int], dtype: torch.dtype, seed: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


@pytest.fixture(params=["the kernel it takes", "oneDNN's"])
def kernel(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if request.param == "oneDNN's":
        monkeypatch.setattr(packed_matrix, "_vllm_multiplies", lambda weight: False)


def test_bfloat16_takes_vllms_kernel_where_it_fits():
    fits = torch.cpu._is_avx512_bf16_supported()
    assert packed_matrix._vllm_multiplies(matrix((48, 64), torch.bfloat16, 0)) == fits
    for shape, dtype in (
        ((48, 64), torch.float32),
        ((344, 64), torch.bfloat16),
        ((64, 80), torch.bfloat16),
        ((1024, 1024), torch.bfloat16),
    ):
        assert not packed_matrix._vllm_multiplies(matrix(shape, dtype, 0))


@pytest.mark.usefixtures("kernel")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_rows_written_in_pieces_are_where_the_library_puts_them(shape: tuple[int, int], dtype: torch.dtype):
    old, new, x = matrix(shape, dtype, 0), matrix(shape, dtype, 1), matrix((5, shape[1]), dtype, 2)
    try:
        packed, expected = PackedMatrix(old), PackedMatrix(new)
    except NotImplementedError:
        pytest.skip("matrices are laid out otherwise on this processor")
    with torch.no_grad(), ThreadPoolExecutor(2) as pool:
        assert torch.equal(packed.linear(x, None), PackedMatrix(old.clone()).linear(x, None))
        for first, last in ((0, shape[0] // 3), (shape[0] // 3, shape[0] // 2), (shape[0] // 2, shape[0])):
            packed.write(new[first:last], first, pool, 2)
        assert np.array_equal(packed._packed, expected._packed)
        torch.testing.assert_close(packed.linear(x, None).float(), linear(x.float(), new.float()), atol=0.3, rtol=0.02)
        bias = matrix((1, shape[0]), dtype, 3)[0]
        torch.testing.assert_close(packed.linear(x, bias), packed.linear(x, None) + bias, atol=0.3, rtol=0.02)
        rows = x[:4].view(2, 2, -1)
        torch.testing.assert_close(packed.linear(rows, bias), packed.linear(x[:4], bias).view(2, 2, -1), atol=0.3, rtol=0.02)


def test_a_transposed_matrix_and_another_dtype_are_written_as_they_are_meant():
    weight = matrix((64, 96), torch.float32, 0)
    with torch.no_grad(), ThreadPoolExecutor(1) as pool:
        try:
            packed, expected = PackedMatrix(torch.zeros(64, 96).bfloat16()), PackedMatrix(weight.bfloat16())
        except NotImplementedError:
            pytest.skip("matrices are laid out otherwise on this processor")
        packed.write(weight.t().contiguous().t(), 0, pool, 1)
        assert np.array_equal(packed._packed, expected._packed)


def test_what_has_no_layout_here_is_refused():
    with pytest.raises(NotImplementedError, match="no in-place layout"):
        PackedMatrix(torch.zeros(64, 63).bfloat16())
    with pytest.raises(NotImplementedError, match="no in-place layout"):
        PackedMatrix(torch.zeros(64, 64).half())
