"""Weights on their way to replicas of other nodes, on a real Ray cluster of two."""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import ray
import torch
from ray.cluster_utils import Cluster

from raykd.actors import within_reach
from raykd.weights import Shelves, WeightUpdate, unpack, verify

pytestmark = pytest.mark.stack

DEADLINE_S = 120.0


@pytest.fixture
def cluster() -> Iterator[Cluster]:
    ray.shutdown()
    started = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "resources": {"first": 1}})
    started.add_node(num_cpus=1, resources={"second": 1})
    here = Path(__file__).parent
    paths = {"PYTHONPATH": os.pathsep.join([str(here), str(here.parent)])}  # workers of a cluster do not know the driver's
    ray.init(started.address, log_to_driver=False, runtime_env={"env_vars": paths})
    yield started
    ray.shutdown()
    started.shutdown()


class Learner:
    """Publishes a matrix of its own version."""

    def __init__(self) -> None:
        self._shelves = Shelves()

    def publish(self, version: int) -> WeightUpdate:
        named = [("weight", torch.full((1000, 1000), float(version))), ("bias", torch.full((10,), float(version)))]
        update = self._shelves.publish(version, ([pair] for pair in named), [tensor.nbytes for _, tensor in named])
        node = ray.get_runtime_context().get_node_id()
        return WeightUpdate(version=version, buckets=update.buckets, bytes=update.bytes, node=node)


class Replica:
    """Reads what it is given."""

    def node(self) -> str:
        return ray.get_runtime_context().get_node_id()

    def load(self, update: WeightUpdate) -> list[list[float]]:
        buckets: Any = [ray.get(b) if isinstance(b, ray.ObjectRef) else b for b in update.buckets]
        for bucket in buckets:
            verify(bucket)
        return [tensor.unique().tolist() for bucket in buckets for _, tensor in unpack(bucket)]


def on(resource: str, actor: type) -> Any:
    return ray.remote(actor).options(num_cpus=0, resources={resource: 0.1}).remote()


def test_a_replica_of_another_node_gets_the_weights_through_the_object_store(cluster: Cluster):
    learner, near, far = on("second", Learner), on("second", Replica), on("first", Replica)
    nodes: Any = ray.get([near.node.remote(), far.node.remote()], timeout=DEADLINE_S)
    assert len(set(nodes)) == 2
    for version in (1, 2):
        update: Any = ray.get(learner.publish.remote(version), timeout=DEADLINE_S)
        assert update.node == nodes[0] and within_reach(update, nodes[:1]) is update
        carried = within_reach(update, nodes)
        assert all(isinstance(bucket, ray.ObjectRef) for bucket in carried.buckets)
        loads = [near.load.remote(update), near.load.remote(carried), far.load.remote(carried)]
        assert ray.get(loads, timeout=DEADLINE_S) == [[[version]] * 2] * 3
