"""Buckets: every byte arrives, one that does not is noticed, and nothing is written over that somebody needs."""

import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import count

import pytest
import torch
from torch import Tensor

from raykd.sharing import Region
from raykd.weights import Bucket, Shelves, WeightUpdate, refuse_overwritten, unpack, verify

TENSORS = {
    "matrix": torch.randn(7, 5),
    "three halves": torch.tensor([1.0, 2.0, 3.0]).bfloat16(),
    "transposed": torch.randn(6, 4).t(),
    "number": torch.tensor(3),
    "flags": torch.tensor([True, False, True]),
    "nothing": torch.empty(0, 4),
}


def publish(
    shelves: Shelves, tensors: dict[str, Tensor], version: int = 1, per_bucket: int = 2, held: Sequence[int] = ()
) -> WeightUpdate:
    named, sizes = list(tensors.items()), [tensor.nbytes for tensor in tensors.values()]
    groups = (named[first : first + per_bucket] for first in range(0, len(named), per_bucket))
    return shelves.publish(version, groups, sizes, held)


def spoil(bucket: Bucket, at: int) -> None:
    """Change a bit of the byte at ``at``; doing it again mends it."""
    assert isinstance(bucket.place, Region)
    with open(bucket.place.path, "r+b", buffering=0) as file:
        file.seek(bucket.place.start + at)
        (byte,) = file.read(1)
        file.seek(bucket.place.start + at)
        file.write(bytes([byte ^ 64]))


def memory(update: WeightUpdate) -> str:
    return update.buckets[0].place.path


@pytest.mark.parametrize("per_bucket", [1, 4, 6])
@pytest.mark.parametrize("place", ["in shared memory", "by value"])
def test_tensors_come_out_as_they_went_in(per_bucket: int, place: str):
    shelves = Shelves()
    update = publish(shelves, TENSORS, version=9, per_bucket=per_bucket)
    assert (update.version, len(update.buckets)) == (9, {1: 6, 4: 2, 6: 1}[per_bucket])
    assert update.bytes == sum(tensor.nbytes for tensor in TENSORS.values())
    buckets = update.buckets if place == "in shared memory" else [replace(b, place=b.data.copy()) for b in update.buckets]
    for bucket in buckets:
        verify(bucket)
    arrived = dict(tensor for bucket in buckets for tensor in unpack(bucket))
    assert list(arrived) == list(TENSORS)
    for name, tensor in TENSORS.items():
        assert arrived[name].dtype == tensor.dtype and torch.equal(arrived[name], tensor)


@pytest.mark.parametrize("which", range(len(TENSORS) - 1))
def test_any_changed_bit_is_noticed(which: int):
    shelves = Shelves()
    (bucket,) = publish(shelves, TENSORS, per_bucket=10).buckets
    start, size = bucket.tensors[which].start, list(TENSORS.values())[which].nbytes
    for at in (start, start + size - 1):  # the last byte may lie outside the last whole word
        spoil(bucket, at)
        with pytest.raises(ValueError, match=r"arrived damaged.*publish again"):
            verify(bucket)
        spoil(bucket, at)
    verify(bucket)


def test_a_version_that_is_held_stays_and_another_gives_its_memory_to_the_next():
    shelves = Shelves()
    first = publish(shelves, {"weight": torch.full((100,), 1.0)}, version=1)
    second = publish(shelves, {"weight": torch.full((100,), 2.0)}, version=2, held=[1])
    third = publish(shelves, {"weight": torch.full((100,), 3.0)}, version=3, held=[1, 2])
    assert len({memory(first), memory(second), memory(third)}) == 3
    fourth = publish(shelves, {"weight": torch.full((100,), 4.0)}, version=4, held=[1, 3])
    assert memory(fourth) == memory(second)
    for update, value in ((first, 1.0), (third, 3.0), (fourth, 4.0)):
        verify(update.buckets[0])
        assert dict(unpack(update.buckets[0]))["weight"].unique().tolist() == [value]
    larger = publish(shelves, {"weight": torch.zeros(1000)}, version=5)
    assert memory(larger) not in {memory(first), memory(second), memory(third)}


def test_a_version_written_over_is_told_from_a_damaged_one_even_by_the_same_weights():
    shelves = Shelves()
    stale = publish(shelves, TENSORS, version=1)
    publish(shelves, TENSORS, version=1)
    for bucket in stale.buckets:
        for check in (verify, refuse_overwritten):
            with pytest.raises(ValueError, match="of publish 1 gave way to publish 2; hold an update"):
                check(bucket)


@pytest.mark.parametrize("holding", [False, True], ids=["nobody holds", "readers hold"])
def test_publishing_faster_than_is_read_tears_nothing(holding: bool):
    """Every tensor of version v is full of v. Two readers, as slow as engines; a reading counts that passes both checks. Of three
    versions one is written over at once, one in the middle of a reading and one after it."""
    shelves, newest, readings = Shelves(), [], {"whole": 0, "refused": 0, "torn": 0}
    held: dict[int, int] = {}
    reading_s = 0.0
    ending, versions = threading.Event(), count(1)

    def read(reader: int) -> None:
        nonlocal reading_s
        while not ending.is_set():
            started = time.monotonic()
            update: WeightUpdate = newest[-1]
            held[reader] = update.version
            if newest[-1] is not update:  # the hold came too late
                continue
            try:
                for bucket in update.buckets:
                    verify(bucket)
                values = [tensor.unique().tolist() for bucket in update.buckets for _, tensor in unpack(bucket)]
                for bucket in update.buckets:
                    refuse_overwritten(bucket)
            except ValueError as error:
                assert "damaged" in str(error) or "overwritten" in str(error)
                readings["refused"] += 1
            else:
                readings["whole" if values == [[update.version]] * 4 else "torn"] += 1
                reading_s = time.monotonic() - started

    def write(until: Callable[[], bool]) -> None:
        deadline = time.monotonic() + 60
        while not until() and time.monotonic() < deadline:
            version = next(versions)
            tensors = {f"tensor {i}": torch.full((100_000,), version, dtype=torch.int32) for i in range(4)}
            alive = {version - 1, *held.values()} if holding else {version - 1}
            newest[:] = [publish(shelves, tensors, version=version, held=sorted(alive))]
            time.sleep(version % 3 * (reading_s or 0.1))

    write(lambda: bool(newest))
    readers = [threading.Thread(target=read, args=(reader,)) for reader in range(2)]
    for thread in readers:
        thread.start()
    write(lambda: readings["whole"] >= 50 and (holding or readings["refused"] >= 5))
    ending.set()
    for thread in readers:
        thread.join(60)
    assert readings["torn"] == 0 and readings["whole"] >= 50
    assert (readings["refused"] == 0) if holding else (readings["refused"] >= 5)
    assert len(shelves._versions) <= 4, "a version for each reader, the newest, and the one being written"
