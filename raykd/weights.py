"""Learner -> rollout weights as buckets of tensors: put away by the learner, fetched by each replica, checked on arrival.

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


@dataclass(frozen=True, slots=True, kw_only=True)
class Packed:
    """One named tensor as bytes."""

    name: str
    dtype: str
    """Torch's name of it."""
    shape: tuple[int, ...]
    data: np.ndarray
    """[bytes] uint8."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Bucket:
    """Some named tensors that travel together."""

    tensors: tuple[Packed, ...]
    checksum: int

    @property
    def bytes(self) -> int:
        """Of all tensors."""
        return sum(tensor.data.nbytes for tensor in self.tensors)


@dataclass(frozen=True, slots=True, kw_only=True)
class WeightUpdate:
    """A published policy version: references to its buckets."""

    version: int
    buckets: tuple[Any, ...]
    """``ray.ObjectRef`` of a ``Bucket`` (or the bucket itself where there is no Ray)."""
    bytes: int


def checksum(tensors: Iterable[Packed]) -> int:
    """Sum of 8-byte words modulo 2**64 over all tensors, at the speed of reading them; the last word may be shorter."""
    total = 0
    for tensor in tensors:
        data = tensor.data
        num_whole = data.size // 8 * 8
        total += int(np.add.reduce(data[:num_whole].view(np.uint64), dtype=np.uint64))
        total += int.from_bytes(data[num_whole:].tobytes(), "little")
    return total % 2**64


def pack(named_tensors: Iterable[tuple[str, Tensor]], bucket_bytes: int = 32 << 20) -> Iterator[Bucket]:
    """Group tensors into buckets of about ``bucket_bytes``, which caches hold: what is summed up is put away from there.

    On CPU a bucket shows the tensors' own memory: putting it away (``ray.put``) is the one copy that a publish makes here, and
    has to come before anybody changes or frees them. A tensor larger than a bucket gets one of its own.
    """
    pending: list[Packed] = []
    size = 0
    for name, tensor in named_tensors:
        if pending and size + tensor.nbytes > bucket_bytes:
            yield Bucket(tensors=tuple(pending), checksum=checksum(pending))
            pending, size = [], 0
        data = tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy()
        pending.append(Packed(name=name, dtype=str(tensor.dtype).removeprefix("torch."), shape=tuple(tensor.shape), data=data))
        size += tensor.nbytes
    if pending:
        yield Bucket(tensors=tuple(pending), checksum=checksum(pending))


def verify(bucket: Bucket) -> None:
    """Raise ValueError when the bytes are not those packed."""
    if checksum(bucket.tensors) != bucket.checksum:
        names = ", ".join(tensor.name for tensor in bucket.tensors[:3])
        raise ValueError(
            f"weights arrived damaged: checksum of the bucket holding {names}, ... differs from the learner's; publish again"
        )


def unpack(bucket: Bucket) -> list[tuple[str, Tensor]]:
    """The tensors of a bucket as read-only views into it."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="The given buffer is not writable")  # nobody writes: the views are read-only
        return [
            (tensor.name, torch.frombuffer(tensor.data, dtype=getattr(torch, tensor.dtype)).view(tensor.shape))
            for tensor in bucket.tensors
        ]
