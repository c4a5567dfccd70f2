"""Weights on their way to replicas of other nodes, on a real Ray cluster of two: through NIXL, or Ray's object store; and what is
done about scores on a third one, which goes down."""

import os
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import ray
import torch
from ray.cluster_utils import Cluster
from rollout_stack import chosen_logprobs, eos_of, folder, perturbed, reference
from test_between_nodes import OVER_TCP

from raykd import between_nodes
from raykd.actors import LearnerActor, ModelFacts, RolloutActor, TeacherActor, within_reach
from raykd.algorithms import GKD
from raykd.algorithms.token_divergences import ReverseKL
from raykd.experiment import EngineConfig, LearnerConfig, RolloutConfig, TeacherConfig
from raykd.fleet import Fleet, LearnerGang
from raykd.records import Rollout, Row, Source
from raykd.replay import ReplayBuffer
from raykd.rollout.requests import GenerationRequest
from raykd.start import choose_memory
from raykd.usage import Usage
from raykd.weights import Shelves, WeightUpdate, unpack, verify
from raykd.workers import Term, Workers

pytestmark = pytest.mark.stack

DEADLINE_S = 120.0


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    ray.shutdown()
    started = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "resources": {"first": 1}})
    started.add_node(num_cpus=1, resources={"second": 1})
    here = Path(__file__).parent
    paths = {"PYTHONPATH": os.pathsep.join([str(here), str(here.parent)])}  # workers of a cluster do not know the driver's
    ray.init(started.address, log_to_driver=False, runtime_env={"env_vars": paths | OVER_TCP})
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


def on(resource: str, actor: type, *arguments: Any) -> Any:
    return ray.remote(actor).options(num_cpus=0, resources={resource: 0.1}).remote(*arguments)


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


@pytest.mark.skipif(not between_nodes.available(), reason="needs NIXL")
def test_engines_of_both_nodes_load_what_a_learner_has_on_one(cluster: Cluster, tmp_path: Path):
    theirs = folder("teacher")
    new = perturbed(reference(theirs), seed=0)
    new.save_pretrained(tmp_path)
    facts = ModelFacts(student=theirs, teacher=None, vocab_size=512, eos_ids=eos_of(theirs), max_length=64, seed=0)
    learner = on("second", LearnerActor, LearnerConfig(dtype="float32"), replace(facts, student=str(tmp_path)), 0)
    engine = EngineConfig(dtype="float32", cpu_cache_gib=0.1)
    replicas = [on(node, RolloutActor, RolloutConfig(engine=engine), facts) for node in ("first", "second")]
    address = ray.get(learner.address.remote(), timeout=DEADLINE_S)
    ray.get([learner.start.remote(address, []), *(replica.ping.remote() for replica in replicas)], timeout=DEADLINE_S)
    fleet = Fleet("rollout", replicas, DEADLINE_S)
    choose_memory(learner, fleet)
    nodes = fleet.broadcast("ping", {})
    for version in (1, 2):
        update: Any = ray.get(learner.publish.remote(version, []), timeout=DEADLINE_S)
        assert update.remote and within_reach(update, nodes) is update
        assert fleet.broadcast("load", {"update": update, "in_flight": False}) == [version] * 2
    requests = [GenerationRequest(prompt_id="a", sample=0, prompt_tokens=(1, 2, 3), salt=0)]
    call = {"requests": requests, "teacher_share": 0.0, "max_tokens": 20, "teachers": []}
    (far,), (near,) = fleet.broadcast("generate", call)
    expected = chosen_logprobs(new, [1, 2, 3, *far.tokens], 3)
    for rollout in (far, near):
        assert (rollout.version, rollout.tokens) == (2, far.tokens)
        assert torch.allclose(torch.tensor(rollout.student_logprobs), expected, atol=1e-4)


def test_scores_that_go_down_with_a_node_are_computed_again(cluster: Cluster, caplog: pytest.LogCaptureFixture):
    """The learner's step waits for the news and for the new scores; the replay buffer's rows get theirs, too."""
    doomed = cluster.add_node(num_cpus=1, resources={"doomed": 1})
    teacher, algorithm = folder("teacher"), GKD(divergence=ReverseKL())
    facts = ModelFacts(student=folder("qwen2"), teacher=teacher, vocab_size=512, eos_ids=eos_of(teacher), max_length=512, seed=0)
    learner = on("first", LearnerActor, LearnerConfig(dtype="float32"), facts, 0)
    teachers = [on(node, TeacherActor, TeacherConfig(dtype="float32"), facts, False) for node in ("doomed", "first")]
    address = ray.get(learner.address.remote(), timeout=DEADLINE_S)
    ray.get(learner.start.remote(address, ray.get(teachers[0].head.remote())), timeout=DEADLINE_S)
    workers = Workers(
        learner=LearnerGang([learner], DEADLINE_S),
        replay=on("first", ReplayBuffer),
        usage=Usage(["teacher", "learner"]),
        teachers=Fleet("teacher", teachers, DEADLINE_S),
    )
    ids = torch.randint(3, 512, (8, 420), generator=torch.Generator().manual_seed(0)).tolist()
    written = [
        Rollout(prompt_id=str(n), sample=0, prompt_tokens=(1, n), tokens=tuple(text), source=Source.DATASET)
        for n, text in enumerate(ids)
    ]  # so long that Ray keeps their scores on the node where they were computed

    def loss(rows: list[Row]) -> dict[str, float]:
        return workers.evaluate([Term(algorithm=algorithm, rows=rows)])

    expected = loss(workers.score(written, algorithm.needs))
    rows = [replace(row, reward=float(n)) for n, row in enumerate(workers.score(written, algorithm.needs))]
    assert len({row.scores for row in rows}) == 2
    workers.call_replay("add", rows[4:])
    cluster.remove_node(doomed, allow_graceful=False)
    with caplog.at_level("WARNING"):
        assert loss(rows) == pytest.approx(expected, rel=1e-6)
    assert "scores" in caplog.text and expected["divergence"] > 0.1
    caplog.clear()
    held = workers.call_replay("sample", 4, 0)
    assert sorted(row.reward for row in held) == [4, 5, 6, 7]
    assert len({row.scores for row in held} - {row.scores for row in rows}) == 1, "half of them were on that node"
    loss(held)
    assert not caplog.text, "they are computed again once"
