"""Weights that stay on the learner's GPU: packed, numbered and summed up on any device, and opened by another process."""

import multiprocessing
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from test_weights import TENSORS, publish
from torch import Tensor

from raykd import gpu_sharing
from raykd.gpu_sharing import GpuRegion, GpuSegment, Handle, checksum, opened
from raykd.sharing import checksum as checksum_on_host
from raykd.weights import Bucket, Shelves, WeightUpdate, refuse_overwritten, unpack, verify

DEADLINE_S = 120.0
GPU = pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"))
LARGEST = torch.full((1000,), 2**63 - 1)
"""Words whose sum does not fit in 64 bits."""


@pytest.fixture(params=["cpu", GPU])
def shelves(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Shelves:
    """Within one process CUDA opens no handle: here it is a number of a list, everything else is what processes do."""
    memories: list[Tensor] = []

    def share(memory: Tensor) -> Handle:
        memories.append(memory)
        return Handle(gpu="ours", storage=(len(memories) - 1,))

    monkeypatch.setattr(gpu_sharing, "share", share)
    monkeypatch.setattr(gpu_sharing, "opened", lambda handle: memories[handle.storage[0]])
    return Shelves(torch.device(request.param))


def memory(update: WeightUpdate) -> Any:
    return update.buckets[0].place.handle


def spoil(bucket: Bucket, at: int) -> None:
    """Change a bit of the byte at ``at``; doing it again mends it."""
    assert isinstance(bucket.place, GpuRegion)
    bucket.place.open()[at] ^= 64


@pytest.mark.parametrize("per_bucket", [1, 4, 6])
def test_tensors_come_out_as_they_went_in(shelves: Shelves, per_bucket: int):
    update = publish(shelves, TENSORS, version=9, per_bucket=per_bucket)
    for bucket in update.buckets:
        verify(bucket)
        assert bucket.checksum == checksum_on_host(bucket.data), "that of the node's memory"
    arrived = dict(tensor for bucket in update.buckets for tensor in unpack(bucket))
    assert list(arrived) == list(TENSORS)
    for name, tensor in TENSORS.items():
        assert arrived[name].dtype == tensor.dtype and torch.equal(arrived[name].cpu(), tensor)


def test_a_bucket_is_byte_for_byte_that_of_the_nodes_memory(shelves: Shelves):
    here, there = publish(shelves, TENSORS | {"l": LARGEST}), publish(node := Shelves(), TENSORS | {"l": LARGEST})
    for on_gpu, on_node in zip(here.buckets, there.buckets, strict=True):
        assert (on_gpu.checksum, on_gpu.tensors) == (on_node.checksum, on_node.tensors)
        assert on_gpu.data.tobytes() == on_node.data.tobytes()
    assert node is not None


@pytest.mark.parametrize("which", range(len(TENSORS) - 1))
def test_any_changed_bit_is_noticed(shelves: Shelves, which: int):
    (bucket,) = publish(shelves, TENSORS, per_bucket=10).buckets
    start, size = bucket.tensors[which].start, list(TENSORS.values())[which].nbytes
    for at in (start, start + size - 1):
        spoil(bucket, at)
        with pytest.raises(ValueError, match=r"arrived damaged.*publish again"):
            verify(bucket)
        spoil(bucket, at)
    verify(bucket)


def test_a_version_that_is_held_stays_and_another_gives_its_memory_to_the_next(shelves: Shelves):
    first = publish(shelves, {"weight": torch.full((100,), 1.0)}, version=1)
    second = publish(shelves, {"weight": torch.full((100,), 2.0)}, version=2, held=[1])
    third = publish(shelves, {"weight": torch.full((90,), 3.0)}, version=3, held=[1])
    assert memory(third) == memory(second) != memory(first)
    for update, value in ((first, 1.0), (third, 3.0)):
        verify(update.buckets[0])
        assert dict(unpack(update.buckets[0]))["weight"].unique().tolist() == [value]
    for check in (verify, refuse_overwritten):
        with pytest.raises(ValueError, match="of publish 2 gave way to publish 3; hold an update"):
            check(second.buckets[0])


def test_shorter_parts_leave_nothing_of_longer_ones(shelves: Shelves):
    publish(shelves, {"weight": torch.full((1000,), 255, dtype=torch.uint8)}, version=1)
    update = publish(shelves, {"a": torch.ones(3, dtype=torch.uint8), "b": torch.ones(70, dtype=torch.uint8)}, version=2)
    assert int(update.buckets[0].place.open()[64:].sum()) == 73
    verify(update.buckets[0])


def test_the_gpu_that_is_not_there_is_named_with_a_remedy():
    handle = Handle(gpu="01234567-89ab-cdef-0123-456789abcdef", storage=())
    with pytest.raises(ValueError, match=r"GPU 01234567-89ab-cdef-0123-456789abcdef, this process sees .*resume the run"):
        opened(handle)


# From here on with CUDA's own handles, between two processes.


def serve(requests: Any, answers: Any) -> None:
    """Another process: what it finds in the updates it is given."""
    while (bucket := requests.get(timeout=DEADLINE_S)) is not None:
        try:
            verify(bucket)
            found = {name: tensor.cpu().clone().view(-1).view(torch.uint8).numpy() for name, tensor in unpack(bucket)}
            answers.put((found, checksum(bucket.place.open()), opened.cache_info().currsize))
        except ValueError as error:
            answers.put(str(error))


@pytest.fixture
def reader() -> Iterator[Any]:
    context = multiprocessing.get_context("spawn")
    requests, answers = context.Queue(), context.Queue()
    process = context.Process(target=serve, args=(requests, answers), daemon=True)
    process.start()

    def ask(bucket: Bucket) -> Any:
        requests.put(bucket)
        return answers.get(timeout=DEADLINE_S)

    yield ask
    requests.put(None)
    process.join(DEADLINE_S)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU: CUDA's handles are opened in another process")
def test_another_process_reads_the_same_bytes_in_place(reader: Any):
    shelves = Shelves(torch.device("cuda"))
    on_gpu = {name: tensor.cuda() for name, tensor in TENSORS.items()}
    first = publish(shelves, on_gpu, version=1, per_bucket=10)
    (bucket,) = first.buckets
    found, total, _ = reader(bucket)
    assert total == bucket.checksum
    for name, tensor in TENSORS.items():
        assert found[name].tobytes() == tensor.contiguous().view(-1).view(torch.uint8).numpy().tobytes()
    place = bucket.place
    assert isinstance(place, GpuRegion)
    ours = next(segment for segment in shelves._versions if isinstance(segment, GpuSegment))._memory
    ours[place.start + bucket.tensors[0].start] ^= 1
    torch.cuda.synchronize()
    assert "arrived damaged" in reader(bucket)
    ours[place.start + bucket.tensors[0].start] ^= 1
    torch.cuda.synchronize()
    second = publish(shelves, {name: tensor.logical_not().to(tensor.dtype) for name, tensor in on_gpu.items()}, 2, per_bucket=10)
    assert memory(second) == memory(first), "a second publish reuses the memory"
    assert "of publish 1 gave way to publish 2" in reader(bucket)
    found, _, num_opened = reader(second.buckets[0])
    assert found["flags"].tolist() == [0, 1, 0] and num_opened == 1
    elsewhere = Handle(gpu="elsewhere", storage=place.handle.storage)
    lost = GpuRegion(handle=elsewhere, start=0, size=place.size)
    wrong = Bucket(tensors=bucket.tensors, place=lost, edition=bucket.edition, checksum=bucket.checksum)
    assert "GPU elsewhere" in reader(wrong)
