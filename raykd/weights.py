"""Learner -> rollout weights as buckets of bytes: packed on the learner, fetched by each replica, checked on arrival.

    learner:  WeightUpdate(version, [put(bucket) for bucket in pack(named_tensors)])      references leave the learner
    rollout:  for bucket in update.buckets: verify(get(bucket)), then for name, tensor in unpack(bucket): load

The driver passes the ``WeightUpdate`` on; it holds references and numbers, never a weight.
"""

import warnings
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

ALIGNMENT = 64
"""Bytes; every tensor starts at a multiple, so that it can be viewed in place in any dtype."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Bucket:
    """Some named tensors in one contiguous block."""

    data: np.ndarray
    """[bytes] uint8."""
    entries: tuple[tuple[str, str, tuple[int, ...], int], ...]
    """(name, torch dtype name, shape, byte offset) of each tensor."""
    checksum: int


@dataclass(frozen=True, slots=True, kw_only=True)
class WeightUpdate:
    """A published policy version: references to its buckets."""

    version: int
    buckets: tuple[Any, ...]
    """``ray.ObjectRef`` of a ``Bucket`` (or the bucket itself where there is no Ray)."""
    bytes: int


def checksum(data: np.ndarray) -> int:
    """Sum of 8-byte words modulo 2**64, at memory speed; ``data`` [bytes] uint8 with a length that is a multiple of 8."""
    return int(np.add.reduce(data.view(np.uint64), dtype=np.uint64))


def pack(named_tensors: Iterable[tuple[str, Tensor]], bucket_bytes: int = 256 << 20) -> Iterator[Bucket]:
    """Lay tensors end to end in buckets of about ``bucket_bytes``; a larger tensor gets a bucket of its own."""
    pending: list[tuple[str, Tensor]] = []
    size = 0
    for name, tensor in named_tensors:
        if pending and size + tensor.nbytes > bucket_bytes:
            yield _bucket(pending)
            pending, size = [], 0
        pending.append((name, tensor))
        size += tensor.nbytes
    if pending:
        yield _bucket(pending)


def verify(bucket: Bucket) -> None:
    """Raise ValueError when the bytes are not those packed."""
    if checksum(bucket.data) != bucket.checksum:
        names = ", ".join(entry[0] for entry in bucket.entries[:3])
        raise ValueError(
            f"weights arrived damaged: checksum of the bucket holding {names}, ... differs from the learner's; publish again"
        )


def unpack(bucket: Bucket) -> Iterator[tuple[str, Tensor]]:
    """The tensors of a bucket as read-only views into its block."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="The given buffer is not writable")  # nobody writes: the views are read-only
        flat = torch.frombuffer(bucket.data, dtype=torch.uint8)
    for name, dtype_name, shape, offset in bucket.entries:
        dtype: torch.dtype = getattr(torch, dtype_name)
        num_bytes = int(np.prod(shape, dtype=np.int64)) * dtype.itemsize
        yield name, flat[offset : offset + num_bytes].view(dtype).view(shape)


def _bucket(named_tensors: list[tuple[str, Tensor]]) -> Bucket:
    offsets = np.cumsum([0, *(-(-tensor.nbytes // ALIGNMENT) * ALIGNMENT for _, tensor in named_tensors)]).tolist()
    data = np.zeros(offsets[-1], dtype=np.uint8)
    flat = torch.from_numpy(data)
    entries = []
    for (name, tensor), offset in zip(named_tensors, offsets, strict=False):
        flat[offset : offset + tensor.nbytes].copy_(tensor.detach().contiguous().view(-1).view(torch.uint8))
        entries.append((name, str(tensor.dtype).removeprefix("torch."), tuple(tensor.shape), offset))
    return Bucket(data=data, entries=tuple(entries), checksum=checksum(data))
