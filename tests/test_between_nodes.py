"""Weights read from another process as from another node: over TCP on the loopback, by NIXL."""

import multiprocessing
import os
import time
from collections.abc import Iterator
from typing import Any

import psutil
import pytest
import torch
from test_weights import TENSORS, publish

from raykd.between_nodes import Reader, Window, available
from raykd.weights import Shelves, WeightUpdate, fetched, refuse_overwritten, unpack, verify

pytestmark = pytest.mark.skipif(not available(), reason="needs NIXL")

DEADLINE_S = 60.0
OVER_TCP = {"UCX_TLS": "tcp,self", "UCX_NET_DEVICES": "lo"}
"""For nodes that are one machine."""


def own(requests: Any, answers: Any) -> None:
    """The learner's process: publishes what it is asked for."""
    os.environ |= OVER_TCP
    shelves = Shelves(window=Window())
    while (request := requests.get()) is not None:
        answers.put(publish(shelves, *request))


class Owner:
    """The process that ``own`` runs in."""

    def __init__(self) -> None:
        context = multiprocessing.get_context("spawn")
        self._requests, self._answers = context.Queue(), context.Queue()
        self.process = context.Process(target=own, args=(self._requests, self._answers), daemon=True)
        self.process.start()

    def publish(self, *request: Any) -> WeightUpdate:
        self._requests.put(request)
        return self._answers.get(timeout=DEADLINE_S)


@pytest.fixture
def owner() -> Iterator[Owner]:
    started = Owner()
    yield started
    started.process.kill()
    started.process.join(DEADLINE_S)


@pytest.fixture
def reader(monkeypatch: pytest.MonkeyPatch) -> Reader:
    for name, value in OVER_TCP.items():
        monkeypatch.setenv(name, value)
    return Reader(deadline_s=5.0)


def test_every_version_arrives_as_it_was_published(owner: Owner, reader: Reader):
    for version in (1, 2, 3):
        tensors = {name: tensor if version != 2 else tensor.logical_not().to(tensor.dtype) for name, tensor in TENSORS.items()}
        update = owner.publish(tensors, version, 2)
        copy = fetched(update, reader)
        assert (copy.version, copy.remote) == (version, None)
        for here, there in zip(copy.buckets, update.buckets, strict=True):
            verify(here)
            assert here.place.path != there.place.path and here.checksum == there.checksum
        arrived = dict(tensor for bucket in copy.buckets for tensor in unpack(bucket))
        assert list(arrived) == list(tensors)
        for name, tensor in tensors.items():
            assert arrived[name].dtype == tensor.dtype and torch.equal(arrived[name], tensor)


def test_a_larger_model_and_a_held_version_have_memory_of_their_own(owner: Owner, reader: Reader):
    first = owner.publish({"weight": torch.full((1000,), 1.0)}, 1)
    second = owner.publish({"weight": torch.full((3 << 20,), 2.0)}, 2, 2, [1])
    for update, value in ((second, 2.0), (first, 1.0), (second, 2.0)):
        (bucket,) = fetched(update, reader).buckets
        verify(bucket)
        assert dict(unpack(bucket))["weight"].unique().tolist() == [value]


def test_a_version_that_was_written_over_is_refused(owner: Owner, reader: Reader):
    first = owner.publish({"weight": torch.full((100,), 1.0)}, 1)
    owner.publish({"weight": torch.full((100,), 2.0)}, 2)
    (bucket,) = fetched(first, reader).buckets
    for check in (verify, refuse_overwritten):
        with pytest.raises(ValueError, match="of publish 1 gave way to publish 2"):
            check(bucket)


def test_an_owner_that_has_died_is_an_error_in_time(owner: Owner, reader: Reader):
    update = owner.publish(TENSORS, 1)
    fetched(update, reader)
    owner.process.kill()
    owner.process.join(DEADLINE_S)
    started = time.monotonic()
    with pytest.raises(ConnectionError, match=r"learner's node .*: see that it is alive and reachable.*resume the run"):
        fetched(update, reader)
    with pytest.raises(ConnectionError):
        fetched(update, Reader(deadline_s=5.0))
    assert time.monotonic() - started < 30


def test_waiting_takes_no_processor_time(owner: Owner, reader: Reader):
    fetched(owner.publish(TENSORS, 1), reader)
    for process in (psutil.Process(), psutil.Process(owner.process.pid)):
        before = process.cpu_times()
        time.sleep(1.0)
        after = process.cpu_times()
        assert after.user + after.system - before.user - before.system < 0.2
