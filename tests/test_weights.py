"""Buckets: every byte arrives, and one that does not is noticed."""

from copy import deepcopy

import pytest
import torch

from raykd.weights import Bucket, pack, unpack, verify

TENSORS = {
    "matrix": torch.randn(7, 5),
    "three halves": torch.tensor([1.0, 2.0, 3.0]).bfloat16(),
    "transposed": torch.randn(6, 4).t(),
    "number": torch.tensor(3),
    "flags": torch.tensor([True, False, True]),
}


def buckets(bucket_bytes: int) -> list[Bucket]:
    return [deepcopy(bucket) for bucket in pack(TENSORS.items(), bucket_bytes)]


@pytest.mark.parametrize("bucket_bytes", [1, 100, 10_000])
def test_tensors_come_out_as_they_went_in(bucket_bytes: int):
    packed = buckets(bucket_bytes)
    assert len(packed) == {1: 5, 100: 4, 10_000: 1}[bucket_bytes]
    assert sum(bucket.bytes for bucket in packed) == sum(tensor.nbytes for tensor in TENSORS.values())
    for bucket in packed:
        verify(bucket)
    arrived = dict(tensor for bucket in packed for tensor in unpack(bucket))
    assert list(arrived) == list(TENSORS)
    for name, tensor in TENSORS.items():
        assert arrived[name].dtype == tensor.dtype and torch.equal(arrived[name], tensor)


@pytest.mark.parametrize("which", range(len(TENSORS)))
def test_any_changed_bit_is_noticed(which: int):
    (bucket,) = buckets(10_000)
    for at in (0, -1):  # the last byte may lie outside the last whole word
        bucket.tensors[which].data[at] ^= 64
        with pytest.raises(ValueError, match=r"arrived damaged.*publish again"):
            verify(bucket)
        bucket.tensors[which].data[at] ^= 64
    verify(bucket)


def test_packing_copies_nothing_that_lies_on_the_cpu():
    tensor = torch.zeros(16)
    (bucket,) = pack([("weight", tensor)])
    tensor[3] = 1.0
    assert bucket.tensors[0].data.any()
