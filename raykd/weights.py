"""Learner -> rollout weights as buckets of tensors: written by the learner, read in place by each replica, checked on arrival.

    learner:  update = shelves.publish(version, groups, sizes, held)        a copy in memory that the node or the GPU shares
    rollout:  for bucket in update.buckets: verify(bucket), then for name, tensor in unpack(bucket): load

    rollout on another node: update = fetched(update, reader) first, a copy in the memory of its own node

The driver passes the ``WeightUpdate`` on; it holds places and numbers, never a weight.
"""

import math
import warnings
from collections.abc import Collection, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from itertools import count
from typing import Any

import numpy as np
import torch
from torch import Tensor

from raykd.between_nodes import Reader, Remote, Window
from raykd.gpu_sharing import GpuRegion, GpuSegment
from raykd.sharing import Region, Segment, checksum, edition, offsets

BUCKET_BYTES = 256 << 20
"""Parameters gathered at a time when weights leave a sharded learner."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Packed:
    """One named tensor of a bucket."""

    name: str
    dtype: str
    """Torch's name of it."""
    shape: tuple[int, ...]
    start: int
    """Offset of its bytes within the bucket's."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Bucket:
    """Some named tensors that travel together."""

    tensors: tuple[Packed, ...]
    place: Region | GpuRegion | np.ndarray
    """Where its bytes lie on the learner's node or GPU; or the bytes themselves, ``[bytes]`` uint8."""
    edition: int
    """Number of the publish. The bytes begin with it, so that those of another publish are never taken for these."""
    checksum: int

    @property
    def data(self) -> np.ndarray:
        """[bytes] uint8, read-only; copied where they lie on a GPU."""
        if isinstance(self.place, GpuRegion):
            return self.place.open().cpu().numpy()
        return self.place.open() if isinstance(self.place, Region) else self.place


@dataclass(frozen=True, slots=True, kw_only=True, eq=False, weakref_slot=True)
class WeightUpdate:
    """A published policy version."""

    version: int
    buckets: tuple[Any, ...]
    """``Bucket``, or ``ray.ObjectRef`` of one."""
    bytes: int
    node: str = ""
    """Ray's name of the node whose memory the buckets lie in."""
    remote: Remote | None = None
    """Where other nodes find that memory, if it is shown to them."""


def grouped(sizes: Mapping[str, int]) -> list[list[str]]:
    """Names in their order, in groups of at most ``BUCKET_BYTES``, or of one tensor that is larger."""
    groups: list[list[str]] = [[]]
    size = 0
    for name, num_bytes in sizes.items():
        if groups[-1] and size + num_bytes > BUCKET_BYTES:
            groups.append([])
            size = 0
        groups[-1].append(name)
        size += num_bytes
    return groups


class Shelves:
    """Holds published versions in memory that the learner's node shares, or the processes on its GPU ``device``.

    A version is written over one that nobody needs any more, where there is such; otherwise to new memory.
    """

    def __init__(self, device: torch.device | None = None, window: Window | None = None) -> None:
        """``window``: what shows the node's memory to other nodes, if that is wanted."""
        self._device, self._window = device, window
        self._versions: dict[Segment | GpuSegment, int] = {}
        self._editions = count(1)

    def publish(
        self,
        version: int,
        groups: Iterable[Sequence[tuple[str, Tensor]]],
        sizes: Collection[int],
        held: Collection[int] = (),
    ) -> WeightUpdate:
        """Copy the named tensors, a bucket a group. ``sizes``: of all, in bytes; ``held``: versions that are to be left alone."""
        room = sum(offsets([size])[-1] for size in sizes)
        unneeded = (s for s, old in self._versions.items() if old not in held and s.size >= room)
        segment = next(unneeded, None) or (GpuSegment(room, self._device) if self._device else Segment(room))
        self._versions[segment] = version
        segment.begin()
        number = next(self._editions)
        with ThreadPoolExecutor(torch.get_num_threads(), "weights") as pool:
            buckets = tuple(_pack(group, segment, number, pool) for group in groups)
        remote = self._window.show(segment) if self._window and isinstance(segment, Segment) else None
        return WeightUpdate(version=version, buckets=buckets, bytes=sum(sizes), remote=remote)


def fetched(update: WeightUpdate, reader: Reader) -> WeightUpdate:
    """The update in memory of this node, from that of the learner's; still to be verified."""
    assert update.remote is not None, "the learner shows its memory to no other node"
    copy = reader.read(update.remote)
    buckets = tuple(replace(bucket, place=copy.region(bucket.place.start, bucket.place.size)) for bucket in update.buckets)
    return replace(update, buckets=buckets, remote=None)


def verify(bucket: Bucket) -> None:
    """Raise ValueError when the bytes are not those published."""
    refuse_overwritten(bucket)
    found = bucket.place.checksum() if isinstance(bucket.place, GpuRegion) else checksum(bucket.data)
    if found != bucket.checksum:
        raise ValueError(f"weights arrived damaged: checksum of {_names(bucket)} differs from the learner's; publish again")


def refuse_overwritten(bucket: Bucket) -> None:
    """Raise ValueError once a later version is being written over this one."""
    found = bucket.place.edition() if isinstance(bucket.place, GpuRegion) else edition(bucket.data)
    if found != bucket.edition:
        raise ValueError(
            f"weights were overwritten before they were read: {_names(bucket)} of publish {bucket.edition} gave way to publish "
            f"{found}; hold an update until every replica has loaded it"
        )


def unpack(bucket: Bucket) -> list[tuple[str, Tensor]]:
    """The tensors of a bucket as views into it, on the device where it lies; they are not to be written to."""
    whole = bucket.place.open() if isinstance(bucket.place, GpuRegion) else _as_tensor(bucket.data)
    return [(packed.name, _view(whole, packed)) for packed in bucket.tensors]


def _pack(
    named_tensors: Sequence[tuple[str, Tensor]], segment: Segment | GpuSegment, edition: int, pool: ThreadPoolExecutor
) -> Bucket:
    if isinstance(segment, GpuSegment):
        parts = [_bytes(tensor.detach()) for _, tensor in named_tensors]
        place, total = segment.write(edition, parts)
    else:
        parts = [_bytes(tensor.detach().cpu()).numpy() for _, tensor in named_tensors]
        place, total = segment.write(edition, parts, pool)
    tensors = tuple(
        Packed(name=name, dtype=str(tensor.dtype).removeprefix("torch."), shape=tuple(tensor.shape), start=start)
        for (name, tensor), start in zip(named_tensors, offsets(tensor.nbytes for _, tensor in named_tensors), strict=False)
    )
    return Bucket(tensors=tensors, place=place, edition=edition, checksum=total)


def _bytes(tensor: Tensor) -> Tensor:
    """[bytes] uint8, a copy only where they do not lie one after the other."""
    return tensor.contiguous().view(-1).view(torch.uint8)


def _as_tensor(data: np.ndarray) -> Tensor:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="The given buffer is not writable")  # nobody writes: the views are read-only
        return torch.frombuffer(data, dtype=torch.uint8)


def _view(whole: Tensor, packed: Packed) -> Tensor:
    dtype = getattr(torch, packed.dtype)
    size = math.prod(packed.shape) * dtype.itemsize
    return whole[packed.start : packed.start + size].view(dtype).view(packed.shape)


def _names(bucket: Bucket) -> str:
    return f"the bucket holding {', '.join(packed.name for packed in bucket.tensors[:3])}, ..."
