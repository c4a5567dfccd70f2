"""Products on CPU: float32 throughout, of the weight that was written last, whoever multiplies."""

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch

from raykd import cpu_products
from raykd.cpu_products import COLUMNS, PLAIN_ROWS, ROWS, STATES, PackedWeight, add_outer, product_by_blocks
from raykd.rollout.cpu_head import TiledWeight

KINDS = (PackedWeight, TiledWeight)


def matrices(states: int, rows: int, width: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return tuple(torch.randn(size, width, generator=generator).bfloat16() for size in (states, rows))  # pyright: ignore[reportReturnType]


needs_kernel = pytest.mark.skipif(cpu_products._kernel() is None, reason="this CPU has no products of bfloat16")


@contextmanager
def threads_of(number: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(number)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("threads", [1, 2, 5])
@pytest.mark.parametrize("states", [0, 1, 9])
@pytest.mark.parametrize("rows", [1, PLAIN_ROWS, 3 * PLAIN_ROWS + 77])
def test_a_product_by_blocks_is_the_product(rows: int, states: int, threads: int, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    hidden, weight = (torch.randn(size, 2 * 48, generator=generator).to(dtype)[:, ::2] for size in (states, rows))
    with threads_of(threads):
        found = product_by_blocks(hidden, weight.requires_grad_())
    assert found.dtype == dtype and not found.requires_grad
    torch.testing.assert_close(found.double(), hidden.double() @ weight.detach().double().T, atol=1e-5, rtol=1e-5)


def test_one_thread_does_it_where_openmp_is_not_to_be_had(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu_products, "_openmp", lambda: None)
    hidden, weight = torch.randn(3, 8), torch.randn(2 * PLAIN_ROWS + 1, 8)
    torch.testing.assert_close(product_by_blocks(hidden, weight), hidden @ weight.T)


def test_what_goes_wrong_in_a_thread_is_raised() -> None:
    with pytest.raises(RuntimeError, match="shapes"):
        product_by_blocks(torch.zeros(3, 8), torch.zeros(PLAIN_ROWS + 1, 9))


@needs_kernel
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("threads", [1, 2, 5])
@pytest.mark.parametrize("states", [0, 1, 2, STATES, 2 * STATES + 3])
@pytest.mark.parametrize("rows", [1, 77, ROWS, ROWS + 1, 3 * ROWS - 5])
def test_it_is_the_product_in_float32(kind: type[PackedWeight], rows: int, states: int, threads: int) -> None:
    hidden, weight = matrices(states, rows, 48)
    with threads_of(threads):
        found = kind(weight).product(hidden)
    assert found.dtype == torch.float32 and found.shape == (states, rows)
    torch.testing.assert_close(found.double(), hidden.double() @ weight.double().T, atol=1e-5, rtol=1e-5)


@needs_kernel
@pytest.mark.parametrize("kind", KINDS)
def test_another_weight_takes_the_place_of_the_first_to_its_last_row(kind: type[PackedWeight]) -> None:
    hidden, weight = matrices(3, ROWS + 9, 64)
    packed = kind(weight)
    _, other = matrices(3, ROWS + 9, 64, seed=1)
    packed.write(other)
    torch.testing.assert_close(packed.product(hidden), hidden.float() @ other.float().T)


@needs_kernel
@pytest.mark.parametrize("kind", KINDS)
def test_strided_matrices_are_read_as_they_are(kind: type[PackedWeight]) -> None:
    hidden, weight = matrices(6, 40, 32)
    found = kind(weight[::2, 1:-1]).product(hidden[::3, 1:-1])
    torch.testing.assert_close(found, hidden[::3, 1:-1].float() @ weight[::2, 1:-1].float().T)


@needs_kernel
@pytest.mark.parametrize("kind", KINDS)
def test_a_weight_may_begin_between_two_pairs(kind: type[PackedWeight]) -> None:
    hidden, weight = matrices(6, 40, 32)
    memory = torch.zeros(weight.numel() + 1, dtype=torch.bfloat16)
    shifted = memory[1:].view_as(weight)
    shifted.copy_(weight)
    torch.testing.assert_close(kind(shifted).product(hidden), kind(weight).product(hidden), atol=0, rtol=0)


@needs_kernel
@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("width", [1, 48, COLUMNS + 2])
@pytest.mark.parametrize("rows", [1, 77, 2 * ROWS + 5])
@pytest.mark.parametrize("num", [0, 1, 2, 9, 64])
def test_outer_products_are_added_in_float32(num: int, rows: int, width: int, threads: int) -> None:
    generator = torch.Generator().manual_seed(0)
    first, second = (torch.randn(num, 2 * size, generator=generator).bfloat16()[:, :size] for size in (rows, width))
    total = torch.full((rows, width), torch.nan)
    with threads_of(threads):
        add_outer(total, first, second.contiguous(), beta=0)
        expected = first.double().T @ second.double()
        torch.testing.assert_close(total.double(), expected, atol=1e-4, rtol=1e-5)
        add_outer(total, first, second.contiguous(), beta=1)
    torch.testing.assert_close(total.double(), 2 * expected, atol=1e-4, rtol=1e-5)


@pytest.mark.parametrize("weight", [torch.zeros(4, 8), torch.zeros(4, 7, dtype=torch.bfloat16)], ids=["float32", "odd width"])
def test_what_it_has_no_kernel_for_is_said(weight: torch.Tensor) -> None:
    with pytest.raises(NotImplementedError, match="no products of"):
        PackedWeight(weight)
