"""Weights from the learner's node to a replica of another: read by NIXL, or carried by Ray's object store.

    python benchmarks/between_nodes.py [--mib 1024]

Both "nodes" are on this machine, so that the network is the loopback, over TCP: what the ways cost beside it. Each way ends with
the checksum, on the replica's node. Ways take turns, each time with a version just published; medians of five, after one that is
not counted.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import ray
import torch
from ray.cluster_utils import Cluster
from rich.console import Console
from rich.table import Table
from stamp import stamp

from raykd.actors import within_reach
from raykd.between_nodes import Reader, Window
from raykd.weights import Bucket, Shelves, WeightUpdate, fetched, verify

TENSOR_MIB, REPEATS = 64, 5
OVER_TCP = {"UCX_TLS": "tcp,self", "UCX_NET_DEVICES": "lo"}
RESULTS = Path(__file__).parent / "results" / "between_nodes.json"


class Learner:
    """Publishes ones, as bfloat16."""

    def __init__(self, mib: int) -> None:
        self._tensors = [(str(i), torch.ones(TENSOR_MIB << 19, dtype=torch.bfloat16)) for i in range(-(-mib // TENSOR_MIB))]
        self._shelves = Shelves(window=Window())

    def publish(self, version: int) -> WeightUpdate:
        """Four tensors to a bucket, as large as those of a run."""
        groups = (self._tensors[first : first + 4] for first in range(0, len(self._tensors), 4))
        update = self._shelves.publish(version, groups, [tensor.nbytes for _, tensor in self._tensors])
        return replace(update, node=ray.get_runtime_context().get_node_id())


class Replica:
    """Gets an update, and checks it."""

    def __init__(self) -> None:
        self._reader = Reader()

    def read(self, update: WeightUpdate) -> None:
        """By NIXL."""
        self._check(fetched(update, self._reader).buckets)

    def carried(self, update: WeightUpdate) -> None:
        """By Ray."""
        self._check(ray.get(list(update.buckets)))

    def _check(self, buckets: Any) -> None:
        bucket: Bucket
        for bucket in buckets:
            verify(bucket)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mib", type=int, default=1024)
    mib = parser.parse_args().mib
    store = max(3 * mib << 20, 100 << 20)
    cluster = Cluster(
        initialize_head=True,
        head_node_args={"include_dashboard": False, "resources": {"replica": 1}, "object_store_memory": store},
    )
    cluster.add_node(resources={"learner": 1}, object_store_memory=store)
    ray.init(cluster.address, log_to_driver=False, runtime_env={"env_vars": OVER_TCP})
    learner = ray.remote(Learner).options(num_cpus=0, resources={"learner": 1}).remote(mib)
    replica = ray.remote(Replica).options(num_cpus=0, resources={"replica": 1}).remote()
    ways: dict[str, Callable[[WeightUpdate], Any]] = {
        "read by NIXL": lambda update: replica.read.remote(update),
        "carried by Ray's object store": lambda update: replica.carried.remote(within_reach(replace(update, remote=None), [""])),
    }
    seconds: dict[str, list[float]] = {way: [] for way in ways}
    num_bytes = 0
    for version in range(REPEATS + 1):
        for way, begin in ways.items():
            update: Any = ray.get(learner.publish.remote(version))
            num_bytes = update.bytes
            started = time.perf_counter()
            ray.get(begin(update))
            seconds[way].append(time.perf_counter() - started)
    medians = {way: statistics.median(values[1:]) for way, values in seconds.items()}
    table = Table("way", "seconds", "GB/s", title=f"{num_bytes / 2**30:.2f} GiB, loopback")
    for way, value in medians.items():
        table.add_row(way, f"{value:.3f}", f"{num_bytes / value / 1e9:.2f}")
    Console().print(table)
    RESULTS.parent.mkdir(exist_ok=True)
    RESULTS.write_text(json.dumps({"measured": stamp(), "bytes": num_bytes, "seconds": medians}, indent=2) + "\n")
    ray.shutdown()
    cluster.shutdown()


if __name__ == "__main__":
    main()
