"""Products of states and a large matrix on a CPU, summed in float32.

All of a matrix at once is multiplied at half the speed where it has an odd number of rows, as GPT-2's vocabulary has, or where
states are few. So each of PyTorch's threads multiplies its own share of blocks of rows: ``product_by_blocks``.

Of bfloat16 matrices PyTorch has no such product. ``mm`` rounds what it has summed to bfloat16, and float32 matrices that are
multiplied as bfloat16 are laid out anew for each product, which takes longer than the product of a hundred rows. But it carries
the kernel along, oneDNN's for blocks that stay in the caches, for its attention on CPU. A weight is laid out for it once,

    packed[block, k // 2, row, k % 2] = weight[block * rows + row, k]

and multiplied a block at a time: ``PackedWeight``. A weight's gradient is a sum over positions, made in the same way:
``add_outer``. Threads of our own would have to share the cores with PyTorch's, which wait for their next work without rest.
"""

import ctypes
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

PLAIN_ROWS = 512
"""Rows of a weight in one block."""
ROWS = 1024
"""Rows in one block of a packed weight."""
STATES = 64
"""Hidden states multiplied at a time; the kernel is compiled anew for each number of them."""
COLUMNS = 512
"""Columns of a weight's gradient in one block; it has ``ROWS`` rows."""
Loop = Callable[..., None]
"""What ``multiply_blocks`` makes."""


def product_by_blocks(states: Tensor, weight: Tensor) -> Tensor:
    """``states @ weight.T``: ``[n, H]`` and ``[V, H]`` of one dtype to ``[n, V]``, without a gradient."""
    found = states.new_empty(len(states), len(weight))

    @torch.inference_mode()  # of each thread
    def multiply(thread: int, threads: int) -> None:
        for row in range(thread * PLAIN_ROWS, len(weight), threads * PLAIN_ROWS):
            rows = slice(row, row + PLAIN_ROWS)
            torch.mm(states, weight[rows].T, out=found[:, rows])

    _share(multiply)
    return found


class PackedWeight:
    """A matrix ``[V, H]`` of bfloat16 to multiply by."""

    rows = ROWS
    """In a block. The loop over blocks is the interpreter's; of smaller ones it would take longer than the products."""

    def __init__(self, weight: Tensor) -> None:
        """Raises NotImplementedError where this CPU or this PyTorch has no kernel for it."""
        suits = weight.is_cpu and weight.dtype == torch.bfloat16 and weight.shape[1] % 2 == 0
        if not suits or (kernel := _kernel()) is None:
            raise NotImplementedError(f"no products of {weight.dtype} in float32 with {list(weight.shape)} on {weight.device}")
        self._kernel = kernel
        self._size, self._width = weight.shape
        self._blocks = torch.zeros(-(-self._size // self.rows), self._width // 2, self.rows, dtype=torch.int32)
        self._multiply = self._prepared(multiply_blocks(kernel.multiply, self.rows))
        self.write(weight)

    def write(self, weight: Tensor) -> None:
        """Put another of the same shape in its place."""
        weight = weight.detach().contiguous()
        self._lay_out((weight.clone() if weight.storage_offset() % 2 else weight).view(torch.int32))

    def product(self, states: Tensor) -> Tensor:
        """``states @ weight.T``: ``[n, H]`` bfloat16 to ``[n, V]`` float32."""
        assert states.dtype == torch.bfloat16 and states.shape[1] == self._width
        states = states.detach().contiguous()
        logits = torch.empty(len(states), self._size)
        sizes = len(states), self._size, self._width
        places = states.data_ptr(), self._blocks.data_ptr(), logits.data_ptr()
        self._kernel.share(lambda thread, threads: self._multiply(thread, threads, *sizes, *places))
        return logits

    def _prepared(self, loop: Loop) -> Loop:
        return loop

    def _lay_out(self, pairs: Tensor) -> None:
        """The rows of a weight, as pairs of numbers ``[V, H / 2]``, in blocks."""
        whole = self._size // self.rows
        self._blocks[:whole] = pairs[: whole * self.rows].view(whole, self.rows, self._width // 2).transpose(1, 2)
        if rest := self._size % self.rows:
            self._blocks[whole, :, :rest] = pairs[whole * self.rows :].T


def multiply_blocks(multiply: Callable[..., None], block_rows: int) -> Loop:
    """A function that multiplies states by every ``step``-th block from the number ``first`` on; matrices are addresses."""

    def loop(first: int, step: int, num: int, size: int, width: int, states: int, blocks: int, logits: int) -> None:
        for row in range(first * block_rows, size, step * block_rows):
            rows, weight = min(block_rows, size - row), blocks + 2 * row * width
            for state in range(0, num, STATES):
                those, target = states + 2 * state * width, logits + 4 * (state * size + row)
                multiply(min(STATES, num - state), rows, width, width, block_rows, size, False, those, weight, target, True)

    return loop


def add_outer(total: Tensor, first: Tensor, second: Tensor, *, beta: int) -> None:
    """``total = beta total + first.T @ second``: ``[n, V]`` and ``[n, H]`` bfloat16 to ``[V, H]`` float32, beta 0 or 1.

    On CPUs that have a ``PackedWeight``. The rows of ``first`` may lie apart.
    """
    kernel = _kernel()
    assert kernel is not None and total.is_contiguous() and first.stride(1) == 1
    (num, num_rows), width = first.shape, second.shape[1]
    if num == 0:
        if beta == 0:
            total.zero_()
        return
    depth = num + num % 2
    pairs = pad(second, (0, 0, 0, depth - num)).unflatten(0, (-1, 2)).transpose(1, 2).contiguous()

    def multiply(thread: int, threads: int) -> None:
        block = torch.zeros(ROWS, depth, dtype=torch.bfloat16)
        for row in range(thread * ROWS, num_rows, threads * ROWS):
            size = min(ROWS, num_rows - row)
            block[:size, :num] = first[:, row : row + size].T
            for column in range(0, width, COLUMNS):
                shape = size, min(COLUMNS, width - column), depth, depth, width, width
                factors = block.data_ptr(), pairs.data_ptr() + 4 * column
                kernel.multiply(*shape, bool(beta), *factors, total.data_ptr() + 4 * (row * width + column), True)

    kernel.share(multiply)


class _Kernel(NamedTuple):
    multiply: Callable[..., None]
    """M, N, K, distances of rows of the three matrices, whether to add, the matrices, whether the second lies in pairs."""
    release: Callable[[bool], None]
    """Gives back the part of the CPU that a thread holds for the kernel."""

    def share(self, work: Callable[[int, int], None]) -> None:
        """As ``_share``, of work with the kernel."""

        def run(thread: int, threads: int) -> None:
            work(thread, threads)
            self.release(True)

        _share(run)


class _OpenMP(NamedTuple):
    in_parallel: Callable[..., None]
    """A function and its argument, number of threads, flags."""
    thread_number: Callable[[], int]
    num_threads: Callable[[], int]


_FUNCTION = ctypes.CFUNCTYPE(None, ctypes.c_void_p)


def _share(work: Callable[[int, int], None]) -> None:
    """Run a function of the thread and the number of threads in each of PyTorch's; in this one alone where these are not to be
    had. Products that PyTorch makes there take one thread."""
    openmp = _openmp()
    if openmp is None:
        work(0, 1)
        return
    errors: list[BaseException] = []

    def run(_: Any) -> None:
        try:
            work(openmp.thread_number(), openmp.num_threads())
        except BaseException as error:  # the library that calls could not pass it on
            errors.append(error)

    openmp.in_parallel(_FUNCTION(run), None, torch.get_num_threads(), 0)
    for error in errors:
        raise error


@cache
def _torch_library() -> Any:
    """PyTorch's CPU code, and what it is linked to; None where it is not to be found."""
    try:
        return ctypes.CDLL(str(Path(torch.__file__).parent / "lib" / "libtorch_cpu.so"))
    except OSError:
        return None


@cache
def _openmp() -> _OpenMP | None:
    try:
        functions = [_torch_library()[name] for name in ("GOMP_parallel", "omp_get_thread_num", "omp_get_num_threads")]
    except (TypeError, AttributeError):
        return None
    in_parallel, *numbers = functions
    in_parallel.argtypes = [_FUNCTION, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint]
    in_parallel.restype = None
    return _OpenMP(in_parallel, *numbers)


@cache
def _kernel() -> _Kernel | None:
    if not (torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()) or not torch.backends.mkldnn.enabled:
        return None
    if _openmp() is None:
        return None
    try:
        multiply = _torch_library()["_ZN2at6native7cpublas6brgemmEllllllbPKN3c108BFloat16ES5_Pfb"]  # at::native::cpublas::brgemm
        release = _torch_library()["_ZN2at6native7cpublas14brgemm_releaseEb"]
    except AttributeError:
        return None
    number, truth = ctypes.c_int64, ctypes.c_bool
    multiply.argtypes = [*[number] * 6, truth, *[number] * 3, truth]
    release.argtypes = [truth]
    multiply.restype = release.restype = None
    return _Kernel(multiply, release)
