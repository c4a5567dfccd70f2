"""Memory of one process that the others of its node read in place.

    owner:   region, total = segment.write(edition, parts, pool)    one pass: copied, and summed up on the way
    others:  region.open()                                          [bytes], read-only
    either:  let_go(name)                                           what is read no more counts as this process's no longer

A segment is a memfd, reached as /proc/<owner>/fd/<number>. It needs neither a name nor room in /dev/shm (64 MB in many
containers), and the kernel frees it once owner and readers have ended, however they ended. Its pages stay mapped from one writing
to the next: the first takes 9 times as long as later ones with pages of 2 MB, and 19 times with those of 4 kB.
"""

import ctypes
import mmap
import os
import weakref
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Executor
from contextlib import suppress
from dataclasses import dataclass
from functools import lru_cache, partial
from itertools import accumulate
from pathlib import Path
from typing import SupportsInt

import numpy as np

ALIGNMENT = 64
"""Parts of a region begin at multiples of so many bytes; the first so many hold its edition."""
PIECE = 4 << 20
"""Bytes that one thread copies at a time."""
BLOCK = 1 << 18
"""Bytes that are copied, then summed up while they are in the caches."""
COMPILED = 256 << 20
"""Bytes of a segment from which a loop that does both at once is worth loading a compiler: it takes 1.5 s and 125 MB, and then
0.07 s a GiB instead of 0.10."""
MAPPED = 8
"""Segments that a reader keeps mapped."""


CopyAndSum = Callable[[np.ndarray, np.ndarray], SupportsInt]
"""From the second array of 8-byte words to the first; the sum modulo 2**64."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Region:
    """Where some bytes lie in a segment."""

    path: str
    inode: int
    """The segment's own: process and file numbers are reused, inodes are not."""
    start: int
    size: int

    def open(self) -> np.ndarray:
        """[size] uint8, read-only. Raises ValueError where the owner has ended or is on another node."""
        return _mapped(self.path, self.inode)[self.start : self.start + self.size]


class Segment:
    """Memory that is written region after region, and from the front again after ``begin``."""

    def __init__(self, size: int) -> None:
        number = os.memfd_create("raykd")
        weakref.finalize(self, os.close, number)
        os.ftruncate(number, size)
        self.size = size
        self.memory = _array(mmap.mmap(number, size))
        """[size] uint8."""
        self._path, self._inode = f"/proc/{os.getpid()}/fd/{number}", os.fstat(number).st_ino
        self._end = 0

    def begin(self) -> None:
        """Start again at the front: the next writes replace what is there."""
        self._end = 0

    def region(self, start: int, size: int) -> Region:
        """Some of its bytes, for other processes."""
        return Region(path=self._path, inode=self._inode, start=start, size=size)

    def write(self, edition: int, parts: Sequence[np.ndarray], pool: Executor) -> tuple[Region, int]:
        """Copy ``parts``, each ``[bytes]`` uint8, to the ``offsets`` of a new region; returns it and its ``checksum``."""
        *starts, size = offsets(part.size for part in parts)
        region = self.region(self._end, size)
        memory = self.memory[region.start : region.start + size]
        assert memory.size == size, "the segment is too small"
        memory[:ALIGNMENT].view(np.uint64)[:] = [edition, *[0] * (ALIGNMENT // 8 - 1)]  # first, for those who read still
        pieces = [
            (memory[start + first : start + first + PIECE], part[first : first + PIECE])
            for start, part in zip(starts, parts, strict=True)
            for first in range(0, part.size, PIECE)
        ]
        self._end += size
        copy_and_sum = _compiled_copy_and_sum() if self.size >= COMPILED else _copy_and_sum
        return region, (edition + sum(pool.map(partial(_copy, copy_and_sum), pieces))) % 2**64


def offsets(sizes: Iterable[int]) -> list[int]:
    """Where parts of these sizes begin in a region, and the size of the whole."""
    return list(accumulate((-(-size // ALIGNMENT) * ALIGNMENT for size in sizes), initial=ALIGNMENT))


def let_go(name: str) -> None:
    """Unmap the pages of all shared memory with ``name`` in its path that this process has looked at. They stay what they are,
    and are mapped again where they are looked at again."""
    madvise = ctypes.CDLL(None).madvise
    for line in Path("/proc/self/maps").read_text().splitlines():
        place, access, *_, path = line.split(maxsplit=5)
        if access.endswith("s") and name in path:  # of private memory, this would be the end
            start, end = (int(address, 16) for address in place.split("-"))
            madvise(ctypes.c_void_p(start), ctypes.c_size_t(end - start), mmap.MADV_DONTNEED)


def edition(data: np.ndarray) -> int:
    """The number of the publish, which a region's bytes begin with."""
    return int(data[:8].view(np.uint64)[0])


def checksum(data: np.ndarray) -> int:
    """Sum of the 8-byte words of ``[bytes]`` uint8 modulo 2**64, at the speed of reading them; the last may be shorter."""
    num_whole = data.size // 8 * 8
    words = int(np.add.reduce(data[:num_whole].view(np.uint64), dtype=np.uint64))
    return (words + int.from_bytes(data[num_whole:].tobytes(), "little")) % 2**64


def _copy(copy_and_sum: CopyAndSum, piece: tuple[np.ndarray, np.ndarray]) -> int:
    """Copy the second array to the front of the first, and zeros up to where the next part begins; returns its checksum."""
    target, source = piece
    num_whole = source.size // 8 * 8
    target[num_whole : source.size] = source[num_whole:]
    target[source.size : -(-source.size // ALIGNMENT) * ALIGNMENT] = 0
    words = copy_and_sum(target[:num_whole].view(np.uint64), source[:num_whole].view(np.uint64))
    return int(words) + checksum(source[num_whole:])


def _copy_and_sum(target: np.ndarray, source: np.ndarray) -> int:
    """Copy 8-byte words and return their sum modulo 2**64."""
    total = 0
    for first in range(0, source.size, BLOCK // 8):
        block = slice(first, first + BLOCK // 8)
        target[block] = source[block]
        total += int(np.add.reduce(source[block]))
    return total % 2**64


def _compiled_copy_and_sum() -> CopyAndSum:
    from raykd.compiled import copy_and_sum

    return copy_and_sum


@lru_cache(MAPPED)
def _mapped(path: str, inode: int) -> np.ndarray:
    reason = "it has ended"
    try:
        with open(path, "rb") as file:
            if os.fstat(file.fileno()).st_ino == inode:
                return _array(mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ))
    except OSError as error:
        reason = str(error)
    raise ValueError(
        f"the memory {path} of another process cannot be mapped ({reason}): both must be alive, on one node and of one user"
    )


def _array(memory: mmap.mmap) -> np.ndarray:
    with suppress(OSError):  # a kernel without pages of 2 MB
        memory.madvise(mmap.MADV_HUGEPAGE)
    return np.frombuffer(memory, np.uint8)
