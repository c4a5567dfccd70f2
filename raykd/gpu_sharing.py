"""Memory of one process on a GPU that others on the same GPU read in place; sharing.py does the same with the node's memory.

    owner:   region, total = segment.write(edition, parts)    copied, padded and summed up on the GPU
    others:  region.open()                                    [bytes] on the GPU, to be read only

Regions have the layout and the checksum of sharing.py. ``share`` and ``opened`` alone need CUDA: its inter-process handles. A GPU
is known by its UUID, for processes number those that they see.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from raykd.sharing import ALIGNMENT, offsets

OPENED = 4
"""Allocations that a reader keeps open; one that is published no more is closed when so many others have been opened."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Handle:
    """An allocation, as other processes open it."""

    gpu: str
    """UUID of the GPU that it lies on."""
    storage: tuple[Any, ...]
    """The IPC handle that torch gives to other processes, without the owner's index of the GPU."""


@dataclass(frozen=True, slots=True, kw_only=True)
class GpuRegion:
    """Where some bytes lie in a segment."""

    handle: Handle
    start: int
    size: int

    def open(self) -> Tensor:
        """[size] uint8 on the GPU, to be read only. Raises ValueError in a process that cannot reach them."""
        return opened(self.handle)[self.start : self.start + self.size]

    def edition(self) -> int:
        """The number in front of the bytes."""
        return int(self.open()[:8].view(torch.int64))

    def checksum(self) -> int:
        """The checksum of sharing.py, computed on the GPU."""
        return checksum(self.open())


class GpuSegment:
    """Memory that is written region after region, and from the front again after ``begin``."""

    def __init__(self, size: int, device: torch.device) -> None:
        self.size = size
        self._memory = torch.empty(size, dtype=torch.uint8, device=device)
        self._handle = share(self._memory)
        self._end = 0

    def begin(self) -> None:
        """Start again at the front: the next writes replace what is there."""
        self._end = 0

    def write(self, edition: int, parts: Sequence[Tensor]) -> tuple[GpuRegion, int]:
        """Copy ``parts``, each ``[bytes]`` uint8, to the ``offsets`` of a new region; returns it and its checksum once it is
        whole, for whoever reads on another stream or in another process."""
        places = offsets(part.numel() for part in parts)
        region = GpuRegion(handle=self._handle, start=self._end, size=places[-1])
        memory = self._memory[region.start : region.start + region.size]
        assert memory.numel() == region.size, "the segment is too small"
        memory[:8].view(torch.int64).fill_(edition)  # first, for those who read still
        memory[8:ALIGNMENT].zero_()
        for part, (start, end) in zip(parts, pairwise(places), strict=True):
            memory[start : start + part.numel()].copy_(part)
            memory[start + part.numel() : end].zero_()
        self._end += region.size
        return region, checksum(memory)


def checksum(data: Tensor) -> int:
    """Sum of the 8-byte words of a region modulo 2**64, where they lie; waits for what its stream has to do before."""
    return int(data.view(torch.int64).sum()) % 2**64


def gpu_uuid(device: torch.device) -> str | None:
    """None of a device that is no GPU."""
    return str(torch.cuda.get_device_properties(device).uuid) if device.type == "cuda" else None


def share(memory: Tensor) -> Handle:
    """Let other processes open what this tensor is the whole of."""
    storage: Any = memory.untyped_storage()
    _, *described = storage._share_cuda_()
    return Handle(gpu=gpu_uuid(memory.device) or "", storage=tuple(described))


@lru_cache(OPENED)
def opened(handle: Handle) -> Tensor:
    """[bytes] uint8, the whole allocation of another process."""
    seen = [gpu_uuid(torch.device("cuda", number)) for number in range(torch.cuda.device_count())]
    if handle.gpu not in seen:
        raise ValueError(
            f"the weights lie in the memory of GPU {handle.gpu}, this process sees {', '.join(map(str, seen)) or 'no GPU'}: only "
            "processes on that GPU can read them; resume the run, which finds out again where its actors are"
        )
    device = torch.device("cuda", seen.index(handle.gpu))
    new: Any = torch.UntypedStorage
    try:
        storage = new._new_shared_cuda(device.index, *handle.storage)
    except RuntimeError as error:
        raise ValueError(
            f"the memory of another process on GPU {handle.gpu} cannot be opened ({str(error).splitlines()[0]}): both must be "
            "alive, on one node, of one user, and two processes"
        ) from error
    return torch.empty(0, dtype=torch.uint8, device=device).set_(storage)
